// Epilogue of the indexer scores: sum_j w_j relu(a_j) over the heads of each query, from half of a
// tile's accumulator (64 keys x 128 columns = kQueries queries x heads; layout in wgmma_bf16.cuh),
// and its store. fp32 throughout; its 128 operations a thread share the register file's ports with
// the products that run beside them, and in fp8 that, not the tensor cores, sets the pace.
#pragma once

#include <cuda_runtime.h>

namespace baleen::indexer_scores {

constexpr int kHalfColumns = 128;
constexpr unsigned kAllLanes = 0xffffffffu;

// relu on one of two pipes: a maximum on the integer pipe (half rate), or x + |x| = 2 relu(x) on
// the fp32 pipe, exact, with the 2 taken back from the weight. In fp8 half of the groups of 8
// columns take the second way. Both let NaN through: it is reported at selection.
template <bool kFp8>
__device__ __forceinline__ constexpr bool AddRelu(int group) {
  return kFp8 && group % 4 < 2;
}
__device__ __forceinline__ float MaxWithZero(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}
template <bool kFp8>
__device__ __forceinline__ float Relu(float x, int group) {
  return AddRelu<kFp8>(group) ? x + fabsf(x) : MaxWithZero(x);
}

// Of the 4 lanes that share two rows (keys) of the accumulator, lane c = lane % 4 ends with one
// row, KeyOffset beyond the first. Join leaves it kKept queries of a half, numbers Query(i);
// JoinHalves all of half c / 2.
template <bool kFp8, int kQueries>
struct HeadSums {
  static constexpr int kKept = kQueries / 2;
  static constexpr int kGroups = kHalfColumns / 8 / kQueries;  // groups of 8 columns a query has
  float w[2][32];

  static __device__ int KeyOffset() { return threadIdx.x % 2 * 8; }
  static __device__ int Query(int i) { return threadIdx.x % 4 / 2 * kKept + i; }

  __device__ __forceinline__ void LoadWeights(const float* weights) {
    static_assert(!kFp8, "e4m3: LoadReady");
#pragma unroll
    for (int h = 0; h < 2; ++h) {
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int column = h * kHalfColumns + 8 * j + threadIdx.x % 4 * 2;
        const float2 pair = *reinterpret_cast<const float2*>(weights + column);
        w[h][2 * j] = pair.x;
        w[h][2 * j + 1] = pair.y;
      }
    }
  }

  // What a column's weight is multiplied by, see Relu.
  static __device__ float Share(int column) {
    return AddRelu<kFp8>(column % kHalfColumns / 8 % kGroups) ? 0.5f : 1.0f;
  }
  // `row`: this lane's weights with scales and shares, column pairs in order (PrepareWeights).
  __device__ __forceinline__ void LoadReady(const float* row) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float4 four = reinterpret_cast<const float4*>(row)[i];
      float* to = &w[i / 8][i % 8 * 4];
      to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
    }
  }

  // What a half's accumulator gives to this thread's sums of two rows (keys).
  template <int kHalf>
  __device__ __forceinline__ void Sum(const float (&d)[64], float (&sums)[2][kQueries]) const {
#pragma unroll
    for (int u = 0; u < kQueries; ++u) sums[0][u] = sums[1][u] = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int u = 0; u < kQueries; ++u) {
        const int j = u * kGroups + g;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          sums[0][u] = fmaf(w[kHalf][2 * j + e], Relu<kFp8>(d[4 * j + e], g), sums[0][u]);
          sums[1][u] = fmaf(w[kHalf][2 * j + e], Relu<kFp8>(d[4 * j + 2 + e], g), sums[1][u]);
        }
      }
    }
  }

  // Sum, then Join.
  template <int kHalf>
  __device__ __forceinline__ void SumJoined(const float (&d)[64], float (&kept)[kKept]) const {
    float sums[2][kQueries];
    Sum<kHalf>(d, sums);
    Join(sums, kept);
  }

  // Joins the sums of the four lanes, of both halves: lanes 0, 1 keep half 0, the others half 1.
  static __device__ __forceinline__ void JoinHalves(const float (&sums)[2][2][kQueries],
                                                    float (&kept)[kQueries]) {
    const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
#pragma unroll
    for (int u = 0; u < kQueries; ++u) {
      float half[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float keep = high ? sums[1][r][u] : sums[0][r][u];
        const float send = high ? sums[0][r][u] : sums[1][r][u];
        half[r] = keep + __shfl_xor_sync(kAllLanes, send, 2);
      }
      const float keep = odd ? half[1] : half[0], send = odd ? half[0] : half[1];
      kept[u] = keep + __shfl_xor_sync(kAllLanes, send, 1);
    }
  }

  // Joins the sums of the four lanes.
  static __device__ __forceinline__ void Join(const float (&sums)[2][kQueries],
                                              float (&kept)[kKept]) {
    const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      float half[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float keep = high ? sums[r][kKept + i] : sums[r][i];
        const float send = high ? sums[r][i] : sums[r][kKept + i];
        half[r] = keep + __shfl_xor_sync(kAllLanes, send, 2);
      }
      const float keep = odd ? half[1] : half[0], send = odd ? half[0] : half[1];
      kept[i] = keep + __shfl_xor_sync(kAllLanes, send, 1);
    }
  }
};

// What a thread knows of one query of the current block.
struct OutputRow {
  float* scores;
  int begin, length;  // of the window; 0 past the last row
};

template <int kKept>
__device__ __forceinline__ void Store(const float (&sums)[kKept], const OutputRow (&rows)[kKept],
                                      float scale, int key) {
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    if (static_cast<unsigned>(key - rows[i].begin) < static_cast<unsigned>(rows[i].length)) {
      __stcs(rows[i].scores + key, sums[i] * scale);
    }
  }
}

}  // namespace baleen::indexer_scores
