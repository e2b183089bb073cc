// The product of two small tiles by plain fp32 arithmetic, for kernels that take every shape:
//
//   sum[i][j] += sum over depth of a[row ty + 16 i] b[row tx + 16 j]
//
// 256 threads as 16 x 16 (ty = threadIdx.x / 16, tx = threadIdx.x % 16); a has 16 kA rows, b 16 kB.
// Depth is summed in ascending order, so a result does not depend on where its tile begins.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime_api.h>

namespace baleen::cuda {

inline constexpr int kTileThreads = 256;
inline constexpr int kTileDepth = 32;

__device__ __forceinline__ float AsFloat(float x) { return x; }
__device__ __forceinline__ float AsFloat(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void Assign(float& to, float x) { to = x; }
__device__ __forceinline__ void Assign(__nv_bfloat16& to, float x) { to = __float2bfloat16_rn(x); }

template <int kA, int kB>
struct ProductTiles {
  float a[kTileDepth][16 * kA + 1];
  float b[kTileDepth][16 * kB + 1];
};

// Which index of the tile lies side by side in memory, and so in the threads that load it.
enum class Contiguous { kDepth, kRow };

// load(row, depth) gives an element, 0 outside the matrix.
template <Contiguous kContiguous, int kRows, typename Load>
__device__ __forceinline__ void FillTile(float (&tile)[kTileDepth][kRows], Load load) {
  constexpr int kUsed = kRows - 1;
#pragma unroll
  for (int n = 0; n < kUsed * kTileDepth / kTileThreads; ++n) {
    const int i = threadIdx.x + n * kTileThreads;
    const int row = kContiguous == Contiguous::kDepth ? i / kTileDepth : i % kUsed;
    const int depth = kContiguous == Contiguous::kDepth ? i % kTileDepth : i / kUsed;
    tile[depth][row] = load(row, depth);
  }
}

// One step of the depth; the tiles may be filled anew afterwards.
template <Contiguous kContiguous, int kA, int kB, typename LoadA, typename LoadB>
__device__ __forceinline__ void AddTileProduct(ProductTiles<kA, kB>& tiles, LoadA load_a,
                                               LoadB load_b, float (&sum)[kA][kB]) {
  FillTile<kContiguous>(tiles.a, load_a);
  FillTile<kContiguous>(tiles.b, load_b);
  __syncthreads();
  const int ty = threadIdx.x / 16, tx = threadIdx.x % 16;
#pragma unroll 8
  for (int depth = 0; depth < kTileDepth; ++depth) {
    float a[kA], b[kB];
#pragma unroll
    for (int i = 0; i < kA; ++i) a[i] = tiles.a[depth][ty + 16 * i];
#pragma unroll
    for (int j = 0; j < kB; ++j) b[j] = tiles.b[depth][tx + 16 * j];
#pragma unroll
    for (int i = 0; i < kA; ++i) {
#pragma unroll
      for (int j = 0; j < kB; ++j) sum[i][j] += a[i] * b[j];
    }
  }
  __syncthreads();
}

}  // namespace baleen::cuda
