// Indexer backward, kernels 1 and 2: the bound c[t] of a row's contributions and the scores of its
// keys. See indexer_backward_cuda.cu.
#pragma once

#include "kernels/ops/indexer/indexer_backward_params.cuh"

namespace baleen::indexer_backward {

// --- 1. Bound ------------------------------------------------------------------------------------

constexpr int kBoundThreads = 128;

__global__ void __launch_bounds__(kBoundThreads) BoundKernel(const Params params) {
  __shared__ float partial[8][kDim];
  const IndexerBackwardArgs& args = params.args;
  const int64_t row = blockIdx.x;
  const int chunk = threadIdx.x % 16, group = threadIdx.x / 16;
  const uint4* q = static_cast<const uint4*>(args.q_TIJ) + row * args.num_heads * 16;
  const float smallest =
      SmallestWeight(LargestWeight(args.w_TI + row * args.num_heads, args.num_heads));
  float sum[8] = {};
  for (int head = group; head < args.num_heads; head += 8) {
    const uint4 x = __ldg(q + head * 16 + chunk);
    const float w = fabsf(UsedWeight(__ldg(args.w_TI + row * args.num_heads + head), smallest));
    const uint32_t pairs[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 pair = UnpackBf16(pairs[e]);
      sum[2 * e] += w * fabsf(pair.x);
      sum[2 * e + 1] += w * fabsf(pair.y);
    }
  }
#pragma unroll
  for (int e = 0; e < 8; ++e) partial[group][chunk * 8 + e] = sum[e];
  __syncthreads();
  float total = 0;
  for (int g = 0; g < 8; ++g) total += partial[g][threadIdx.x];
  total *= 1.01f;  // delta, w and their product are rounded to bf16
  total = __uint_as_float(__reduce_max_sync(kAllLanes, __float_as_uint(total)));
  __shared__ float highest[4];
  if (threadIdx.x % 32 == 0) highest[threadIdx.x / 32] = total;
  __syncthreads();
  if (threadIdx.x == 0) {
    const float bound = fmaxf(fmaxf(highest[0], highest[1]), fmaxf(highest[2], highest[3]));
    params.bound_T[row] = bound;
    atomicMax(params.largest_bound, __float_as_uint(bound));
  }
}

// --- 2. Scores -----------------------------------------------------------------------------------

constexpr int kScoreThreads = 256;
constexpr int kScoreStages = 2;  // tiles of keys in flight or in use, of each of two warpgroups

struct ScoreShared {
  uint8_t q[kTileBytes];
  uint8_t keys[2][kScoreStages][kTileBytes];
  float scores[kIndexerBackwardMaxK];
  int ids[kIndexerBackwardMaxK];
};

__device__ __forceinline__ void LoadScoreQ(ScoreShared& sh, const IndexerBackwardArgs& args,
                                           int64_t row) {
  const uint4* q = static_cast<const uint4*>(args.q_TIJ) + row * args.num_heads * 16;
#pragma unroll
  for (int i = 0; i < kHeads * 16 / kScoreThreads; ++i) {
    const int at = i * kScoreThreads + threadIdx.x, run = at / 512, head = at % 512 / 8,
              chunk = at % 8;
    const bool valid = head < args.num_heads;
    cuda::CopyAsync16(
        cuda::SharedAddress(sh.q) + run * kRunBytes + cuda::SwizzledOffset(head, chunk),
        q + (valid ? head * 16 + run * 8 + chunk : 0), valid);
  }
}

// Asks for one tile of a warpgroup's keys; past the last tile it asks for nothing, but still closes
// a group.
__device__ __forceinline__ void LoadScoreKeys(ScoreShared& sh, const void* k, int tile, int tiles,
                                              uint32_t stage) {
  if (tile < tiles) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = i * 128 + threadIdx.x % 128, run = at / 512, line = at % 512 / 8,
                chunk = at % 8;
      const int id = sh.ids[tile * kTileKeys + line];
      cuda::CopyAsync16(
          stage + run * kRunBytes + cuda::SwizzledOffset(line, chunk),
          static_cast<const uint4*>(k) + static_cast<int64_t>(max(id, 0)) * 16 + run * 8 + chunk,
          id >= 0);
    }
  }
  cuda::CopyAsyncCommit();
}

