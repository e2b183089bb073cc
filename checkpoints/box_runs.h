// The contiguous runs of a box inside its row-major tensor, in memory order.
#pragma once

#include "kernels/core/box.h"

namespace baleen {

// Calls visit(from, to, count) for each run along the last dimension: `from` is the flat element
// index in the whole tensor, `to` the one in the dense box. A scalar is one run of one element, an
// empty box none.
template <typename Visit>
void ForEachRun(const Shape& shape, const Box& box, const Visit& visit) {
  const size_t rank = shape.size();
  CHECK_EQ(box.offset.size(), rank);
  CHECK_EQ(box.extent.size(), rank);
  if (rank == 0) return visit(int64_t{0}, int64_t{0}, int64_t{1});
  const int64_t count = box.extent.back();
  const int64_t num_runs = count == 0 ? 0 : NumElements(box.extent) / count;
  for (int64_t run = 0; run < num_runs; ++run) {
    int64_t from = box.offset.back(), rest = run, stride = shape.back();
    for (size_t d = rank - 1; d-- > 0;) {
      from += (box.offset[d] + rest % box.extent[d]) * stride;
      rest /= box.extent[d];
      stride *= shape[d];
    }
    visit(from, run * count, count);
  }
}

}  // namespace baleen
