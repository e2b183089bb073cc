// Internal: the CPU definition behind rope.h, for float and double.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/ops/rope.h"

namespace baleen {

template <typename T>
void RopeTableCpu(const std::vector<double>& frequencies, int64_t num_positions, T* cos, T* sin);

// x: element (head, t, r) at x[head * head_stride + t * row_stride + r], r < 2 * half; cos, sin
// [positions, half].
template <typename T>
struct RopeArguments {
  int64_t heads, tokens, half;
  int64_t head_stride, row_stride;
  T* x;
  const int32_t* positions;
  const T* cos;
  const T* sin;
};
template <typename T>
void ApplyRopeCpu(const RopeArguments<T>& arguments, RopeLayout layout, RopeDirection direction);

}  // namespace baleen