// Weighted sum over heads of one tile's products; a thread's columns are heads 8 j + 2 (lane % 4)
// (+ 1).
__device__ __forceinline__ void StoreScores(ScoreShared& sh, const float (&a)[32],
                                            const float (&w)[16], int tile) {
  float low = 0, high = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      low = fmaf(w[2 * j + e], fmaxf(a[4 * j + e], 0.0f), low);
      high = fmaf(w[2 * j + e], fmaxf(a[4 * j + 2 + e], 0.0f), high);
    }
  }
#pragma unroll
  for (int step = 1; step < 4; step *= 2) {
    low += __shfl_xor_sync(kAllLanes, low, step);
    high += __shfl_xor_sync(kAllLanes, high, step);
  }
  const int lane = threadIdx.x % 32,
            row = tile * kTileKeys + threadIdx.x % 128 / 32 * 16 + lane / 4;
  if (lane % 4 == 0) {
    sh.scores[row] = low;
    sh.scores[row + 8] = high;
  }
}

// Scores of all chosen keys of the row: warpgroup g takes tiles g, g + 2, ...
__device__ void ComputeScores(ScoreShared& sh, const Params& params, int64_t row) {
  const IndexerBackwardArgs& args = params.args;
  const int group = threadIdx.x / 128, tiles = (args.topk + kTileKeys - 1) / kTileKeys;
  const uint32_t q = cuda::SharedAddress(sh.q), stages = cuda::SharedAddress(sh.keys[group]);
  LoadScoreQ(sh, args, row);
  for (int i = 0; i < kScoreStages; ++i) {
    LoadScoreKeys(sh, args.k_SJ, group + 2 * i, tiles, stages + i * kTileBytes);
  }
  float w[16];
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const int head = n / 2 * 8 + threadIdx.x % 4 * 2 + n % 2;
    w[n] = head < args.num_heads ? __ldg(args.w_TI + row * args.num_heads + head) : 0.0f;
  }
  cuda::CopyAsyncWait<kScoreStages - 1>();
  cuda::FenceProxyAsync();
  __syncthreads();  // q is there for both warpgroups
  for (int tile = group, n = 0; tile < tiles; tile += 2, ++n) {
    const uint32_t keys = stages + n % kScoreStages * kTileBytes;
    cuda::CopyAsyncWait<kScoreStages - 1>();
    cuda::FenceProxyAsync();
    cuda::NamedSync(1 + group, 128);
    float a[32];
    cuda::WgmmaFence();
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      const uint32_t offset = step / 4 * kRunBytes + step % 4 * 32;
      cuda::WgmmaBf16<kHeads, false, false>::Shared(a, cuda::DescriptorKMajor(keys + offset),
                                                    cuda::DescriptorKMajor(q + offset), step > 0);
    }
    cuda::WgmmaCommit();
    cuda::WgmmaWait<0>();
    cuda::PinRegisters(a);
    cuda::NamedSync(1 + group, 128);  // all have read the stage
    LoadScoreKeys(sh, args.k_SJ, tile + 2 * kScoreStages, tiles, keys);
    StoreScores(sh, a, w, tile);
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kScoreThreads, 2) ScoreKernel(const Params params) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  ScoreShared& sh = *reinterpret_cast<ScoreShared*>(raw_shared);
  const int64_t row = int64_t{blockIdx.x} * params.args.topk;
  for (int i = threadIdx.x; i < kIndexerBackwardMaxK; i += kScoreThreads) {
    sh.ids[i] = i < params.args.topk ? __ldg(params.args.ids_TK + row + i) : -1;
  }
  __syncthreads();
  ComputeScores(sh, params, blockIdx.x);
  for (int i = threadIdx.x; i < params.args.topk; i += kScoreThreads) {
    params.scores_TK[row + i] = sh.scores[i];
  }
}

}  // namespace baleen::indexer_backward
