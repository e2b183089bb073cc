// Dense indexer loss, kernel 1: scores I, relu masks and lse_I of four rows a block over all keys
// of their windows. See dense_indexer_loss_cuda.cu for who does what.
//
// Tile: M = 64 keys, 256 columns = 4 rows x 64 heads (resident) as two halves of 128 columns, each
// with an accumulator of its own; two consumer warpgroups take alternate tiles. While the products
// of one half run, the other half's epilogue is computed. The keys come negated, so that the sign
// of x = -a is the mask (a sum of zeros is +0, whatever their signs): an element costs |x| - x = 2
// relu(a), the weighted sum and one funnel shift of its sign into the mask.
#pragma once

#include "kernels/ops/indexer/dense_indexer_loss_params.cuh"

namespace baleen::dense_indexer_loss {

constexpr int kScoreStages = 8;
constexpr int kColumns = kRowGroup * kHeads;
constexpr int kQueryRunBytes = kColumns * 128;

struct ScoreShared {
  uint8_t queries[2 * kQueryRunBytes];
  uint8_t keys[kScoreStages][kTileBytes];
  uint64_t query_full, key_full[kScoreStages], key_empty[kScoreStages];
  float2 partial_lse[8][kRowGroup];  // (maximum, sum) of each consumer warp
};
constexpr int kScoreSharedBytes = static_cast<int>(sizeof(ScoreShared));
static_assert(kScoreSharedBytes <= 232448, "sm_90 gives a block 227 KiB");

// sum of exp(x - maximum) over values that come one after the other; -inf adds nothing.
struct RunningSum {
  float maximum = -1e30f, sum = 0;
  __device__ __forceinline__ void Add(float x) {
    const float next = fmaxf(maximum, x);
    sum = sum * cuda::Exp2((maximum - next) * kLog2E) + cuda::Exp2((x - next) * kLog2E);
    maximum = next;
  }
  __device__ __forceinline__ void Merge(float other_maximum, float other_sum) {
    const float next = fmaxf(maximum, other_maximum);
    sum = sum * cuda::Exp2((maximum - next) * kLog2E) +
          other_sum * cuda::Exp2((other_maximum - next) * kLog2E);
    maximum = next;
  }
};

__device__ __forceinline__ uint32_t ShiftInSign(uint32_t bits, float x) {
  return __funnelshift_l(__float_as_uint(x), bits, 1);
}

// Weighted relu sum and mask of one row's 64 heads: 32 accumulators of the thread, keys `r` = 0, 1.
__device__ __forceinline__ uint32_t SumIndexHeads(const float* d, const float* half_w,
                                                  float (&sums)[2]) {
  uint32_t bits[2][2] = {};
  sums[0] = sums[1] = 0;
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x = d[4 * j + 2 * r + e];  // -a
        sums[r] = fmaf(half_w[2 * j + e], fabsf(x) - x, sums[r]);
        bits[r][e] = ShiftInSign(bits[r][e], x);
      }
    }
  }
  const uint32_t low = __byte_perm(bits[0][0], bits[0][1], 0x0040);
  const uint32_t high = __byte_perm(bits[1][0], bits[1][1], 0x0040);
  return __byte_perm(low, high, 0x5410);
}

// What a consumer thread knows of the two rows of one half. Of the 4 lanes that share two keys,
// lane c = lane % 4 ends with row c / 2 and key + 8 (c % 2). Stores go on past the last row, into
// padding.
struct HalfRows {
  float w[32];  // half of the weights: columns 8 j + 2 c + e
  KeyRange window;
  RunningSum lse;
  int key;        // of the next tile
  float* scores;  // likewise
  uint32_t* masks[2];

