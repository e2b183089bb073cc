#include "checkpoints/state_inspect.h"

#include <cmath>
#include <cstring>
#include <map>
#include <vector>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "checkpoints/hdf5_file.h"
#include "checkpoints/state_digest.h"
#include "checkpoints/state_directory.h"
#include "checkpoints/state_io.h"
#include "checkpoints/state_reader.h"
#include "kernels/core/file.h"
#include "kernels/core/log.h"

namespace baleen {
namespace {

struct Kind {
  int64_t tensors = 0;
  int64_t pieces = 0;
  int64_t elements = 0;
  int64_t bytes = 0;
};

// "adam_m" of "adam_m/model.norm.weight"; tensors without a prefix are the parameters themselves.
std::string KindOf(const std::string& name) {
  const size_t slash = name.find('/');
  return slash == std::string::npos ? "parameters" : name.substr(0, slash);
}

template <typename T>
int64_t CountNotFinite(const uint8_t* bytes, int64_t count) {
  const T* values = reinterpret_cast<const T*>(bytes);
  int64_t bad = 0;
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<T, BFloat16>) {
      bad += !std::isfinite(values[i].ToFloat());
    } else {
      bad += !std::isfinite(values[i]);
    }
  }
  return bad;
}

int64_t CountNotFinite(DType dtype, const uint8_t* bytes, int64_t count) {
  switch (dtype) {
    case DType::kF64:
      return CountNotFinite<double>(bytes, count);
    case DType::kF32:
      return CountNotFinite<float>(bytes, count);
    case DType::kBF16:
      return CountNotFinite<BFloat16>(bytes, count);
    default:
      return 0;
  }
}

// Reads a piece chunk by chunk through HDF5; returns how many values are not finite.
absl::StatusOr<int64_t> CheckPieceContents(const Hdf5Reader& file, const TensorRecord& tensor,
                                           const PieceRecord& piece) {
  ASSIGN_OR_RETURN(const Hdf5Dataset dataset, file.OpenDataset(piece.dataset, tensor.dtype));
  const int64_t step = dataset.chunk_elements();
  std::vector<uint8_t> buffer;
  StreamHash hash;
  int64_t not_finite = 0;
  for (int64_t begin = 0; begin < dataset.count(); begin += step) {
    const int64_t count = std::min(step, dataset.count() - begin);
    buffer.resize(static_cast<size_t>(count * DTypeBytes(tensor.dtype)));
    RETURN_IF_ERROR(dataset.Read(begin, count, buffer.data()));
    hash.Update(buffer);
    not_finite += CountNotFinite(tensor.dtype, buffer.data(), count);
  }
  if (hash.Hex() != piece.hash) {
    return DataError("tensor ", tensor.name, ", dataset ", piece.dataset, ": found hash ",
                     hash.Hex(), ", the manifest says ", piece.hash);
  }
  return not_finite;
}

absl::StatusOr<int64_t> CheckFileContents(StateReader& reader, int file) {
  RETURN_IF_ERROR(reader.VerifyFile(file));
  const std::string path = JoinPath(reader.directory(), reader.manifest().files[file].name);
  ASSIGN_OR_RETURN(const Hdf5Reader hdf5, Hdf5Reader::Open(path));
  int64_t not_finite = 0;
  for (const TensorRecord& tensor : reader.manifest().tensors) {
    for (const PieceRecord& piece : tensor.pieces) {
      if (piece.file != file) continue;
      ASSIGN_OR_RETURN(const int64_t bad, CheckPieceContents(hdf5, tensor, piece));
      not_finite += bad;
    }
  }
  return not_finite;
}

void DescribeMetadata(const StateMetadata& metadata, std::string* text) {
  absl::StrAppendFormat(text, "training state of step %d: stage %s (number %d, its step %d)\n",
                        metadata.step, EscapeControl(metadata.stage_name), metadata.stage_index,
                        metadata.stage_step);
  absl::StrAppendFormat(text, "consumed   %d samples, %d tokens; seed %d\n",
                        metadata.consumed_samples, metadata.consumed_tokens, metadata.seed);
  absl::StrAppendFormat(text, "layout     %s\n", EscapeControl(metadata.layout));
  if (!metadata.config_hash.empty())
    absl::StrAppendFormat(text, "config     %s\n", EscapeControl(metadata.config_hash));
  for (const FrozenSource& source : metadata.sources) {
    absl::StrAppendFormat(text, "frozen     %d tensors from %s (hash %s)\n", source.tensors.size(),
                          EscapeControl(source.path), EscapeControl(source.hash));
  }
  for (const auto& [key, value] : metadata.extra) {
    absl::StrAppendFormat(text, "%-10s %s\n", EscapeControl(key), EscapeControl(value));
  }
}

