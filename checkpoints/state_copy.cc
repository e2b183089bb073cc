#include "checkpoints/state_copy.h"

#include <algorithm>
#include <cstring>

#include "checkpoints/state_ranges.h"

namespace baleen {
namespace {

template <typename From, typename To>
void Widen(const uint8_t* from, int64_t count, uint8_t* to) {
  const From* source = reinterpret_cast<const From*>(from);
  To* destination = reinterpret_cast<To*>(to);
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<From, BFloat16>) {
      destination[i] = source[i].ToFloat();
    } else {
      destination[i] = source[i];
    }
  }
}

void Convert(DType from, const uint8_t* source, int64_t count, DType to, uint8_t* destination) {
  if (from == to) {
    std::memcpy(destination, source, static_cast<size_t>(count * DTypeBytes(to)));
  } else if (from == DType::kF32) {
    Widen<float, double>(source, count, destination);
  } else if (from == DType::kI32) {
    Widen<int32_t, int64_t>(source, count, destination);
  } else if (to == DType::kF32) {
    Widen<BFloat16, float>(source, count, destination);
  } else {
    Widen<BFloat16, double>(source, count, destination);
  }
}

}  // namespace

bool ConvertsExactly(DType from, DType to) {
  return from == to || (from == DType::kF32 && to == DType::kF64) ||
         (from == DType::kBF16 && (to == DType::kF32 || to == DType::kF64)) ||
         (from == DType::kI32 && to == DType::kI64);
}

ChunkCursor::ChunkCursor(const Hdf5Dataset& dataset)
    : dataset_(dataset),
      window_elements_(std::min(dataset.count(), dataset.chunk_elements())),
      window_(static_cast<size_t>(window_elements_ * DTypeBytes(dataset.dtype()))) {}

absl::Status ChunkCursor::Copy(int64_t begin, int64_t count, DType to, uint8_t* destination) {
  const int64_t from_bytes = DTypeBytes(dataset_.dtype());
  while (count > 0) {
    if (begin < window_begin_ || begin >= window_begin_ + window_count_) {
      window_begin_ = begin / window_elements_ * window_elements_;
      window_count_ = std::min(window_elements_, dataset_.count() - window_begin_);
      RETURN_IF_ERROR(dataset_.Read(window_begin_, window_count_, window_.data()));
    }
    const int64_t here = std::min(count, window_begin_ + window_count_ - begin);
    Convert(dataset_.dtype(), window_.data() + (begin - window_begin_) * from_bytes, here, to,
            destination);
    begin += here;
    count -= here;
    destination += here * DTypeBytes(to);
  }
  return absl::OkStatus();
}

absl::Status CopyCommon(const Box& common, const FlatRange& from, ChunkCursor& cursor,
                        const FlatRange& to, DType dtype, uint8_t* destination) {
  // A run is contiguous on both sides: the last dimension, joined with those before it while both
  // boxes hold the dimensions behind whole.
  size_t run_dim = common.extent.size();
  int64_t run = 1;
  while (run_dim > 0) {
    --run_dim;
    run *= common.extent[run_dim];
    const bool whole = common.extent[run_dim] == from.box.extent[run_dim] &&
                       common.extent[run_dim] == to.box.extent[run_dim];
    if (!whole) break;
  }
  const int64_t num_runs = NumElements(common.extent) / run;
  Shape index = common.offset;
  for (int64_t i = 0; i < num_runs; ++i) {
    const int64_t source = FlatIndex(from.box, index) - from.flat_begin;
    const int64_t target = FlatIndex(to.box, index) - to.flat_begin;
    RETURN_IF_ERROR(cursor.Copy(source, run, dtype, destination + target * DTypeBytes(dtype)));
    for (size_t d = run_dim; d-- > 0;) {
      if (++index[d] < common.offset[d] + common.extent[d]) break;
      index[d] = common.offset[d];
    }
  }
  return absl::OkStatus();
}

}  // namespace baleen
