#include "checkpoints/state_manifest.h"

#include <algorithm>
#include <limits>
#include <set>

#include "checkpoints/json_strict.h"
#include "checkpoints/state_ranges.h"
#include "kernels/core/file.h"

namespace baleen {
namespace {

constexpr int64_t kMostBytes = int64_t{1} << 30;
// The text begins with its own hash, taken with zeros in the place of the digits.
constexpr char kHashPrefix[] = "{\n  \"hash\": \"";
constexpr size_t kHashBegin = sizeof(kHashPrefix) - 1;
constexpr size_t kHashDigits = 32;
constexpr char kFormatName[] = "baleen training state";

std::string HashOfText(std::string text) {
  std::fill_n(text.begin() + kHashBegin, kHashDigits, '0');
  return Hash128(absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(text.data()), text.size()));
}

bool IsHash(absl::string_view text) {
  return text.size() == kHashDigits &&
         text.find_first_not_of("0123456789abcdef") == absl::string_view::npos;
}

constexpr char kNameCharacters[] =
    "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";

// One part of a path: a file name, a group or a dataset.
bool IsPlainPart(absl::string_view part) {
  return !part.empty() && part.size() <= 1024 && part[0] != '.' &&
         part.find_first_not_of(kNameCharacters) == absl::string_view::npos;
}

bool IsTensorName(absl::string_view name) {
  if (name.size() > 1024) return false;
  while (true) {
    const size_t slash = name.find('/');
    if (!IsPlainPart(name.substr(0, slash))) return false;
    if (slash == name.npos) return true;
    name.remove_prefix(slash + 1);
  }
}

// Typed members of a JSON object; an error names the object and the key.
class Members {
 public:
  Members(const JsonValue& value, std::string where) : value_(value), where_(std::move(where)) {}

  absl::StatusOr<const JsonValue*> Get(absl::string_view key, JsonKind kind) const {
    const JsonValue* member = value_.Find(key);
    if (member == nullptr) return DataError(where_, ": key ", key, " is missing");
    if (member->kind != kind) {
      return DataError(where_, ": ", key, ": expected ", JsonKindName(kind), ", found ",
                       JsonKindName(member->kind));
    }
    return member;
  }
  absl::Status Get(absl::string_view key, int64_t& out) const {
    ASSIGN_OR_RETURN(const JsonValue* member, Get(key, JsonKind::kInteger));
    out = member->integer;
    return absl::OkStatus();
  }
  absl::Status Get(absl::string_view key, std::string& out) const {
    ASSIGN_OR_RETURN(const JsonValue* member, Get(key, JsonKind::kString));
    out = member->text;
    return absl::OkStatus();
  }
  absl::Status Get(absl::string_view key, Shape& out) const {
    ASSIGN_OR_RETURN(const JsonValue* member, Get(key, JsonKind::kArray));
    out.clear();
    for (const JsonValue& item : member->items) {
      if (item.kind != JsonKind::kInteger) {
        return DataError(where_, ": ", key, ": expected integers");
      }
      out.push_back(item.integer);
    }
    return absl::OkStatus();
  }
  absl::Status GetHash(std::string& out) const {
    RETURN_IF_ERROR(Get("hash", out));
    if (IsHash(out)) return absl::OkStatus();
    return DataError(where_, ": hash: expected 32 hexadecimal digits, found ", JsonQuote(out));
  }
  const std::string& where() const { return where_; }

