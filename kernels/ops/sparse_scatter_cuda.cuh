// Scatter-add of selected rows in a fixed order: dkv[ids[t, k]] += row(t, k), summed over t
// ascending.
//
// For a chunk of queries a bit mask per key tells which of them chose it. Its running popcount
// gives each (t, k) a place in a workspace sorted by key, where the producer of row(t, k) stores
// it; the rows of a key then lie side by side and one pass adds them in the order of t. Where a
// key's run starts is decided by an atomic and may differ between calls; no sum depends on it.
//   masks_WS, ranks_WS: W = ceil(chunk / 32) words a key;  starts_S, counts_S.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/warp.cuh"

namespace baleen::cuda {

struct ScatterIndex {
  uint32_t* masks_WS;  // bit t % 32 of word t / 32: query t of the chunk chose key s
  int32_t* ranks_WS;   // how many queries before word w chose key s
  int32_t* starts_S;   // first row of key s in the sorted workspace
  int32_t* counts_S;
  int32_t* cursor;  // rows handed out so far
  int num_keys;
};

// The sorted place of the contribution of query `t` (in the chunk) to key `s`.
__device__ __forceinline__ int ScatterPlace(const ScatterIndex& index, int t, int s) {
  const size_t word = size_t(t >> 5) * index.num_keys + s;
  const uint32_t before = (1u << (t & 31)) - 1;
  return index.starts_S[s] + index.ranks_WS[word] + __popc(index.masks_WS[word] & before);
}

__global__ void MarkSelectedKernel(ScatterIndex index, const int32_t* ids_TK, int num_rows,
                                   int num_selected) {
  const int t = blockIdx.x;
  if (t >= num_rows) return;
  for (int k = threadIdx.x; k < num_selected; k += blockDim.x) {
    const int s = ids_TK[size_t(t) * num_selected + k];
    if (s >= 0) atomicOr(&index.masks_WS[size_t(t >> 5) * index.num_keys + s], 1u << (t & 31));
  }
}

// One thread a key: ranks of the words, count, and a place for its run.
__global__ void RankSelectedKernel(ScatterIndex index, int num_words) {
  const int s = blockIdx.x * blockDim.x + threadIdx.x;
  int count = 0;
  if (s < index.num_keys) {
#pragma unroll 8
    for (int w = 0; w < num_words; ++w) {
      const size_t word = size_t(w) * index.num_keys + s;
      index.ranks_WS[word] = count;
      count += __popc(__ldg(&index.masks_WS[word]));  // constant here: loads run ahead of stores
    }
  }
  // One atomic a warp: inclusive scan of the counts over the lanes.
  const int lane = threadIdx.x & 31;
  int scan = count;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, scan, step);
    if (lane >= step) scan += other;
  }
  int base = 0;
  if (lane == 31) base = atomicAdd(index.cursor, scan);
  base = __shfl_sync(~0u, base, 31);
  if (s < index.num_keys) {
    index.starts_S[s] = base + scan - count;
    index.counts_S[s] = count;
  }
}

// dkv[s] += the rows of key s, each place holding `rows_per_place` bf16 rows of kColumns. A row is
// stored in 16-byte pieces: piece x holds columns 32 (x / 4) + 2 (x % 4) + {0, 1} + 8 {0, 1, 2, 3},
// the way the accumulators of the matrix unit lie. kSplit groups of threads take every kSplit-th
// row and are added in order.
template <int kColumns, int kSplit>
__global__ void __launch_bounds__(kColumns / 8 * kSplit)
    SumSortedRowsKernel(ScatterIndex index, const uint4* rows, int rows_per_place, float* dkv_SC) {
  constexpr int kPieces = kColumns / 8;
  constexpr int kInFlight = 4;
  __shared__ float partial[kSplit][8][kPieces];
  const int piece = threadIdx.x % kPieces;
  const int split = threadIdx.x / kPieces;
  for (int s = blockIdx.x; s < index.num_keys; s += gridDim.x) {
    const int count = index.counts_S[s] * rows_per_place;
    if (count == 0) continue;
    const uint4* run = rows + size_t(index.starts_S[s]) * rows_per_place * kPieces + piece;
    float sum[8] = {};
    auto add = [&](const uint4& packed) {
      const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[2 * j] += LowBf16(words[j]);
        sum[2 * j + 1] += HighBf16(words[j]);
      }
    };
    int row = split;
    for (; row + (kInFlight - 1) * kSplit < count; row += kInFlight * kSplit) {
      uint4 loaded[kInFlight];
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) {
        loaded[u] = __ldcs(run + size_t(row + u * kSplit) * kPieces);
      }
#pragma unroll
      for (int u = 0; u < kInFlight; ++u) add(loaded[u]);
    }
    for (; row < count; row += kSplit) add(__ldcs(run + size_t(row) * kPieces));

#pragma unroll
    for (int j = 0; j < 8; ++j) partial[split][j][piece] = sum[j];
    __syncthreads();
    // Thread x of the first half takes pairs of columns: pair p of piece x % kPieces.
    for (int pair = threadIdx.x; pair < 4 * kPieces; pair += blockDim.x) {
      const int j = pair / kPieces, x = pair % kPieces;
      float low = 0, high = 0;
#pragma unroll
      for (int u = 0; u < kSplit; ++u) {
        low += partial[u][2 * j][x];
        high += partial[u][2 * j + 1][x];
      }
      float2* out = reinterpret_cast<float2*>(dkv_SC + size_t(s) * kColumns + 32 * (x / 4) + 8 * j +
                                              2 * (x % 4));
      const float2 old = *out;
      *out = make_float2(old.x + low, old.y + high);
    }
    __syncthreads();
  }
}

// dkv += scratch, whose rows lie in groups of 16 columns permuted so that float 4 q + {0, 1, 2, 3}
// of group g holds columns 16 g + 2 q + {0, 1, 8, 9}.
template <int kColumns>
__global__ void AddPermutedKernel(const float4* scratch, float* dkv_SC, size_t num_pieces) {
  const size_t i = blockIdx.x * size_t(blockDim.x) + threadIdx.x;
  if (i >= num_pieces) return;
  const size_t row = i / (kColumns / 4);
  const int piece = int(i % (kColumns / 4));
  const float4 value = scratch[i];
  float* out = dkv_SC + row * kColumns + 16 * (piece / 4) + 2 * (piece % 4);
  float2* low = reinterpret_cast<float2*>(out);
  float2* high = reinterpret_cast<float2*>(out + 8);
  *low = make_float2(low->x + value.x, low->y + value.y);
  *high = make_float2(high->x + value.z, high->y + value.w);
}

}  // namespace baleen::cuda