  __device__ void Load(const Params& params, int first_row, int first_tile) {
    const int lane = threadIdx.x % 32, c = lane % 4, thread = threadIdx.x % 128;
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const int row = first_row + u;
      const float* from =
          params.args.w_TI + static_cast<int64_t>(min(row, params.args.num_rows - 1)) * kHeads;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const float2 pair = *reinterpret_cast<const float2*>(from + 8 * j + 2 * c);
        w[16 * u + 2 * j] = 0.5f * pair.x;
        w[16 * u + 2 * j + 1] = 0.5f * pair.y;
      }
      masks[u] = params.mask_TX +
                 (static_cast<int64_t>(row) * params.num_tiles + first_tile) * kMaskWords + thread;
    }
    const int own = first_row + c / 2;
    window = RowWindow(params, own);
    key = first_tile * kTileKeys + thread / 32 * 16 + lane / 4 + 8 * (c % 2);
    scores = params.score_TS + static_cast<int64_t>(own) * params.num_tiles * kTileKeys + key;
  }

  // The epilogue of a half tile; tiles come two by two.
  __device__ __forceinline__ void Finish(const float (&d)[64]) {
    float sums[2][2];  // [row][key]
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      __stcs(masks[u], SumIndexHeads(d + 32 * u, w + 16 * u, sums[u]));
      masks[u] += 2 * kMaskWords;
    }
    const bool second = threadIdx.x & 2, odd = threadIdx.x & 1;
    float own[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      own[r] = (second ? sums[1][r] : sums[0][r]) +
               __shfl_xor_sync(kAllLanes, second ? sums[0][r] : sums[1][r], 2);
    }
    const float score =
        (odd ? own[1] : own[0]) + __shfl_xor_sync(kAllLanes, odd ? own[0] : own[1], 1);
    __stcs(scores, score);
    lse.Add(key >= window.begin && key < window.end ? score : -INFINITY);
    scores += 2 * kTileKeys;
    key += 2 * kTileKeys;
  }

  // Over the lanes with the same row; lanes 0 and 2 end with rows 0 and 1.
  __device__ void ReduceLanes() {
#pragma unroll
    for (int step : {1, 4, 8, 16}) {
      const float maximum = __shfl_xor_sync(kAllLanes, lse.maximum, step);
      lse.Merge(maximum, __shfl_xor_sync(kAllLanes, lse.sum, step));
    }
  }
};

// Issues d = keys x (half of the columns)^T.
__device__ __forceinline__ void MultiplyHalf(float (&d)[64], uint32_t keys, uint32_t queries) {
  const uint64_t a = cuda::Opaque(cuda::DescriptorKMajor(keys));
  const uint64_t b = cuda::Opaque(cuda::DescriptorKMajor(queries));
  cuda::WgmmaFence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const int run = step / 4, offset = step % 4 * 32;
    cuda::WgmmaBf16<128, false, false>::Shared(d, cuda::Advance(a, run * kRunBytes + offset),
                                               cuda::Advance(b, run * kQueryRunBytes + offset),
                                               step > 0);
  }
  cuda::WgmmaCommit();
}

__device__ __forceinline__ void ConsumeScores(ScoreShared& sh, const Params& params, int first_row,
                                              KeyRange tiles, int consumer) {
  HalfRows rows[2];
  rows[0].Load(params, first_row, tiles.begin + consumer);
  rows[1].Load(params, first_row + 2, tiles.begin + consumer);
  const uint32_t queries = cuda::SharedAddress(sh.queries), keys = cuda::SharedAddress(sh.keys);
  const auto wait_keys = [&](int tile) {
    const int i = tile - tiles.begin;
    cuda::BarrierWait(&sh.key_full[i % kScoreStages], i / kScoreStages & 1);
    return keys + i % kScoreStages * kTileBytes;
  };
  cuda::BarrierWait(&sh.query_full, 0);
  int tile = tiles.begin + consumer;
  if (tile < tiles.end) {
    float d0[64], d1[64];
    // Half 0 of the current tile while half 1 is multiplied; then gives its keys back.
    const auto finish_half_0 = [&] {
      cuda::WgmmaWait<1>();
      cuda::PinRegisters(d0);
      rows[0].Finish(d0);
      cuda::WgmmaWait<0>();
      cuda::PinRegisters(d1);
      if (threadIdx.x % 32 == 0) {
        cuda::BarrierArrive(&sh.key_empty[(tile - tiles.begin) % kScoreStages]);
      }
    };
    uint32_t at = wait_keys(tile);
    MultiplyHalf(d0, at, queries);
    MultiplyHalf(d1, at, queries + 128 * 128);
    finish_half_0();
    while (tile + 2 < tiles.end) {
      at = wait_keys(tile + 2);
      MultiplyHalf(d0, at, queries);
      // Half 1 of the tile before, while half 0 of this one is multiplied.
      rows[1].Finish(d1);
      MultiplyHalf(d1, at, queries + 128 * 128);
      tile += 2;
      finish_half_0();
    }
    rows[1].Finish(d1);
  }
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    rows[h].ReduceLanes();
    if (lane == 0 || lane == 2) {
      sh.partial_lse[threadIdx.x / 32][2 * h + lane / 2] = {rows[h].lse.maximum, rows[h].lse.sum};
    }
  }
}