void DescribeTensors(const StateManifest& manifest, std::string* text) {
  std::map<std::string, Kind> kinds;
  for (const TensorRecord& tensor : manifest.tensors) {
    Kind& kind =
        kinds[absl::StrCat(KindOf(tensor.name), " ", std::string(DTypeName(tensor.dtype)))];
    ++kind.tensors;
    kind.pieces += static_cast<int64_t>(tensor.pieces.size());
    kind.elements += NumElements(tensor.shape);
    kind.bytes += NumElements(tensor.shape) * DTypeBytes(tensor.dtype);
  }
  for (const auto& [name, kind] : kinds) {
    absl::StrAppendFormat(text,
                          "tensors    %-16s %6d tensors %7d pieces %14d elements %15d bytes\n",
                          name, kind.tensors, kind.pieces, kind.elements, kind.bytes);
  }
}

// What a look at one file found; `healthy` becomes false when that is not good.
std::string JudgeFile(StateReader& reader, int file, StateDepth depth, bool& healthy) {
  if (depth == StateDepth::kManifest) return "size right, contents not read";
  absl::StatusOr<int64_t> not_finite = 0;
  if (depth == StateDepth::kContents) {
    not_finite = CheckFileContents(reader, file);
  } else if (const absl::Status status = reader.VerifyFile(file); !status.ok()) {
    not_finite = status;
  }
  if (not_finite.ok() && *not_finite == 0) return "whole";
  healthy = false;
  return not_finite.ok() ? absl::StrCat("whole, but ", *not_finite, " values are NaN or infinite")
                         : absl::StrCat("damaged: ", not_finite.status().message());
}

void DescribeDigest(StateReader& reader, StateReport* report) {
  const absl::StatusOr<StateDigest> digest = DigestState(reader);
  if (!digest.ok()) {
    absl::StrAppend(&report->text, "digest     damaged: ", digest.status().message(), "\n");
    report->healthy = false;
    return;
  }
  for (const TensorDigest& tensor : digest->tensors) {
    absl::StrAppend(&report->text, "digest     ", tensor.hash, "  ", EscapeControl(tensor.name),
                    " ", std::string(DTypeName(tensor.dtype)), ShapeString(tensor.shape), "\n");
  }
  absl::StrAppend(&report->text, "digest     ", digest->whole, "  whole state\n");
}

StateReport InspectOne(const std::string& step_dir, StateDepth depth) {
  absl::StatusOr<StateReader> reader = StateReader::Open(step_dir);
  if (!reader.ok()) return {absl::StrCat("damaged: ", reader.status().message(), "\n"), false};
  StateReport report{absl::StrCat(step_dir, "\n"), true};
  DescribeMetadata(reader->metadata(), &report.text);
  DescribeTensors(reader->manifest(), &report.text);
  for (int file = 0; file < reader->num_files(); ++file) {
    const FileRecord& record = reader->manifest().files[file];
    const std::string verdict = JudgeFile(*reader, file, depth, report.healthy);
    absl::StrAppendFormat(&report.text, "file       %s %15d bytes  %s\n", record.name, record.bytes,
                          verdict);
  }
  if (depth == StateDepth::kDigest && report.healthy) DescribeDigest(*reader, &report);
  return report;
}

}  // namespace

absl::StatusOr<StateReport> InspectState(const std::string& path, StateDepth depth) {
  if (FileExists(JoinPath(path, kManifestName)) ||
      ParseStateName(Basename(path)).entry != StateEntry::kOther) {
    if (!DirectoryExists(path)) return DataError(path, ": there is no such training state");
    return InspectOne(path, depth);
  }
  ASSIGN_OR_RETURN(const std::vector<std::string> names, ListNames(path));
  StateReport all{"", true};
  int states = 0;
  for (const std::string& name : names) {
    const StateEntry entry = ParseStateName(name).entry;
    if (entry == StateEntry::kTemporary) {
      absl::StrAppend(&all.text, name, ": an interrupted or running save; it is no state\n");
    } else if (entry == StateEntry::kCorrupt) {
      absl::StrAppend(&all.text, name, ": set aside as damaged\n");
    } else if (entry == StateEntry::kState) {
      const StateReport one = InspectOne(JoinPath(path, name), depth);
      absl::StrAppend(&all.text, one.text);
      all.healthy = all.healthy && one.healthy;
      ++states;
    }
  }
  if (states == 0) return DataError(path, ": holds no training state (step-XXXXXXXX)");
  return all;
}

}  // namespace baleen
