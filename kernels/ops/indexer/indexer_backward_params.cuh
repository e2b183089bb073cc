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
#include "kernels/ops/indexer/indexer_backward_cuda.h"

namespace baleen::indexer_backward {

constexpr int kDim = 128;   // J
constexpr int kHeads = 64;  // heads of a tile; fewer are padded with zeros
constexpr int kTileKeys = 64;
constexpr int kRunBytes = 64 * 128;        // 64 lines of 128 bytes: half of a [64, 128] bf16 tile
constexpr int kTileBytes = 2 * kRunBytes;  // [64, 128] bf16
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kGroupRows = 4;  // neighbouring rows that go together

// The union of a group's lists. A slot is a key and the set of rows that have it (4 bits, never 0,
// but in the padding of the last tile). Slots of one set stand together, so slot i of set m has its
// deltas, one a row of the set in the rows' order, from first_delta[m] + i * popc(m) on.
struct Group {
  int first_delta[16];
  int num_tiles;  // of 64 slots, at least 1
  int unused[15];
};
constexpr int kSetShift = 28;  // slot = key | set << 28
constexpr int kKeyMask = (1 << kSetShift) - 1;

struct Params {
  IndexerBackwardArgs args;
  int num_groups;
  int num_slots;               // room in a group: K * kGroupRows, whole tiles
  float* bound_T;              // c[t]
  unsigned* largest_bound;     // bits of max_t c[t]
  float* scores_TK;            // computed here, unless the caller gave them
  unsigned long long* mass_S;  // sum of |delta| c[t] in units of 2^(bound exponent - 32)
  Group* groups;               // [groups]
  int* slots;                  // [groups, num_slots]
  float* deltas;               // [groups, K * kGroupRows]: pi P - p, not scaled by g; on scores_TK
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

// The marks hold w, and dw divides by it, so no w may be 0: one below 2^-32 of the row's largest
// (or 2^-100) counts as that. Its head adds no more to dk than the rounding of another.
__device__ __forceinline__ float SmallestWeight(float largest) {
  return fmaxf(largest * 0x1p-32f, 0x1p-100f);
}
__device__ __forceinline__ float UsedWeight(float w, float smallest) {
  return fabsf(w) < smallest ? smallest : w;
}

// One warp: the largest |w| of a row's heads.
__device__ __forceinline__ float LargestWeight(const float* w, int num_heads) {
  const int lane = threadIdx.x % 32;
  float largest = fabsf(__ldg(w + lane));
  if (num_heads > 32) largest = fmaxf(largest, fabsf(__ldg(w + lane + 32)));
  return __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(largest)));
}

}  // namespace baleen::indexer_backward
