// Deterministic sums over rows, for the gradients of a norm's weights: out[d] += sum over rows of
// term(row, d), fp32.
//
// A block of 32 x 8 threads owns 32 vectors of columns and one range of rows; its partial sums go
// to a workspace, and a second kernel adds the ranges in order. Both orders depend on the sizes
// alone.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/launch.cuh"

namespace baleen::cuda {

inline constexpr int kColumnThreads = 32;
inline constexpr int kRowThreads = 8;
inline constexpr int64_t kMinRangeRows = 64;

// Ranges that the rows are cut into: one wave of blocks (four on each of 132 multiprocessors), none
// of a few rows only.
inline int64_t NumRowRanges(int64_t rows, int64_t cols) {
  const int64_t column_blocks = CeilDiv(cols, 256);
  const int64_t wanted = std::max<int64_t>(1, 528 / column_blocks);
  return std::clamp<int64_t>(CeilDiv(rows, kMinRangeRows), 1, wanted);
}

// Term: static constexpr int kWidth, kOutputs; void Add(row, col, sums[kOutputs][kWidth]) adds the
// row's terms of columns col .. col + kWidth - 1. partial: [kOutputs, ranges, cols].
template <typename Term>
__global__ void __launch_bounds__(kColumnThreads* kRowThreads)
    ColumnPartialSums(int64_t rows, int64_t cols, int64_t range_rows, Term term, float* partial) {
  constexpr int kWidth = Term::kWidth, kOutputs = Term::kOutputs;
  __shared__ float shared[kRowThreads][kWidth][kColumnThreads];
  const int64_t col =
      (static_cast<int64_t>(blockIdx.x) * kColumnThreads + threadIdx.x) * int64_t{kWidth};
  const int64_t begin = blockIdx.y * range_rows;
  const int64_t end = min(begin + range_rows, rows);
  float sums[kOutputs][kWidth] = {};
  if (col < cols) {
#pragma unroll 4
    for (int64_t row = begin + threadIdx.y; row < end; row += kRowThreads) {
      term.Add(row, col, sums);
    }
  }
#pragma unroll
  for (int o = 0; o < kOutputs; ++o) {
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kWidth; ++k) shared[threadIdx.y][k][threadIdx.x] = sums[o][k];
    __syncthreads();
    // Each thread finishes some of the block's columns: the row threads in order.
    for (int k = threadIdx.y; k < kWidth; k += kRowThreads) {
      if (col >= cols) break;
      float sum = 0;
#pragma unroll
      for (int y = 0; y < kRowThreads; ++y) sum += shared[y][k][threadIdx.x];
      partial[(o * int64_t{gridDim.y} + blockIdx.y) * cols + col + k] = sum;
    }
  }
}

inline constexpr int kAddThreads = 32;  // along columns, and along ranges

// out_o[d] += sum over ranges of partial[o, range, d]; blockIdx.y = o.
__global__ static void __launch_bounds__(kAddThreads* kAddThreads)
    AddRanges(const float* partial, int ranges, int64_t cols, float* out_0, float* out_1) {
  __shared__ float shared[kAddThreads][kAddThreads + 1];
  const int64_t col = static_cast<int64_t>(blockIdx.x) * kAddThreads + threadIdx.x;
  float sum = 0;
  if (col < cols) {
    const float* const first = partial + blockIdx.y * ranges * cols + col;
#pragma unroll 4
    for (int r = threadIdx.y; r < ranges; r += kAddThreads) sum += first[r * cols];
  }
  shared[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || col >= cols) return;
  sum = 0;
#pragma unroll
  for (int y = 0; y < kAddThreads; ++y) sum += shared[y][threadIdx.x];
  float* const out = blockIdx.y == 0 ? out_0 : out_1;
  out[col] += sum;
}

template <typename Term>
void LaunchColumnSums(int64_t rows, int64_t cols, const Term& term, float* workspace, float* out_0,
                      float* out_1, void* stream) {
  const int64_t ranges = NumRowRanges(rows, cols);
  const dim3 grid(static_cast<unsigned>(CeilDiv(cols, kColumnThreads * Term::kWidth)),
                  static_cast<unsigned>(ranges));
  ColumnPartialSums<<<grid, dim3(kColumnThreads, kRowThreads), 0, AsStream(stream)>>>(
      rows, cols, CeilDiv(rows, ranges), term, workspace);
  CheckLaunch("column sums");
  const dim3 add_grid(static_cast<unsigned>(CeilDiv(cols, kAddThreads)), Term::kOutputs);
  AddRanges<<<add_grid, dim3(kAddThreads, kAddThreads), 0, AsStream(stream)>>>(
      workspace, static_cast<int>(ranges), cols, out_0, out_1);
  CheckLaunch("add column sums");
}

}  // namespace baleen::cuda
