// Blocks that own whole rows: blockDim.x threads (whole warps) share a row, blockDim.y rows share a
// block. The first kCachedVectors vectors of a thread stay in registers, so that a row of up to
// kMaxRowThreads * kCachedVectors vectors is read once, however often it is looked at.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"

namespace baleen::cuda {

inline constexpr int kCachedVectors = 4;
inline constexpr int kMaxRowWarps = 16;
inline constexpr int kMaxRowThreads = 32 * kMaxRowWarps;  // for __launch_bounds__

__device__ __forceinline__ float WarpSum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// Sums over the threads of a row, the same bits in each of them. All threads of the block call it;
// `shared` holds kValues * kMaxRowWarps floats.
template <int kValues>
__device__ __forceinline__ void RowSum(float (&values)[kValues], float* shared) {
#pragma unroll
  for (int v = 0; v < kValues; ++v) values[v] = WarpSum(values[v]);
  if (blockDim.x == 32) return;
  const int row_warps = blockDim.x / 32, first = threadIdx.y * row_warps;
  __syncthreads();  // the sums of an earlier call have been read
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      shared[v * kMaxRowWarps + first + threadIdx.x / 32] = values[v];
    }
  }
  __syncthreads();
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    float sum = 0;
    for (int w = 0; w < row_warps; ++w) sum += shared[v * kMaxRowWarps + first + w];
    values[v] = sum;
  }
}

// A thread's share of a row.
template <typename T, int kWidth>
struct CachedRow {
  Word<T, kWidth> words[kCachedVectors];

  __device__ __forceinline__ void Load(const T* row, int num_vectors) {
#pragma unroll
    for (int j = 0; j < kCachedVectors; ++j) {
      const int v = threadIdx.x + j * blockDim.x;
      if (v < num_vectors) words[j] = LoadWord<T, kWidth>(row + int64_t{kWidth} * v);
    }
  }
};

// Calls function(v, words...) for each vector of the thread, with its word in each of the rows.
template <typename T, int kWidth, typename Function>
__device__ __forceinline__ void ForEachVector(const CachedRow<T, kWidth>& cached, const T* row,
                                              int num_vectors, Function function) {
#pragma unroll
  for (int j = 0; j < kCachedVectors; ++j) {
    const int v = threadIdx.x + j * blockDim.x;
    if (v < num_vectors) function(v, cached.words[j]);
  }
  for (int v = threadIdx.x + kCachedVectors * blockDim.x; v < num_vectors; v += blockDim.x) {
    function(v, LoadWord<T, kWidth>(row + int64_t{kWidth} * v));
  }
}
template <typename T, int kWidth, typename Function>
__device__ __forceinline__ void ForEachVector(const CachedRow<T, kWidth>& a, const T* a_row,
                                              const CachedRow<T, kWidth>& b, const T* b_row,
                                              int num_vectors, Function function) {
#pragma unroll
  for (int j = 0; j < kCachedVectors; ++j) {
    const int v = threadIdx.x + j * blockDim.x;
    if (v < num_vectors) function(v, a.words[j], b.words[j]);
  }
  for (int v = threadIdx.x + kCachedVectors * blockDim.x; v < num_vectors; v += blockDim.x) {
    function(v, LoadWord<T, kWidth>(a_row + int64_t{kWidth} * v),
             LoadWord<T, kWidth>(b_row + int64_t{kWidth} * v));
  }
}

// --- Host.

struct RowPlan {
  dim3 block;
  unsigned blocks;
};

// As many warps as hold the row in registers; short rows share a block.
inline RowPlan PlanRows(int64_t rows, int64_t num_vectors) {
  const int64_t warps =
      std::clamp<int64_t>(CeilDiv(num_vectors, 32 * kCachedVectors), 1, kMaxRowWarps);
  const int64_t block_rows = std::max<int64_t>(1, 8 / warps);
  return {dim3(static_cast<unsigned>(32 * warps), static_cast<unsigned>(block_rows)),
          static_cast<unsigned>(CeilDiv(rows, block_rows))};
}

}  // namespace baleen::cuda
