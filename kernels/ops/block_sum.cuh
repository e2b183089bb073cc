// Sums over the 256 threads of a block in a fixed order, for kernels that give a block a row.
#pragma once

#include <cuda_runtime_api.h>

namespace baleen::cuda {

inline constexpr int kBlockSumThreads = 256;

// Combines the threads' values, the same bits in each of them; all threads of the block call it.
template <typename T, typename Combine>
__device__ __forceinline__ T BlockCombine(T value, Combine combine) {
  constexpr int kWarps = kBlockSumThreads / 32;
  __shared__ T shared[kWarps];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = combine(value, __shfl_xor_sync(~0u, value, offset));
  }
  __syncthreads();  // the values of an earlier call have been read
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = shared[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) value = combine(value, shared[warp]);
  return value;
}

template <typename T>
__device__ __forceinline__ T BlockSum(T value) {
  return BlockCombine(value, [](T a, T b) { return a + b; });
}

}  // namespace baleen::cuda