 private:
  const JsonValue& value_;
  std::string where_;
};

JsonValue IntArray(const Shape& values) {
  std::vector<JsonValue> items;
  for (const int64_t value : values) items.push_back(JsonValue::Integer(value));
  return JsonValue::Array(std::move(items));
}

JsonValue ToJsonValue(const FileRecord& file) {
  JsonValue value = JsonValue::Object();
  value.Set("name", JsonValue::String(file.name));
  value.Set("bytes", JsonValue::Integer(file.bytes));
  value.Set("hash", JsonValue::String(file.hash));
  return value;
}

JsonValue ToJsonValue(const TensorRecord& tensor) {
  std::vector<JsonValue> pieces;
  for (const PieceRecord& piece : tensor.pieces) {
    JsonValue value = JsonValue::Object();
    value.Set("file", JsonValue::Integer(piece.file));
    value.Set("dataset", JsonValue::String(piece.dataset));
    value.Set("box_offset", IntArray(piece.box.offset));
    value.Set("box_extent", IntArray(piece.box.extent));
    value.Set("flat", IntArray({piece.flat_begin, piece.flat_count}));
    value.Set("hash", JsonValue::String(piece.hash));
    pieces.push_back(std::move(value));
  }
  JsonValue value = JsonValue::Object();
  value.Set("name", JsonValue::String(tensor.name));
  value.Set("dtype", JsonValue::String(DTypeName(tensor.dtype)));
  value.Set("shape", IntArray(tensor.shape));
  value.Set("pieces", JsonValue::Array(std::move(pieces)));
  return value;
}

JsonValue ToJsonValue(const StateMetadata& metadata) {
  std::vector<JsonValue> sources;
  for (const FrozenSource& source : metadata.sources) {
    std::vector<JsonValue> tensors;
    for (const std::string& name : source.tensors) tensors.push_back(JsonValue::String(name));
    JsonValue value = JsonValue::Object();
    value.Set("path", JsonValue::String(source.path));
    value.Set("hash", JsonValue::String(source.hash));
    value.Set("tensors", JsonValue::Array(std::move(tensors)));
    sources.push_back(std::move(value));
  }
  JsonValue extra = JsonValue::Object();
  for (const auto& [key, text] : metadata.extra) extra.Set(key, JsonValue::String(text));
  JsonValue value = JsonValue::Object();
  value.Set("step", JsonValue::Integer(metadata.step));
  value.Set("stage_name", JsonValue::String(metadata.stage_name));
  value.Set("stage_index", JsonValue::Integer(metadata.stage_index));
  value.Set("stage_step", JsonValue::Integer(metadata.stage_step));
  value.Set("consumed_samples", JsonValue::Integer(metadata.consumed_samples));
  value.Set("consumed_tokens", JsonValue::Integer(metadata.consumed_tokens));
  value.Set("seed", JsonValue::Integer(metadata.seed));
  value.Set("layout", JsonValue::String(metadata.layout));
  value.Set("config_hash", JsonValue::String(metadata.config_hash));
  value.Set("extra", std::move(extra));
  value.Set("sources", JsonValue::Array(std::move(sources)));
  return value;
}

absl::Status ParseFile(const JsonValue& value, const std::string& where, FileRecord& file) {
  const Members members(value, where);
  RETURN_IF_ERROR(members.Get("name", file.name));
  RETURN_IF_ERROR(members.Get("bytes", file.bytes));
  RETURN_IF_ERROR(members.GetHash(file.hash));
  if (!IsPlainPart(file.name)) {
    return DataError(where, ": ", JsonQuote(file.name), " is not a plain file name");
  }
  if (file.bytes < 0) return DataError(where, ": ", file.name, " has ", file.bytes, " bytes");
  return absl::OkStatus();
}

absl::Status ParsePiece(const JsonValue& value, const std::string& where, const Shape& shape,
                        PieceRecord& piece) {
  const Members members(value, where);
  int64_t file = 0;
  Shape flat;
  RETURN_IF_ERROR(members.Get("file", file));
  RETURN_IF_ERROR(members.Get("dataset", piece.dataset));
  RETURN_IF_ERROR(members.Get("box_offset", piece.box.offset));
  RETURN_IF_ERROR(members.Get("box_extent", piece.box.extent));
  RETURN_IF_ERROR(members.Get("flat", flat));
  RETURN_IF_ERROR(members.GetHash(piece.hash));
  if (file < 0 || file > std::numeric_limits<int>::max() || flat.size() != 2 ||
      !IsTensorName(piece.dataset)) {
    return DataError(where, ": file ", file, ", dataset ", JsonQuote(piece.dataset), ", flat ",
                     ShapeString(flat), " cannot be");
  }
  piece.file = static_cast<int>(file);
  piece.flat_begin = flat[0];
  piece.flat_count = flat[1];
  return CheckPiece(where, shape, piece.box, piece.flat_begin, piece.flat_count);
}

absl::StatusOr<DType> ParseDType(const std::string& name, const std::string& where) {
  for (const DType dtype :
       {DType::kF64, DType::kF32, DType::kBF16, DType::kI64, DType::kI32, DType::kU8}) {
    if (name == DTypeName(dtype)) return dtype;
  }
  return DataError(where, ": dtype ", JsonQuote(name), " is not one a state holds");
}

absl::Status ParseTensor(const JsonValue& value, absl::string_view where, TensorRecord& tensor) {
  RETURN_IF_ERROR(Members(value, absl::StrCat(where, ": tensor")).Get("name", tensor.name));
  if (!IsTensorName(tensor.name)) {
    return DataError(where, ": ", JsonQuote(tensor.name), " is not a tensor's name");
  }
  const Members members(value, absl::StrCat(where, ": tensor ", tensor.name));
  std::string dtype;
  RETURN_IF_ERROR(members.Get("dtype", dtype));
  ASSIGN_OR_RETURN(tensor.dtype, ParseDType(dtype, members.where()));
  RETURN_IF_ERROR(members.Get("shape", tensor.shape));
  RETURN_IF_ERROR(CheckShape(members.where(), tensor.shape));
  ASSIGN_OR_RETURN(const JsonValue* pieces, members.Get("pieces", JsonKind::kArray));
  if (pieces->items.empty()) return DataError(members.where(), ": there are no pieces");
  for (const JsonValue& item : pieces->items) {
    RETURN_IF_ERROR(ParsePiece(item, members.where(), tensor.shape, tensor.pieces.emplace_back()));
  }
  return absl::OkStatus();
}

absl::Status ParseTensors(const Members& members, std::vector<TensorRecord>& tensors) {
  ASSIGN_OR_RETURN(const JsonValue* items, members.Get("tensors", JsonKind::kArray));
  for (const JsonValue& item : items->items) {
    RETURN_IF_ERROR(ParseTensor(item, members.where(), tensors.emplace_back()));
  }
  return absl::OkStatus();
}

absl::Status ParseMetadata(const JsonValue& value, const std::string& where,
                           StateMetadata& metadata) {
  const Members members(value, where);
  RETURN_IF_ERROR(members.Get("step", metadata.step));
  RETURN_IF_ERROR(members.Get("stage_name", metadata.stage_name));
  RETURN_IF_ERROR(members.Get("stage_index", metadata.stage_index));
  RETURN_IF_ERROR(members.Get("stage_step", metadata.stage_step));
  RETURN_IF_ERROR(members.Get("consumed_samples", metadata.consumed_samples));
  RETURN_IF_ERROR(members.Get("consumed_tokens", metadata.consumed_tokens));
  RETURN_IF_ERROR(members.Get("seed", metadata.seed));
  RETURN_IF_ERROR(members.Get("layout", metadata.layout));
  RETURN_IF_ERROR(members.Get("config_hash", metadata.config_hash));
  ASSIGN_OR_RETURN(const JsonValue* extra, members.Get("extra", JsonKind::kObject));
  for (const auto& [key, text] : extra->members) {
    if (text.kind != JsonKind::kString) return DataError(where, ": extra.", key, ": not a string");
    metadata.extra[key] = text.text;
  }
  ASSIGN_OR_RETURN(const JsonValue* sources, members.Get("sources", JsonKind::kArray));
  for (const JsonValue& item : sources->items) {
    const Members source_members(item, absl::StrCat(where, ": source"));
    FrozenSource& source = metadata.sources.emplace_back();
    RETURN_IF_ERROR(source_members.Get("path", source.path));
    RETURN_IF_ERROR(source_members.Get("hash", source.hash));
    ASSIGN_OR_RETURN(const JsonValue* names, source_members.Get("tensors", JsonKind::kArray));
    for (const JsonValue& name : names->items) {
      if (name.kind != JsonKind::kString) return DataError(where, ": source: not a tensor's name");
      source.tensors.push_back(name.text);
    }
  }
  return absl::OkStatus();
}

// What a hash cannot tell: that the parts of the manifest fit each other.
absl::Status CheckConsistent(const StateManifest& manifest, absl::string_view where) {
  std::set<std::string> file_names;
  for (const FileRecord& file : manifest.files) {
    if (!file_names.insert(file.name).second) {
      return DataError(where, ": file ", file.name, " is listed twice");
    }
  }
  const std::string* previous = nullptr;
  for (const TensorRecord& tensor : manifest.tensors) {
    if (previous != nullptr && *previous >= tensor.name) {
      return DataError(where, ": tensor ", tensor.name, " is listed after ", *previous);
    }
    previous = &tensor.name;
    for (const PieceRecord& piece : tensor.pieces) {
      if (piece.file < static_cast<int>(manifest.files.size())) continue;
      return DataError(where, ": tensor ", tensor.name, ": a piece is in file number ", piece.file,
                       ", there are ", manifest.files.size());
    }
    RETURN_IF_ERROR(Annotate(CheckCoverage(tensor, manifest.files), where));
  }
  return absl::OkStatus();
}

}  // namespace

