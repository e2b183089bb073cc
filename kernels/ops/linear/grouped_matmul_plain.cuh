// The grouped products in fp32 without tensor cores: fp32 operands (no TF32), and bf16 rows that
// are not whole 16-byte words. A block of 256 threads has tiles of 64 x 64, 16 of K at a time in
// shared memory; a thread has 4 x 4 elements and adds their products in the order of K.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/ops/linear/grouped_matmul_tiles.cuh"

namespace baleen::grouped_matmul {

inline constexpr int kPlainTile = 64;
inline constexpr int kPlainDepth = 16;
inline constexpr int kPlainThreads = 256;

template <typename T>
struct PlainParams {
  Extents extents;
  const T* left[2];
  const T* right[2];
  void* result;  // T, for kBackwardWeight float
  bool add;      // kBackwardWeight: to what the result holds
};

// Operands of one expert as strides: A(m, k) = a[m * a_m + k * a_k], B(k, n) = b[k * b_k + n *
// b_n].
template <typename T>
struct PlainOperands {
  const T *a, *b;
  int64_t a_m, a_k, b_k, b_n;
  int m, k;
};

template <GroupedProduct kProduct, typename T>
__device__ PlainOperands<T> OperandsOf(const PlainParams<T>& params, const Tile& tile, int pair) {
  const int64_t in = params.extents.in, out = params.extents.out, row = tile.row_begin;
  const T *const left = params.left[pair], *const right = params.right[pair];
  const T* const weight = right + tile.expert * in * out;
  if constexpr (kProduct == GroupedProduct::kForward) {
    return {left + row * in, weight, in, 1, 1, in, tile.rows, params.extents.in};
  } else if constexpr (kProduct == GroupedProduct::kBackwardWeight) {
    return {left + row * out, right + row * in, 1, out, in, 1, params.extents.out, tile.rows};
  } else {
    return {left + row * out, weight, out, 1, in, 1, tile.rows, params.extents.out};
  }
}

// sums (+)= the products of one pair for the 4 x 4 elements from (m, n) of the tile on.
template <typename T>
__device__ __forceinline__ void AddProducts(const PlainOperands<T>& operands, const Tile& tile,
                                            int columns, int thread_m, int thread_n,
                                            float (&sums)[4][4]) {
  __shared__ float a_KM[kPlainDepth][kPlainTile + 1], b_KN[kPlainDepth][kPlainTile + 1];
  for (int k0 = 0; k0 < operands.k; k0 += kPlainDepth) {
    for (int i = threadIdx.x; i < kPlainDepth * kPlainTile; i += kPlainThreads) {
      // Neighbouring threads read along whichever index is dense in memory.
      const bool a_along_k = operands.a_k == 1, b_along_k = operands.b_k == 1;
      const int ak = a_along_k ? i % kPlainDepth : i / kPlainTile;
      const int am = a_along_k ? i / kPlainDepth : i % kPlainTile;
      const int bk = b_along_k ? i % kPlainDepth : i / kPlainTile;
      const int bn = b_along_k ? i / kPlainDepth : i % kPlainTile;
      const bool a_inside = tile.m + am < operands.m && k0 + ak < operands.k;
      const bool b_inside = tile.n + bn < columns && k0 + bk < operands.k;
      a_KM[ak][am] = a_inside
                         ? static_cast<float>(
                               operands.a[(tile.m + am) * operands.a_m + (k0 + ak) * operands.a_k])
                         : 0.0f;
      b_KN[bk][bn] = b_inside
                         ? static_cast<float>(
                               operands.b[(k0 + bk) * operands.b_k + (tile.n + bn) * operands.b_n])
                         : 0.0f;
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kPlainDepth; ++k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sums[i][j] = fmaf(a_KM[k][thread_m + i], b_KN[k][thread_n + j], sums[i][j]);
        }
      }
    }
    __syncthreads();
  }
}

template <GroupedProduct kProduct, typename T>
__global__ void __launch_bounds__(kPlainThreads)
    GroupedPlainKernel(const __grid_constant__ PlainParams<T> params) {
  using Walk = TileWalk<kProduct, kPlainTile, kPlainTile>;
  const int columns = Walk::Columns(params.extents);
  const int thread_m = threadIdx.x / 16 * 4, thread_n = threadIdx.x % 16 * 4;
  Walk walk(params.extents);
  Tile tile;
  for (int index = blockIdx.x; walk.Seek(index, tile); index += gridDim.x) {
    const int rows = kProduct == GroupedProduct::kBackwardWeight ? params.extents.out : tile.rows;
    float sums[4][4] = {};
    for (int pair = 0; pair < kPairs<kProduct>; ++pair) {
      AddProducts(OperandsOf<kProduct>(params, tile, pair), tile, columns, thread_m, thread_n,
                  sums);
    }
    const int64_t first_row = kProduct == GroupedProduct::kBackwardWeight
                                  ? static_cast<int64_t>(tile.expert) * params.extents.out
                                  : tile.row_begin;
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) {
        const int m = tile.m + thread_m + i, n = tile.n + thread_n + j;
        if (m >= rows || n >= columns) continue;
        const int64_t at = (first_row + m) * columns + n;
        if constexpr (kProduct == GroupedProduct::kBackwardWeight) {
          float* const sum = static_cast<float*>(params.result) + at;
          *sum = params.add ? *sum + sums[i][j] : sums[i][j];
        } else {
          static_cast<T*>(params.result)[at] = static_cast<T>(sums[i][j]);
        }
      }
    }
  }
}

// dW of the experts without rows becomes zero: no tile of a product is theirs. A column of blocks
// an expert.
inline constexpr int kFillBlocks = 16;
__global__ void __launch_bounds__(kPlainThreads)
    FillWithoutRowsKernel(const __grid_constant__ Extents extents, float* dweight_LOI) {
  const int expert = blockIdx.y;
  if (RowsOf(extents, expert).count > 0) return;
  const int64_t count = static_cast<int64_t>(extents.out) * extents.in;
  float* const dweight = dweight_LOI + expert * count;
  for (int64_t i = blockIdx.x * kPlainThreads + threadIdx.x; i < count;
       i += kFillBlocks * kPlainThreads) {
    dweight[i] = 0;
  }
}

}  // namespace baleen::grouped_matmul
