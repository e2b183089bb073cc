// The manifest of a training state: what was saved, when in the run, in which files, with which
// hashes.
//
// A state directory holds rank-00000.h5, rank-00001.h5, ... and manifest.json, which is written
// last. The manifest carries the hash of itself and the size and hash of every file, so a reader
// knows that a file is whole before HDF5 sees a byte of it; and for each tensor its pieces (file,
// box of the global tensor, flat range inside that box).
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "kernels/core/box.h"
#include "kernels/core/status.h"

namespace baleen {

inline constexpr int64_t kStateFormatVersion = 1;
inline constexpr char kManifestName[] = "manifest.json";

// Frozen tensors are not saved: they are read again from the Hugging Face checkpoint they came
// from.
struct FrozenSource {
  std::string path;  // directory as the run file names it
  // What HfCheckpoint says of it: SourceHash '+' a hash of every shard's DataHash. States from
  // before data were hashed hold the first part alone.
  std::string hash;
  std::vector<std::string> tensors;  // names that come from it
  bool operator==(const FrozenSource&) const = default;
};

// Where in the run the state was taken. Plain values; the trainer gives them their meaning.
struct StateMetadata {
  int64_t step = 0;  // optimizer steps of the whole run: the number in the directory's name
  std::string stage_name;
  int64_t stage_index = 0;
  int64_t stage_step = 0;
  int64_t consumed_samples = 0;
  int64_t consumed_tokens = 0;
  int64_t seed = 0;
  std::string layout;       // for people: "tp2 pp2 dp2, 8 ranks"
  std::string config_hash;  // of the run file's keys that must not change
  std::vector<FrozenSource> sources;
  std::map<std::string, std::string> extra;  // versions, device, data position, ...
  bool operator==(const StateMetadata&) const = default;
};

// One piece as it lies in a file.
struct PieceRecord {
  int file = 0;         // index into StateManifest::files; unused inside a RankFileRecord
  std::string dataset;  // path inside the HDF5 file
  Box box;
  int64_t flat_begin = 0;
  int64_t flat_count = 0;
  std::string hash;  // XXH3-128 of the elements, taken from memory before they were written
  bool operator==(const PieceRecord&) const = default;
};

struct TensorRecord {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;  // global
  std::vector<PieceRecord> pieces;
  bool operator==(const TensorRecord&) const = default;
};

struct FileRecord {
  std::string name;  // a plain basename
  int64_t bytes = 0;
  std::string hash;  // XXH3-128 of the file
  bool operator==(const FileRecord&) const = default;
};

// What a rank tells rank 0 about the file it wrote; travels as JSON text.
struct RankFileRecord {
  FileRecord file;
  std::vector<TensorRecord> tensors;

  std::string ToJson() const;
  static absl::StatusOr<RankFileRecord> FromJson(absl::string_view text);
};

struct StateManifest {
  StateMetadata metadata;
  std::vector<FileRecord> files;
  std::vector<TensorRecord> tensors;  // ascending by name

  const TensorRecord* Find(absl::string_view name) const;
  int64_t TotalBytes() const;

  // Text with the hash of itself. Parse checks that hash, the version, names, numbers and that
  // every piece lies inside its tensor: DataError beginning with `where`; EnvironmentError when a
  // newer Baleen wrote it.
  std::string ToJson() const;
  static absl::StatusOr<StateManifest> Parse(absl::string_view text, absl::string_view where);
};

// Joins the files of all ranks. DataError naming the tensor when ranks disagree about its shape or
// dtype, when elements are in no piece or in more than one, or when a frozen tensor was saved.
absl::StatusOr<StateManifest> JoinRankFiles(const StateMetadata& metadata,
                                            const std::vector<RankFileRecord>& files);

}  // namespace baleen
