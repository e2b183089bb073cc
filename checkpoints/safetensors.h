// safetensors: [u64 little-endian N][N bytes of JSON][data]; one entry a tensor: dtype, shape,
// [begin, end).
//
// The reader takes a file only if every byte of it is explained: header inside the file and at most
// 100 MB, entries that follow each other without hole or overlap, sizes that are shape x dtype, the
// last end at the file's end. It allocates nothing from a claimed size before that size was checked
// against the file.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/core/file.h"
#include "kernels/core/tensor.h"

namespace baleen {

inline constexpr int64_t kMaxSafetensorsHeaderBytes = 100'000'000;
inline constexpr int64_t kMaxCheckpointTensors = 1'000'000;
inline constexpr int64_t kMaxTensorNameBytes = 1024;
inline constexpr int64_t kMaxTensorRank = 8;

struct SafetensorsEntry {
  std::string name;
  DType dtype = DType::kF32;
  Shape shape;
  int64_t begin = 0;  // bytes from the start of the data
  int64_t end = 0;
};

struct SafetensorsHeader {
  std::vector<SafetensorsEntry> entries;  // in the order of the data
  std::map<std::string, std::string> metadata;
  int64_t header_bytes = 0;  // 8 + N: where the data begins
};

// Checks a whole file (its header and its length); `where` names it in errors.
absl::StatusOr<SafetensorsHeader> ParseSafetensors(absl::Span<const uint8_t> file,
                                                   absl::string_view where);

// A mapped and checked file.
class SafetensorsFile {
 public:
  static absl::StatusOr<SafetensorsFile> Open(const std::string& path);

  const SafetensorsHeader& header() const { return header_; }
  const std::vector<SafetensorsEntry>& entries() const { return header_.entries; }
  // The bytes of [begin, end) of the data; the range must lie in it.
  absl::Span<const uint8_t> Data(int64_t begin, int64_t end) const;
  // The length word and the JSON: what identifies the file without reading its data.
  absl::Span<const uint8_t> HeaderBytes() const;
  const MappedFile& file() const { return file_; }

 private:
  SafetensorsFile(MappedFile file, SafetensorsHeader header)
      : file_(std::move(file)), header_(std::move(header)) {}
  MappedFile file_;
  SafetensorsHeader header_;
};

// A tensor that is to be written.
struct PlannedTensor {
  std::string name;
  Shape shape;
  DType dtype = DType::kF32;
  bool operator==(const PlannedTensor&) const = default;
};

int64_t PlannedBytes(const PlannedTensor& tensor);

// Sorts as the reference writer does: larger alignment first, then by name.
void SortForSafetensors(std::vector<PlannedTensor>& tensors);

// Length word and JSON, padded with spaces to a multiple of 8, for `tensors` in the order given.
// The data follows in that order without holes.
std::string SafetensorsHeaderText(const std::vector<PlannedTensor>& tensors);

}  // namespace baleen