__device__ __forceinline__ void ProduceScores(ScoreShared& sh, const CUtensorMap& query_map,
                                              const CUtensorMap& key_map, int first_row,
                                              KeyRange tiles) {
  cuda::BarrierArriveExpect(&sh.query_full, 2 * kQueryRunBytes);
  LoadTile(cuda::SharedAddress(sh.queries), &query_map, first_row * kHeads, kQueryRunBytes,
           &sh.query_full);
  Ring<kScoreStages> ring;
  for (int tile = tiles.begin; tile < tiles.end; ++tile, ring.Next()) {
    cuda::BarrierWait(&sh.key_empty[ring.stage], ring.phase ^ 1);
    cuda::BarrierArriveExpect(&sh.key_full[ring.stage], kTileBytes);
    LoadTile(cuda::SharedAddress(sh.keys[ring.stage]), &key_map, tile * kTileKeys, kRunBytes,
             &sh.key_full[ring.stage]);
  }
}

// Four bf16 a thread with the other sign.
__global__ void NegateKernel(const uint2* from, uint2* to, int64_t count) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  if (i >= count) return;
  const uint2 x = from[i];
  to[i] = make_uint2(x.x ^ 0x80008000u, x.y ^ 0x80008000u);
}

// The last rows have the longest windows under a causal mask: they come first.
__global__ void __launch_bounds__(kThreads, 1)
    ScoreKernel(const __grid_constant__ Params params,
                const __grid_constant__ CUtensorMap query_map,
                const __grid_constant__ CUtensorMap key_map) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  ScoreShared& sh = *reinterpret_cast<ScoreShared*>(raw_shared);
  const int first_row = (gridDim.x - 1 - blockIdx.x) * kRowGroup;
  const KeyRange tiles = TilesOfGroup(params, first_row);
  if (threadIdx.x == 0) {
    if (blockIdx.x == 0) *params.target_waves = {0, 0};  // for the next kernel
    cuda::BarrierInit(&sh.query_full, 1);
    for (int i = 0; i < kScoreStages; ++i) {
      cuda::BarrierInit(&sh.key_full[i], 1);
      cuda::BarrierInit(&sh.key_empty[i], 4);  // the warps of the one consumer that has the tile
    }
    cuda::FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x >= 256) {
    cuda::LowerRegisters<24>();
    if (threadIdx.x == 256 && tiles.begin < tiles.end) {
      ProduceScores(sh, query_map, key_map, first_row, tiles);
    }
  } else {
    cuda::RaiseRegisters<240>();
    if (tiles.begin < tiles.end) {
      ConsumeScores(sh, params, first_row, Uniform(tiles), Uniform(threadIdx.x / 128));
    }
    cuda::NamedSync(1, 256);
    // Weights as bf16 pairs for the key gradient; lse of the rows.
    const int row = first_row + static_cast<int>(threadIdx.x) / 32, lane = threadIdx.x % 32;
    if (threadIdx.x < 32 * kRowGroup && row < params.args.num_rows) {
      const float* w =
          params.args.w_TI + static_cast<int64_t>(row) * kHeads + lane % 8 * 8 + lane / 8 * 2;
      params.w_TX[static_cast<int64_t>(row) * 32 + lane] = cuda::PackBf16(w[0], w[1]);
      if (lane == 0 && tiles.begin < tiles.end) {
        RunningSum sum;
        for (int i = 0; i < 8; ++i) {
          sum.Merge(sh.partial_lse[i][row - first_row].x, sh.partial_lse[i][row - first_row].y);
        }
        params.lse_T[row] = sum.maximum + logf(sum.sum);
      }
    }
  }
}

}  // namespace baleen::dense_indexer_loss
