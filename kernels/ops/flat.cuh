// One pass over flat arrays, for ops that go element by element.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch.cuh"

namespace baleen::cuda {

// One pass over elements [begin, end), kWidth at a time; kUnroll accesses of a thread are in flight
// before the first is used. Op: a struct Value, Value Load(i) and void Store(i, value), where i is
// the first element.
template <int kWidth, int kUnroll, typename Op>
__global__ void __launch_bounds__(kFlatThreads) FlatKernel(int64_t begin, int64_t end, Op op) {
  const int64_t first =
      begin + (static_cast<int64_t>(blockIdx.x) * kUnroll * kFlatThreads + threadIdx.x) * kWidth;
  typename Op::Value values[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kFlatThreads * kWidth;
    if (i < end) values[u] = op.Load(i);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kFlatThreads * kWidth;
    if (i < end) op.Store(i, values[u]);
  }
}

// Whole vectors with `vector` where the arrays allow it, what is left with `scalar`.
template <int kWidth, int kUnroll, typename Vector, typename Scalar>
void LaunchFlat(const char* name, int64_t count, bool aligned, const Vector& vector,
                const Scalar& scalar, void* stream) {
  const int64_t whole = aligned ? count / kWidth * kWidth : 0;
  if (whole > 0) {
    const int64_t blocks = CeilDiv(whole, int64_t{kWidth} * kUnroll * kFlatThreads);
    FlatKernel<kWidth, kUnroll>
        <<<static_cast<unsigned>(blocks), kFlatThreads, 0, AsStream(stream)>>>(0, whole, vector);
    CheckLaunch(name);
  }
  if (whole < count) {
    const int64_t blocks = CeilDiv(count - whole, int64_t{kUnroll} * kFlatThreads);
    FlatKernel<1, kUnroll><<<static_cast<unsigned>(blocks), kFlatThreads, 0, AsStream(stream)>>>(
        whole, count, scalar);
    CheckLaunch(name);
  }
}

}  // namespace baleen::cuda
