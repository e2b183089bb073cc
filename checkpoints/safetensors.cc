// One pass over the header's events fills the entries and checks each by itself; CheckCoverage then
// sorts them by offset and checks them against each other and against the file's length. Nothing is
// kept of a file that fails.
#include "checkpoints/safetensors.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

#include "absl/strings/str_join.h"
#include "checkpoints/json_strict.h"
#include "kernels/core/log.h"

namespace baleen {
namespace {

constexpr int64_t kLengthBytes = 8;

// The dtypes Baleen has a use for, in the reference writer's order (larger alignment first).
constexpr DType kByAlignment[] = {DType::kI64,  DType::kF64,    DType::kF32, DType::kI32,
                                  DType::kBF16, DType::kF8E4M3, DType::kU8};

std::optional<DType> DTypeFromName(absl::string_view name) {
  for (const DType dtype : kByAlignment) {
    if (DTypeName(dtype) == name) return dtype;
  }
  return std::nullopt;
}

int AlignmentRank(DType dtype) {
  return static_cast<int>(std::find(std::begin(kByAlignment), std::end(kByAlignment), dtype) -
                          std::begin(kByAlignment));
}

std::string DTypeNames() {
  std::vector<std::string> names;
  for (const DType dtype : kByAlignment) names.emplace_back(DTypeName(dtype));
  return absl::StrJoin(names, ", ");
}

// Bytes of `shape` elements of `dtype`; nothing when they do not fit 63 bits.
std::optional<int64_t> CheckedBytes(const Shape& shape, DType dtype) {
  int64_t bytes = DTypeBytes(dtype);
  for (const int64_t extent : shape) {
    if (__builtin_mul_overflow(bytes, extent, &bytes)) return std::nullopt;
  }
  return bytes;
}

// Takes the events of a header: { "__metadata__": {text: text}, name: {"dtype", "shape",
// "data_offsets"}, ... }.
// `place_` is the container the next event belongs to; anything that may not stand there is named
// and refused.
class HeaderReader {
 public:
  HeaderReader(absl::string_view where, SafetensorsHeader* header)
      : where_(where), header_(header) {}

  absl::Status Take(const JsonEvent& event) {
    if (event.what == JsonEvent::What::kEnd) return Leave();
    if (event.what == JsonEvent::What::kKey) return TakeKey(event.text);
    if (event.what == JsonEvent::What::kBegin) return Enter(event.kind);
    return TakeScalar(event);
  }

 private:
  enum class Place { kOutside, kTop, kMetadata, kEntry, kShape, kOffsets };

  absl::Status Error(absl::string_view what) const {
    return DataError(where_, ": safetensors header: ", what);
  }
  absl::Status EntryError(absl::string_view what) const {
    return Error(absl::StrCat("tensor \"", EscapeControl(name_), "\": ", what));
  }

  absl::Status Enter(JsonKind kind) {
    const bool object = kind == JsonKind::kObject;
    if (place_ == Place::kOutside) {
      if (!object) return Error("expected an object at the top, found a list");
      place_ = Place::kTop;
    } else if (place_ == Place::kTop) {
      if (!object) return EntryError("expected an object, found a list");
      place_ = name_ == "__metadata__" ? Place::kMetadata : Place::kEntry;
    } else if (place_ == Place::kEntry && !object && field_ == "shape") {
      place_ = Place::kShape;
      has_shape_ = true;
    } else if (place_ == Place::kEntry && !object && field_ == "data_offsets") {
      place_ = Place::kOffsets;
    } else {
      return EntryError(absl::StrCat("unexpected ", JsonKindName(kind), " in ", field_));
    }
    return absl::OkStatus();
  }

  absl::Status Leave() {
    switch (place_) {
      case Place::kShape:
      case Place::kOffsets:
        place_ = Place::kEntry;
        return absl::OkStatus();
      case Place::kEntry:
        place_ = Place::kTop;
        return FinishEntry();
      case Place::kMetadata:
        place_ = Place::kTop;
        return absl::OkStatus();
      default:
        place_ = Place::kOutside;
        return absl::OkStatus();
    }
  }

  absl::Status TakeKey(absl::string_view key) {
    if (place_ == Place::kTop) {
      if (static_cast<int64_t>(key.size()) > kMaxTensorNameBytes) {
        return Error(absl::StrCat("a tensor name of ", key.size(), " bytes, the limit is ",
                                  kMaxTensorNameBytes));
      }
      if (key.empty()) return Error("a tensor without a name");
      name_ = std::string(key);
      entry_ = {};
      has_dtype_ = has_shape_ = false;
      num_offsets_ = 0;
      // Names reach terminals and logs.
      if (EscapeControl(name_) != name_) return EntryError("control characters in the name");
    } else {
      field_ = std::string(key.substr(0, static_cast<size_t>(kMaxTensorNameBytes)));
      if (place_ == Place::kEntry && field_ != "dtype" && field_ != "shape" &&
          field_ != "data_offsets") {
        return EntryError(absl::StrCat("unknown key \"", EscapeControl(field_), "\""));
      }
    }
    return absl::OkStatus();
  }

