// Copying the common part of two pieces: from a dataset on disk to a rank's buffer, in bounded
// memory.
#pragma once

#include <cstdint>
#include <vector>

#include "checkpoints/hdf5_file.h"
#include "kernels/core/box.h"
#include "kernels/core/status.h"

namespace baleen {

// True when every value of `from` is a value of `to` of the same kind: same type, F32 -> F64, BF16
// -> F32 or F64, I32 -> I64.
bool ConvertsExactly(DType from, DType to);

// A dataset read forwards, one chunk in memory at a time.
class ChunkCursor {
 public:
  explicit ChunkCursor(const Hdf5Dataset& dataset);
  // Elements [begin, begin + count), converted to `to`, to `destination`.
  absl::Status Copy(int64_t begin, int64_t count, DType to, uint8_t* destination);

 private:
  const Hdf5Dataset& dataset_;
  int64_t window_elements_;
  int64_t window_begin_ = 0;
  int64_t window_count_ = 0;
  std::vector<uint8_t> window_;
};

// A flat range of a box, as a place to copy from or to: element i of the buffer is element
// flat_begin + i of the box.
struct FlatRange {
  const Box& box;
  int64_t flat_begin;
};

// Copies `common`, a box inside both ranges.
absl::Status CopyCommon(const Box& common, const FlatRange& from, ChunkCursor& cursor,
                        const FlatRange& to, DType dtype, uint8_t* destination);

}  // namespace baleen