std::string RankFileRecord::ToJson() const {
  JsonValue value = JsonValue::Object();
  value.Set("file", ToJsonValue(file));
  std::vector<JsonValue> items;
  for (const TensorRecord& tensor : tensors) items.push_back(ToJsonValue(tensor));
  value.Set("tensors", JsonValue::Array(std::move(items)));
  return JsonText(value, 0);
}

absl::StatusOr<RankFileRecord> RankFileRecord::FromJson(absl::string_view text) {
  const std::string where = "a rank's record of its state file";
  ASSIGN_OR_RETURN(const JsonValue value, ParseJson(text, where, {kMostBytes}));
  const Members members(value, where);
  RankFileRecord record;
  ASSIGN_OR_RETURN(const JsonValue* file, members.Get("file", JsonKind::kObject));
  RETURN_IF_ERROR(ParseFile(*file, where, record.file));
  RETURN_IF_ERROR(ParseTensors(members, record.tensors));
  return record;
}

const TensorRecord* StateManifest::Find(absl::string_view name) const {
  const auto found = std::lower_bound(
      tensors.begin(), tensors.end(), name,
      [](const TensorRecord& tensor, absl::string_view wanted) { return tensor.name < wanted; });
  return found != tensors.end() && found->name == name ? &*found : nullptr;
}

