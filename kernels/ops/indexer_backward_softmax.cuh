// Indexer backward, kernels 1 to 3: the bound c[t] of a row's contributions, the softmax of a row's
// scores with loss, delta and mass, and the lists of two neighbouring rows with their shared keys
// first. See indexer_backward_cuda.cu.
#pragma once

#include "kernels/ops/indexer_backward_params.cuh"

namespace baleen::indexer_backward {

// --- 1. Bound ------------------------------------------------------------------------------------

constexpr int kBoundThreads = 128;

__global__ void __launch_bounds__(kBoundThreads) BoundKernel(const Params params) {
  __shared__ float partial[8][kDim];
  const IndexerBackwardArgs& args = params.args;
  const int64_t row = blockIdx.x;
  const int chunk = threadIdx.x % 16, group = threadIdx.x / 16;
  const uint4* q = static_cast<const uint4*>(args.q_TIJ) + row * args.num_heads * 16;
  float sum[8] = {};
  for (int head = group; head < args.num_heads; head += 8) {
    const uint4 x = __ldg(q + head * 16 + chunk);
    const float w = fabsf(__ldg(args.w_TI + row * args.num_heads + head));
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
  total *= 1.01f;  // w is rounded to bf16 in the products
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

// --- 2. Softmax ----------------------------------------------------------------------------------

constexpr int kSoftmaxThreads = 256;
constexpr int kPerThread = kIndexerBackwardMaxK / kSoftmaxThreads;
constexpr int kSoftmaxStages =
    2;  // tiles of keys in flight or in use, of each of the two warpgroups

struct SoftmaxRow {
  int ids[kIndexerBackwardMaxK];
  float warp_values[4][kSoftmaxThreads / 32];
};

struct SoftmaxShared {
  uint8_t q[kTileBytes];
  uint8_t keys[2][kSoftmaxStages][kTileBytes];
  float scores[kIndexerBackwardMaxK];
  SoftmaxRow row;
};

__device__ __forceinline__ void LoadSoftmaxQ(SoftmaxShared& sh, const IndexerBackwardArgs& args,
                                             int64_t row) {
  const uint4* q = static_cast<const uint4*>(args.q_TIJ) + row * args.num_heads * 16;
#pragma unroll
  for (int i = 0; i < kHeads * 16 / kSoftmaxThreads; ++i) {
    const int at = i * kSoftmaxThreads + threadIdx.x, run = at / 512, head = at % 512 / 8,
              chunk = at % 8;
    const bool valid = head < args.num_heads;
    cuda::CopyAsync16(
        cuda::SharedAddress(sh.q) + run * kRunBytes + cuda::SwizzledOffset(head, chunk),
        q + (valid ? head * 16 + run * 8 + chunk : 0), valid);
  }
}

// Asks for one tile of a warpgroup's keys; past the last tile it asks for nothing, but still closes
// a group.
__device__ __forceinline__ void LoadSoftmaxKeys(SoftmaxShared& sh, const void* k, int tile,
                                                int tiles, uint32_t stage) {
  if (tile < tiles) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int at = i * 128 + threadIdx.x % 128, run = at / 512, line = at % 512 / 8,
                chunk = at % 8;
      const int id = sh.row.ids[tile * kTileKeys + line];
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
__device__ __forceinline__ void StoreScores(SoftmaxShared& sh, const float (&a)[32],
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
__device__ void ComputeScores(SoftmaxShared& sh, const Params& params, int64_t row) {
  const IndexerBackwardArgs& args = params.args;
  const int group = threadIdx.x / 128, tiles = params.num_tiles;
  const uint32_t q = cuda::SharedAddress(sh.q), stages = cuda::SharedAddress(sh.keys[group]);
  LoadSoftmaxQ(sh, args, row);
  for (int i = 0; i < kSoftmaxStages; ++i) {
    LoadSoftmaxKeys(sh, args.k_SJ, group + 2 * i, tiles, stages + i * kTileBytes);
  }
  float w[16];
#pragma unroll
  for (int n = 0; n < 16; ++n) {
    const int head = n / 2 * 8 + threadIdx.x % 4 * 2 + n % 2;
    w[n] = head < args.num_heads ? __ldg(args.w_TI + row * args.num_heads + head) : 0.0f;
  }
  cuda::CopyAsyncWait<kSoftmaxStages - 1>();
  cuda::FenceProxyAsync();
  __syncthreads();  // q is there for both warpgroups
  for (int tile = group, n = 0; tile < tiles; tile += 2, ++n) {
    const uint32_t keys = stages + n % kSoftmaxStages * kTileBytes;
    cuda::CopyAsyncWait<kSoftmaxStages - 1>();
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
    LoadSoftmaxKeys(sh, args.k_SJ, tile + 2 * kSoftmaxStages, tiles, keys);
    StoreScores(sh, a, w, tile);
  }
  __syncthreads();
}

template <class Combine>
__device__ float BlockReduce(SoftmaxRow& sh, int slot, float value, Combine combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  if (threadIdx.x % 32 == 0) sh.warp_values[slot][threadIdx.x / 32] = value;
  __syncthreads();
  value = sh.warp_values[slot][0];
#pragma unroll
  for (int i = 1; i < kSoftmaxThreads / 32; ++i) value = combine(value, sh.warp_values[slot][i]);
  return value;
}

// Loss, delta and mass of the row from its scores (shared or global memory).
__device__ void FinishSoftmax(SoftmaxRow& sh, const float* scores, const Params& params,
                              int64_t row) {
  const IndexerBackwardArgs& args = params.args;
  const auto add = [](float a, float b) { return a + b; };
  float score[kPerThread], p[kPerThread], highest = -INFINITY, p_sum = 0, loss = 0;
#pragma unroll
  for (int n = 0; n < kPerThread; ++n) {
    const int i = n * kSoftmaxThreads + threadIdx.x;
    const bool valid = i < args.topk && sh.ids[i] >= 0;
    score[n] = -INFINITY;
    if (valid) score[n] = scores[i];
    p[n] = valid ? args.target_scale * __ldcs(args.target_TK + row * args.topk + i) : 0.0f;
    highest = fmaxf(highest, score[n]);
    p_sum += p[n];
    if (p[n] > 0) loss += p[n] * (logf(p[n]) - score[n]);
  }
  highest = BlockReduce(sh, 0, highest, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kPerThread; ++n)
    sum += score[n] > -INFINITY ? __expf(score[n] - highest) : 0.0f;
  sum = BlockReduce(sh, 1, sum, add);
  p_sum = BlockReduce(sh, 2, p_sum, add);
  loss = BlockReduce(sh, 3, loss, add);
  if (threadIdx.x == 0) args.loss_T[row] = sum > 0 ? loss + p_sum * (highest + logf(sum)) : 0.0f;
  const float pi_scale = sum > 0 ? p_sum / sum : 0.0f;
  const float bound = params.bound_T[row], unit = PowerOfTwo(32 - BoundExponent(params));
#pragma unroll
  for (int n = 0; n < kPerThread; ++n) {
    const int i = n * kSoftmaxThreads + threadIdx.x;
    if (i >= args.topk) continue;
    const bool valid = score[n] > -INFINITY;
    const float delta = valid ? __expf(score[n] - highest) * pi_scale - p[n] : 0.0f;
    params.delta_TK[row * args.topk + i] = delta;
    if (delta != 0)
      atomicAdd(&params.mass_S[sh.ids[i]],
                __float2ull_ru(__fmul_ru(fabsf(delta), bound) * unit) + 1);
  }
}

__device__ __forceinline__ void LoadIds(SoftmaxRow& sh, const Params& params, int64_t row) {
  for (int i = threadIdx.x; i < params.num_tiles * kTileKeys; i += kSoftmaxThreads) {
    sh.ids[i] = i < params.args.topk ? __ldg(params.args.ids_TK + row * params.args.topk + i) : -1;
  }
  __syncthreads();
}

__global__ void __launch_bounds__(kSoftmaxThreads, 2) SoftmaxKernel(const Params params) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  SoftmaxShared& sh = *reinterpret_cast<SoftmaxShared*>(raw_shared);
  LoadIds(sh.row, params, blockIdx.x);
  ComputeScores(sh, params, blockIdx.x);
  FinishSoftmax(sh.row, sh.scores, params, blockIdx.x);
}

// The same from the caller's scores.
__global__ void __launch_bounds__(kSoftmaxThreads) GivenSoftmaxKernel(const Params params) {
  __shared__ SoftmaxRow sh;
  LoadIds(sh, params, blockIdx.x);
  FinishSoftmax(sh, params.args.scores_TK + int64_t{blockIdx.x} * params.args.topk, params,
                blockIdx.x);
}

// --- 3. Pair
// --------------------------------------------------------------------------------------

constexpr int kPairThreads = 256;
constexpr int kPairWarps = kPairThreads / 32;
constexpr int kPairPerThread =
    kIndexerBackwardMaxK / kPairThreads;            // entries n * kPairThreads + thread
constexpr int kPieces = kIndexerBackwardMaxK / 32;  // of 32 entries: piece n * kPairWarps + warp

struct PairShared {
  int ids[2][kIndexerBackwardMaxK];       // ascending, padded with INT_MAX
  uint8_t matched[kIndexerBackwardMaxK];  // of row 1
  int before[2][kPieces + 1];             // matches of a row in the pieces before one; last: in all
};

// The place of `id` in row 1 of the pair, or -1.
__device__ __forceinline__ int FindId(const PairShared& sh, int id) {
  int low = 0;
#pragma unroll
  for (int step = kIndexerBackwardMaxK / 2; step > 0; step /= 2) {
    if (sh.ids[1][low + step - 1] < id) low += step;
  }
  return sh.ids[1][low] == id ? low : -1;
}

// Turns the counts of each row's pieces into the counts before them. Warp r does row r.
__device__ __forceinline__ void ScanPieces(PairShared& sh) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp >= 2) return;
  const int first = sh.before[warp][2 * lane], sum = first + sh.before[warp][2 * lane + 1];
  int inclusive = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  __syncwarp();
  sh.before[warp][2 * lane] = inclusive - sum;
  sh.before[warp][2 * lane + 1] = inclusive - sum + first;
  if (lane == 31) sh.before[warp][kPieces] = inclusive;
}

__global__ void __launch_bounds__(kPairThreads) PairKernel(const Params params) {
  __shared__ PairShared sh;
  const IndexerBackwardArgs& args = params.args;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t first_row = 2 * int64_t{blockIdx.x};
  float delta[2][kPairPerThread];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t row = first_row + r;
#pragma unroll
    for (int n = 0; n < kPairPerThread; ++n) {
      const int i = n * kPairThreads + threadIdx.x;
      const bool present = row < args.num_rows && i < args.topk;
      const int id = present ? __ldg(args.ids_TK + row * args.topk + i) : -1;
      delta[r][n] = present ? params.delta_TK[row * args.topk + i] : 0.0f;
      sh.ids[r][i] = id < 0 ? INT_MAX : id;
      sh.matched[i] = 0;
    }
  }
  __syncthreads();
  bool ascending = true;
  for (int r = 0; r < 2; ++r) {
    for (int i = threadIdx.x; i + 1 < kIndexerBackwardMaxK; i += kPairThreads) {
      ascending &= sh.ids[r][i] < sh.ids[r][i + 1] || sh.ids[r][i + 1] == INT_MAX;
    }
  }
  // Lists that are not ascending are left as they are: right, but every key is added twice.
  ascending = __syncthreads_and(ascending);

  // Which entries of each row the other row has too, and how many in each piece.
  unsigned matches[2][kPairPerThread];
#pragma unroll
  for (int n = 0; n < kPairPerThread; ++n) {
    const int id = sh.ids[0][n * kPairThreads + threadIdx.x];
    const int found = ascending && id != INT_MAX ? FindId(sh, id) : -1;
    if (found >= 0) sh.matched[found] = 1;
    matches[0][n] = __ballot_sync(kAllLanes, found >= 0);
    if (lane == 0) sh.before[0][n * kPairWarps + warp] = __popc(matches[0][n]);
  }
  __syncthreads();
#pragma unroll
  for (int n = 0; n < kPairPerThread; ++n) {
    matches[1][n] = __ballot_sync(kAllLanes, sh.matched[n * kPairThreads + threadIdx.x] != 0);
    if (lane == 0) sh.before[1][n * kPairWarps + warp] = __popc(matches[1][n]);
  }
  __syncthreads();
  ScanPieces(sh);
  __syncthreads();

  // Shared entries go to the front in their order, the others behind them in theirs.
  const int shared = sh.before[0][kPieces];
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int n = 0; n < kPairPerThread; ++n) {
      const int i = n * kPairThreads + threadIdx.x;
      const int rank =
          sh.before[r][n * kPairWarps + warp] + __popc(matches[r][n] & ((1u << lane) - 1));
      const bool match = matches[r][n] >> lane & 1;
      if (first_row + r < args.num_rows && i < args.topk) {
        const int64_t place = (first_row + r) * args.topk + (match ? rank : shared + i - rank);
        params.ids_TK[place] = sh.ids[r][i] == INT_MAX ? -1 : sh.ids[r][i];
        params.delta_TK[place] = delta[r][n];
      }
    }
  }
  if (threadIdx.x == 0) params.joint_tiles[blockIdx.x] = shared / kTileKeys;
}

}  // namespace baleen::indexer_backward
