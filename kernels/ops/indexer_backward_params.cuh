// What the kernels of the indexer backward share; included by indexer_backward_cuda.cu alone, whose
// head tells the story.
#pragma once

#include <cuda_bf16.h>

#include <climits>
#include <cstdint>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/ops/indexer_backward_cuda.h"

namespace baleen::indexer_backward {

constexpr int kDim = 128;   // J
constexpr int kHeads = 64;  // heads of a tile; fewer are padded with zeros
constexpr int kTileKeys = 64;
constexpr int kRunBytes = 64 * 128;        // 64 lines of 128 bytes: half of a [64, 128] bf16 tile
constexpr int kTileBytes = 2 * kRunBytes;  // [64, 128] bf16
constexpr unsigned kAllLanes = 0xffffffffu;

struct Params {
  IndexerBackwardArgs args;
  int num_tiles;               // tiles of 64 keys in a row
  float* bound_T;              // c[t]
  unsigned* largest_bound;     // bits of max_t c[t]
  float* delta_TK;             // pi P - p, not scaled by g
  unsigned long long* mass_S;  // sum of |delta| c[t] in units of 2^(bound exponent - 32)
  int* ids_TK;       // ids with the pairs' shared keys first; delta_TK follows the same order
  int* joint_tiles;  // [pairs] tiles that both rows of a pair have in common
  int* exponent_S;
  int* sum_SJ;
};

__device__ __forceinline__ float2 UnpackBf16(uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u)};
}

// A power of two above every c[t], as an exponent; not so small that its scales leave fp32's range.
__device__ __forceinline__ int BoundExponent(const Params& params) {
  const unsigned bits = *params.largest_bound;
  return max(-90, static_cast<int>(bits >> 23) - 126);  // c >= 0 is below 2^(exponent field - 126)
}

__device__ __forceinline__ float PowerOfTwo(int exponent) {
  return __int_as_float((min(127, max(-126, exponent)) + 127) << 23);
}

}  // namespace baleen::indexer_backward