int64_t StateManifest::TotalBytes() const {
  int64_t bytes = 0;
  for (const FileRecord& file : files) bytes += file.bytes;
  return bytes;
}

// One line a file and a tensor, so that people can read it and tools can compare two.
std::string StateManifest::ToJson() const {
  std::string text = absl::StrCat(kHashPrefix, std::string(kHashDigits, '0'), "\",\n",
                                  "  \"format\": ", JsonQuote(kFormatName), ",\n",
                                  "  \"version\": ", kStateFormatVersion, ",\n",
                                  "  \"metadata\": ", JsonText(ToJsonValue(metadata), 0), ",\n");
  const auto append_lines = [&text](absl::string_view key, const auto& records) {
    absl::StrAppend(&text, "  \"", key, "\": [");
    const char* separator = "\n    ";
    for (const auto& record : records) {
      absl::StrAppend(&text, separator, JsonText(ToJsonValue(record), 0));
      separator = ",\n    ";
    }
    absl::StrAppend(&text, "\n  ]");
  };
  append_lines("files", files);
  text += ",\n";
  append_lines("tensors", tensors);
  text += "\n}\n";
  const std::string hash = HashOfText(text);
  text.replace(kHashBegin, kHashDigits, hash);
  return text;
}

absl::StatusOr<StateManifest> StateManifest::Parse(absl::string_view text,
                                                   absl::string_view where) {
  if (text.substr(0, kHashBegin) != kHashPrefix || text.size() < kHashBegin + kHashDigits) {
    return DataError(where,
                     ": this is no manifest of a training state, or its first bytes are damaged");
  }
  const absl::string_view stated = text.substr(kHashBegin, kHashDigits);
  const std::string found = HashOfText(std::string(text));
  if (stated != found) {
    return DataError(where, ": the manifest changed since it was written: its contents hash to ",
                     found, ", it says ", JsonQuote(stated));
  }
  ASSIGN_OR_RETURN(const JsonValue value, ParseJson(text, where, {kMostBytes}));
  const Members members(value, std::string(where));
  std::string format;
  int64_t version = 0;
  RETURN_IF_ERROR(members.Get("format", format));
  RETURN_IF_ERROR(members.Get("version", version));
  if (format != kFormatName)
    return DataError(where, ": format ", JsonQuote(format), ", expected ", kFormatName);
  if (version > kStateFormatVersion) {
    return EnvironmentError(where, ": the state has format version ", version,
                            ", this Baleen reads up to ", kStateFormatVersion,
                            "; a newer Baleen wrote it, use that one");
  }
  if (version < 1) return DataError(where, ": format version ", version, " never existed");
  StateManifest manifest;
  ASSIGN_OR_RETURN(const JsonValue* metadata, members.Get("metadata", JsonKind::kObject));
  RETURN_IF_ERROR(ParseMetadata(*metadata, absl::StrCat(where, ": metadata"), manifest.metadata));
  ASSIGN_OR_RETURN(const JsonValue* files, members.Get("files", JsonKind::kArray));
  for (const JsonValue& item : files->items) {
    RETURN_IF_ERROR(ParseFile(item, absl::StrCat(where, ": file"), manifest.files.emplace_back()));
  }
  RETURN_IF_ERROR(ParseTensors(members, manifest.tensors));
  RETURN_IF_ERROR(CheckConsistent(manifest, where));
  return manifest;
}