  absl::Status TakeScalar(const JsonEvent& event) {
    switch (place_) {
      case Place::kOutside:
        return Error(absl::StrCat("expected an object, found ", JsonKindName(event.kind)));
      case Place::kTop:
        return EntryError(absl::StrCat("expected an object, found ", JsonKindName(event.kind)));
      case Place::kMetadata:
        if (event.kind != JsonKind::kString) {
          return Error(
              absl::StrCat("__metadata__: expected strings, found ", JsonKindName(event.kind)));
        }
        header_->metadata[field_] = std::string(event.text);
        return absl::OkStatus();
      case Place::kEntry:
        return TakeDType(event);
      case Place::kShape:
      case Place::kOffsets:
        return TakeInteger(event);
    }
    return absl::OkStatus();
  }

  absl::Status TakeDType(const JsonEvent& event) {
    if (field_ != "dtype" || event.kind != JsonKind::kString) {
      return EntryError(absl::StrCat(field_, ": unexpected ", JsonKindName(event.kind)));
    }
    const std::optional<DType> dtype = DTypeFromName(event.text);
    if (!dtype) {
      return EntryError(absl::StrCat("dtype ", EscapeControl(event.text.substr(0, 32)),
                                     " is not supported; expected one of ", DTypeNames()));
    }
    entry_.dtype = *dtype;
    has_dtype_ = true;
    return absl::OkStatus();
  }

  absl::Status TakeInteger(const JsonEvent& event) {
    // Up to 2^53 every JSON reader agrees on a number, and sums of two sizes stay inside int64.
    constexpr int64_t kLargest = int64_t{1} << 53;
    if (event.kind != JsonKind::kInteger || event.integer < 0 || event.integer > kLargest) {
      const std::string found = event.kind == JsonKind::kInteger
                                    ? absl::StrCat(event.integer)
                                    : std::string(JsonKindName(event.kind));
      return EntryError(
          absl::StrCat(field_, ": found ", found, ", expected an integer from 0 to 2^53"));
    }
    if (place_ == Place::kShape) {
      if (static_cast<int64_t>(entry_.shape.size()) == kMaxTensorRank) {
        return EntryError(absl::StrCat("more than ", kMaxTensorRank, " dimensions"));
      }
      entry_.shape.push_back(event.integer);
    } else {
      if (num_offsets_ == 2) return EntryError("data_offsets: expected two numbers");
      (num_offsets_ == 0 ? entry_.begin : entry_.end) = event.integer;
      ++num_offsets_;
    }
    return absl::OkStatus();
  }

  absl::Status FinishEntry() {
    if (!has_dtype_) return EntryError("the key \"dtype\" is missing");
    if (!has_shape_) return EntryError("the key \"shape\" is missing");
    if (num_offsets_ != 2) return EntryError("data_offsets: expected two numbers");
    const std::optional<int64_t> bytes = CheckedBytes(entry_.shape, entry_.dtype);
    if (!bytes) {
      return EntryError(absl::StrCat(ShapeString(entry_.shape), " is larger than any file"));
    }
    if (entry_.end < entry_.begin || entry_.end - entry_.begin != *bytes) {
      return EntryError(absl::StrCat("data_offsets [", entry_.begin, ", ", entry_.end,
                                     "], expected ", *bytes, " bytes for ", DTypeName(entry_.dtype),
                                     ShapeString(entry_.shape)));
    }
    if (static_cast<int64_t>(header_->entries.size()) == kMaxCheckpointTensors) {
      return Error(absl::StrCat("more than ", kMaxCheckpointTensors, " tensors"));
    }
    entry_.name = name_;
    header_->entries.push_back(std::move(entry_));
    return absl::OkStatus();
  }

