// How a warp's part of a tile leaves its registers: the accumulator of wgmma m64n256, 16 rows of
// 256 columns a warp (layout: wgmma_bf16.cuh). `row` is the first row of the result, `rows` how
// many of the 16 exist (may be below 1), `n` the first column, `columns` the result's width, a
// multiple of 8.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/warp.cuh"

namespace baleen::grouped_matmul {

inline constexpr int kWarpOutput = 4096;  // bytes of shared memory a warp turns its rows in

// To bf16 rows, through `buffer`: half of the columns at a time.
__device__ __forceinline__ void StoreBf16(const float (&d)[128], uint32_t buffer,
                                          __nv_bfloat16* result, int64_t row, int rows, int n,
                                          int columns) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    // Chunk c (8 columns) of row r lies at c ^ (r % 8): neither side has bank conflicts.
    const int own_row = lane & 15;
#pragma unroll
    for (int j = 0; j < 16; j += 2) {
      const float* const v = d + half * 64 + 4 * j;
      const int chunk = j + (lane >> 4);
      cuda::StoreMatrix4(buffer + own_row * 256 + ((chunk ^ (own_row & 7)) << 4),
                         cuda::PackBf16(v[0], v[1]), cuda::PackBf16(v[2], v[3]),
                         cuda::PackBf16(v[4], v[5]), cuda::PackBf16(v[6], v[7]));
    }
    __syncwarp();
    const int chunk = lane & 15, column = n + half * 128 + chunk * 8;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int r = 2 * i + (lane >> 4);
      uint32_t words[4];
      cuda::LoadShared16(buffer + r * 256 + ((chunk ^ (r & 7)) << 4), words);
      if (r < rows && column < columns) {
        *reinterpret_cast<uint4*>(result + (row + r) * columns + column) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
    __syncwarp();
  }
}

// Added to fp32 rows, or, with `add` false, to zero.
__device__ __forceinline__ void AddF32(const float (&d)[128], float* result, int64_t row, int rows,
                                       int n, int columns, bool add) {
  const int lane = threadIdx.x & 31;
  constexpr int kBatch = 8;  // blocks of 8 columns whose loads are in flight together
#pragma unroll
  for (int first = 0; first < 256 / 8; first += kBatch) {
    float2 values[kBatch][2] = {};
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int column = n + (first + j) * 8 + (lane & 3) * 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = lane / 4 + 8 * h;
        if (add && r < rows && column < columns) {
          values[j][h] = __ldcg(reinterpret_cast<float2*>(result + (row + r) * columns + column));
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int column = n + (first + j) * 8 + (lane & 3) * 2;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int r = lane / 4 + 8 * h;
        if (r < rows && column < columns) {
          const float* const v = d + 4 * (first + j) + 2 * h;
          *reinterpret_cast<float2*>(result + (row + r) * columns + column) =
              make_float2(values[j][h].x + v[0], values[j][h].y + v[1]);
        }
      }
    }
  }
}

}  // namespace baleen::grouped_matmul