absl::StatusOr<StateManifest> JoinRankFiles(const StateMetadata& metadata,
                                            const std::vector<RankFileRecord>& files) {
  StateManifest manifest;
  manifest.metadata = metadata;
  std::map<std::string, TensorRecord> tensors;
  for (const RankFileRecord& record : files) {
    const int file = static_cast<int>(manifest.files.size());
    manifest.files.push_back(record.file);
    for (const TensorRecord& tensor : record.tensors) {
      TensorRecord& joined =
          tensors
              .try_emplace(tensor.name, TensorRecord{tensor.name, tensor.dtype, tensor.shape, {}})
              .first->second;
      if (joined.dtype != tensor.dtype || joined.shape != tensor.shape) {
        return DataError("tensor ", tensor.name, ": ", record.file.name, " has ",
                         std::string(DTypeName(tensor.dtype)), ShapeString(tensor.shape),
                         ", another rank has ", std::string(DTypeName(joined.dtype)),
                         ShapeString(joined.shape));
      }
      for (PieceRecord piece : tensor.pieces) {
        piece.file = file;
        joined.pieces.push_back(std::move(piece));
      }
    }
  }
  for (const FrozenSource& source : metadata.sources) {
    for (const std::string& name : source.tensors) {
      if (tensors.contains(name)) {
        return DataError("tensor ", name, " is saved and also named as frozen, from ", source.path);
      }
    }
  }
  for (auto& [name, tensor] : tensors) manifest.tensors.push_back(std::move(tensor));
  RETURN_IF_ERROR(CheckConsistent(manifest, "the ranks' state files"));
  return manifest;
}

}  // namespace baleen