  absl::string_view where_;
  SafetensorsHeader* header_;
  Place place_ = Place::kOutside;
  std::string name_;   // the tensor, or "__metadata__"
  std::string field_;  // the key inside it
  SafetensorsEntry entry_;
  bool has_dtype_ = false;
  bool has_shape_ = false;
  int num_offsets_ = 0;
};

// Every byte of the data belongs to exactly one tensor.
absl::Status CheckCoverage(SafetensorsHeader& header, int64_t data_bytes, absl::string_view where) {
  std::sort(header.entries.begin(), header.entries.end(),
            [](const SafetensorsEntry& a, const SafetensorsEntry& b) {
              return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
            });
  int64_t end = 0;
  for (const SafetensorsEntry& entry : header.entries) {
    if (entry.begin != end) {
      return DataError(where, ": safetensors header: tensor \"", entry.name, "\" begins at byte ",
                       entry.begin, " of the data, expected ", end,
                       entry.begin < end ? " (tensors overlap)" : " (a hole before it)");
    }
    // Past the file already: the sum below says so, and `end` stays inside it.
    if (entry.end > data_bytes) break;
    end = entry.end;
  }
  const int64_t claimed = header.entries.empty() ? 0 : header.entries.back().end;
  if (claimed != data_bytes) {
    return DataError(where, ": the header describes ", claimed, " bytes of data, the file has ",
                     data_bytes, claimed > data_bytes ? " (truncated?)" : " (trailing bytes)");
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<SafetensorsHeader> ParseSafetensors(absl::Span<const uint8_t> file,
                                                   absl::string_view where) {
  const int64_t file_bytes = static_cast<int64_t>(file.size());
  if (file_bytes < kLengthBytes) {
    return DataError(where, ": not a safetensors file: ", file_bytes, " bytes, expected at least ",
                     kLengthBytes);
  }
  uint64_t length = 0;
  for (int i = 0; i < kLengthBytes; ++i)
    length |= uint64_t{file[static_cast<size_t>(i)]} << (8 * i);
  if (length > static_cast<uint64_t>(kMaxSafetensorsHeaderBytes)) {
    return DataError(where, ": the first 8 bytes name a header of ", length,
                     " bytes, the limit is ", kMaxSafetensorsHeaderBytes,
                     "; is it a safetensors file?");
  }
  const int64_t header_bytes = kLengthBytes + static_cast<int64_t>(length);
  if (header_bytes > file_bytes) {
    return DataError(where, ": the header should end at byte ", header_bytes,
                     ", the file has only ", file_bytes, " (truncated?)");
  }
  const absl::string_view json(reinterpret_cast<const char*>(file.data()) + kLengthBytes, length);
  SafetensorsHeader header;
  HeaderReader reader(where, &header);
  RETURN_IF_ERROR(ParseJsonEvents(json, where, {.bytes = kMaxSafetensorsHeaderBytes},
                                  [&](const JsonEvent& event) { return reader.Take(event); }));
  header.header_bytes = header_bytes;
  RETURN_IF_ERROR(CheckCoverage(header, file_bytes - header_bytes, where));
  return header;
}

absl::StatusOr<SafetensorsFile> SafetensorsFile::Open(const std::string& path) {
  ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
  ASSIGN_OR_RETURN(SafetensorsHeader header, ParseSafetensors(file.bytes(), path));
  return SafetensorsFile(std::move(file), std::move(header));
}

absl::Span<const uint8_t> SafetensorsFile::Data(int64_t begin, int64_t end) const {
  const absl::Span<const uint8_t> data =
      file_.bytes().subspan(static_cast<size_t>(header_.header_bytes));
  CHECK(begin >= 0 && begin <= end && end <= static_cast<int64_t>(data.size()))
      << file_.path() << " [" << begin << ", " << end << ") of " << data.size();
  return data.subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
}

absl::Span<const uint8_t> SafetensorsFile::HeaderBytes() const {
  return file_.bytes().subspan(0, static_cast<size_t>(header_.header_bytes));
}

int64_t PlannedBytes(const PlannedTensor& tensor) {
  const std::optional<int64_t> bytes = CheckedBytes(tensor.shape, tensor.dtype);
  CHECK(bytes.has_value()) << tensor.name << " " << ShapeString(tensor.shape);
  return *bytes;
}

void SortForSafetensors(std::vector<PlannedTensor>& tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const PlannedTensor& a, const PlannedTensor& b) {
    return std::make_pair(AlignmentRank(a.dtype), absl::string_view(a.name)) <
           std::make_pair(AlignmentRank(b.dtype), absl::string_view(b.name));
  });
}

std::string SafetensorsHeaderText(const std::vector<PlannedTensor>& tensors) {
  std::string json = "{\"__metadata__\":{\"format\":\"pt\"}";
  int64_t begin = 0;
  for (const PlannedTensor& tensor : tensors) {
    const int64_t end = begin + PlannedBytes(tensor);
    absl::StrAppend(&json, ",", JsonQuote(tensor.name), ":{\"dtype\":\"", DTypeName(tensor.dtype),
                    "\",\"shape\":[", absl::StrJoin(tensor.shape, ","), "],\"data_offsets\":[",
                    begin, ",", end, "]}");
    begin = end;
  }
  json.push_back('}');
  json.append((8 - json.size() % 8) % 8, ' ');
  std::string text;
  for (int i = 0; i < kLengthBytes; ++i) {
    text.push_back(static_cast<char>(uint64_t{json.size()} >> (8 * i) & 0xff));
  }
  return text + json;
}

}  // namespace baleen
