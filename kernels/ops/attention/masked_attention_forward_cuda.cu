// Forward of masked dense attention.
//
// A thread block keeps 128 query rows of a head, 64 for each of two consumer warpgroups, and passes
// over the tiles of 128 keys that its list names; a consumer holds o (64 registers a thread), the
// scores of a tile (64) and P as bf16 (32). Two producer threads bring keys and values through
// rings of two stages by the copy engine. The products of a step are S = q k^T of tile i and then o
// += P v of tile i - 1: the softmax of tile i runs while the latter, and the other consumer's
// products, are on the tensor cores.
//
// Masks: a thread needs, for two rows, the bits of 128 keys, four words each. Selections come as
// words from memory (512 bytes a word and tile, with the keys); windows are computed, in the tiles
// they cut only. Both end in one select an element. Tiles that no row sees are not in the list,
// full ones carry no mask.
//
// Items (row tile, head) are drawn from a counter, the longest first, in groups of heads whose keys
// and values fit into L2; the producers run ahead into the next item.
//
// Roofline of a tile of 128 x 128 pairs of one head: 10.5 MFLOP, 2560 clocks of a multiprocessor's
// tensor cores; 1024 of its exponentials (16 a clock); with the mask six instructions a pair, 770;
// shared memory 1230 for what products read and 640 for what copies write (128 B a clock); L2 gives
// 80 KB, 5.5 TB/s at 700 TF. So the tensor cores limit, if the softmax of one consumer always runs
// beside products of the other.
#include <cmath>

#include "kernels/ops/attention/masked_attention_forward_cuda.h"
#include "kernels/ops/attention/masked_attention_tiles_cuda.cuh"

namespace baleen {
namespace {

using namespace masked_attention;  // NOLINT: the device code of this family

constexpr int kTile = kMaskedTile;
constexpr int kStages = 2;
constexpr int kWords = kTile / 32;
constexpr int kRunBytes = kTile * 128;
// The maximum that scores are taken against may lag behind the true one by this many powers of two,
// which P in bf16 and sums in fp32 hold at full precision; so o is seldom rescaled.
constexpr float kLag = 8;

struct Params {
  MaskedAttentionForwardArgs args;
  MaskedAttentionSchedule schedule;
  Work work;
};

struct Shared {
  uint8_t q[kQueryRuns * kRunBytes];
  uint8_t k[kStages][kQueryRuns * kRunBytes];
  uint8_t v[kStages][kValueRuns * kRunBytes];
  uint32_t bits[kStages][kWords][kTile];  // of keys, row by row
  int entry[kStages];                     // of the list, with the keys
  ItemRing items;
  uint64_t q_full, q_empty;
  uint64_t k_full[kStages], k_empty[kStages], v_full[kStages], v_empty[kStages];
};
static_assert(sizeof(Shared) <= 232448, "sm_90 gives a block 227 KiB");

// --- Producers: one thread for items, queries, keys and bits, one for values.

template <bool kSelected>
__device__ void ProduceKeys(Shared& sh, const Params& params, const CUtensorMap& q_map,
                            const CUtensorMap& k_map) {
  const MaskedAttentionSchedule& schedule = params.schedule;
  Ring<kItemStages> items;
  Ring<kStages> ring;
  uint32_t q_phase = 0;
  int index = atomicAdd(params.work.counter, 1);
  for (;;) {
    const Item item = sh.items.Draw(params.work, items, index);
    if (item.steps < 0) return;
    const int32_t* list =
        params.work.lists.entries + static_cast<int64_t>(item.tile) * params.work.lists.stride + 1;
    int next = __ldg(list);
    for (int i = 0; i < item.steps; ++i, ring.Next()) {
      const int entry = next;
      if (i + 1 < item.steps) next = __ldg(list + i + 1);
      uint64_t* full = &sh.k_full[ring.stage];
      const bool bits = kSelected && entry & 1;
      cuda::BarrierWait(&sh.k_empty[ring.stage], ring.phase ^ 1);
      sh.entry[ring.stage] = entry;
      cuda::BarrierArriveExpect(full, kQueryRuns * kRunBytes + (bits ? kWords * kTile * 4 : 0));
      LoadRuns<kQueryRuns, kTile>(sh.k[ring.stage], k_map, item.head * kQueryDim, entry / 2 * kTile,
                                  full);
      if (bits) {
        const uint32_t* from = schedule.row_bits +
                               static_cast<int64_t>(entry / 2 * kWords) * schedule.padded_rows +
                               item.tile * kTile;
        for (int w = 0; w < kWords; ++w, from += schedule.padded_rows) {
          cuda::BulkLoad(cuda::SharedAddress(sh.bits[ring.stage][w]), from, kTile * 4, full);
        }
      }
      if (i == 0) {
        cuda::BarrierWait(&sh.q_empty, q_phase ^ 1);
        cuda::BarrierArriveExpect(&sh.q_full, kQueryRuns * kRunBytes);
        LoadRuns<kQueryRuns, kTile>(sh.q, q_map, item.head * kQueryDim, item.tile * kTile,
                                    &sh.q_full);
        q_phase ^= 1;
      }
    }
  }
}

__device__ void ProduceValues(Shared& sh, const Params& params, const CUtensorMap& v_map) {
  Ring<kItemStages> items;
  Ring<kStages> ring;
  for (;;) {
    const Item item = sh.items.TakeAlone(items);
    if (item.steps < 0) return;
    const int32_t* list =
        params.work.lists.entries + static_cast<int64_t>(item.tile) * params.work.lists.stride + 1;
    int next = __ldg(list);
    for (int i = 0; i < item.steps; ++i, ring.Next()) {
      const int tile = next / 2;
      if (i + 1 < item.steps) next = __ldg(list + i + 1);
      uint64_t* full = &sh.v_full[ring.stage];
      cuda::BarrierWait(&sh.v_empty[ring.stage], ring.phase ^ 1);
      cuda::BarrierArriveExpect(full, kValueRuns * kRunBytes);
      LoadRuns<kValueRuns, kTile>(sh.v[ring.stage], v_map, item.head * kValueDim, tile * kTile,
                                  full);
    }
  }
}

// --- Consumers.

// The running softmax of the thread's two rows; sums of the thread's own columns.
struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY}, sum[2] = {0, 0};

  // s becomes P against the maximum, `scale` = log2(e) * the scores' scale. Returns in `rescale`
  // what o must be multiplied by; false if by nothing, in all of the warp.
  __device__ __forceinline__ bool Step(float (&s)[kTile / 2], float scale, float lag,
                                       float (&rescale)[2]) {
    bool any = false;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float highest = s[2 * r];
#pragma unroll
      for (int i = 0; i < kTile / 4; ++i) highest = fmaxf(highest, s[i / 2 * 4 + 2 * r + i % 2]);
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 1));
      highest = fmaxf(highest, __shfl_xor_sync(kAllLanes, highest, 2));
      const bool raise = highest > maximum[r] + lag;
      const float next = raise ? highest : maximum[r];
      // -inf - -inf would be NaN: a row that has seen no key yet is taken against 0.
      const float against = next == -INFINITY ? 0.0f : next * scale;
      rescale[r] = raise ? cuda::Exp2(fmaf(maximum[r], scale, -against)) : 1.0f;
      maximum[r] = next;
      any |= raise;
      float even = 0, odd = 0;
#pragma unroll
      for (int i = 0; i < kTile / 8; ++i) {
        float& x = s[4 * i + 2 * r];
        float& y = s[4 * i + 2 * r + 1];
        x = cuda::Exp2(fmaf(x, scale, -against));
        y = cuda::Exp2(fmaf(y, scale, -against));
        even += x;
        odd += y;
      }
      sum[r] = fmaf(sum[r], rescale[r], even + odd);
    }
    return __any_sync(kAllLanes, any);
  }
};

// What a consumer thread knows of its place.
struct Place {
  int consumer, row;  // of the tile: the thread has row and row + 8
};

// The bits of a tile for the thread's rows `row` and row + 8 of the block's.
template <bool kSelected>
__device__ __forceinline__ void LoadBits(const Shared& sh, int stage, int entry, int row,
                                         const int (&begin)[2], const int (&end)[2],
                                         uint32_t (&bits)[2][kWords]) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      bits[r][w] = kSelected ? sh.bits[stage][w][row + 8 * r]
                             : WindowBits(begin[r], end[r], entry / 2 * kTile + 32 * w);
    }
  }
}

// Divides by the sums and stores o and lse.
__device__ __forceinline__ void Finish(const Params& params, const Item& item, Place place,
                                       const Softmax& softmax, const float (&o)[kValueDim / 2]) {
  const MaskedAttentionForwardArgs& args = params.args;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = softmax.sum[r];
    sum += __shfl_xor_sync(kAllLanes, sum, 1);
    sum += __shfl_xor_sync(kAllLanes, sum, 2);
    const int row = item.tile * kTile + place.row + 8 * r;
    const bool valid = row < args.keys.num_rows;
    const int64_t at = static_cast<int64_t>(row) * args.num_heads + item.head;
    const bool none = sum == 0;  // a NaN stays one
    StoreRow<kValueDim>(static_cast<uint4*>(args.o_THV) + at * (kValueDim / 8), valid, o, r,
                        none ? 0.0f : 1.0f / sum);
    if (valid && threadIdx.x % 4 == 0) {
      args.lse_TH[at] = none ? -INFINITY : fmaf(softmax.maximum[r], args.scale, logf(sum));
    }
  }
}

template <bool kSelected>
__device__ __forceinline__ void Consume(Shared& sh, const Params& params, Place place) {
  const float scale = params.args.scale * kLog2E, lag = kLag / scale;
  const uint64_t q_rows =
      cuda::DescriptorKMajor(cuda::SharedAddress(sh.q) + place.consumer * 64 * 128);
  const uint64_t k_keys = cuda::DescriptorKMajor(cuda::SharedAddress(sh.k));
  const uint64_t v_columns = cuda::DescriptorMnMajor(cuda::SharedAddress(sh.v), kRunBytes);
  Ring<kItemStages> items;
  Ring<kStages> keys, values;
  uint32_t q_phase = 0;
  for (;;) {
    const Item item = sh.items.Take(items);
    if (item.steps < 0) return;
    Softmax softmax;
    float o[kValueDim / 2], s[kTile / 2], rescale[2];
    uint32_t p[kTile / 16][4];
    int begin[2], end[2];
    if constexpr (!kSelected) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        begin[r] = __ldg(params.schedule.begin_T + item.tile * kTile + place.row + 8 * r);
        end[r] = __ldg(params.schedule.end_T + item.tile * kTile + place.row + 8 * r);
      }
    }
    int entry = 0;
    uint32_t bits[2][kWords];
    const auto multiply_keys = [&] {
      cuda::BarrierWait(&sh.k_full[keys.stage], keys.phase);
      cuda::WgmmaFence();
      MultiplyTransposed<kQueryRuns, kTile, kTile>(
          s, q_rows, cuda::Advance(k_keys, keys.stage * kQueryRuns * kRunBytes));
    };
    const auto multiply_values = [&](bool accumulate) {
      cuda::BarrierWait(&sh.v_full[values.stage], values.phase);
      cuda::WgmmaFence();
      MultiplyRegisters<kTile / 16, kValueDim>(
          o, p, cuda::Advance(v_columns, values.stage * kValueRuns * kRunBytes), accumulate);
    };
    // While the products run.
    const auto load_bits = [&] {
      entry = sh.entry[keys.stage];
      if (kSelected && entry & 1) {
        LoadBits<kSelected>(sh, keys.stage, entry, place.row, begin, end, bits);
      }
    };
    // Scores are done: gives keys back, and after the last tile the queries.
    const auto finish_keys = [&](bool last) {
      cuda::PinRegisters(s);
      __syncwarp();  // all lanes have read the entry and the bits
      Release(&sh.k_empty[keys.stage]);
      if (last) Release(&sh.q_empty);
      if (entry & 1) {
        if (!kSelected) {
          LoadBits<kSelected>(sh, keys.stage, entry, place.row, begin, end, bits);
        }
        MaskScores(s, bits);
      }
      keys.Next();
    };
    const auto finish_values = [&] {
      cuda::WgmmaWait<0>();
      cuda::PinRegisters(o);
      PinOperand(p);
      Release(&sh.v_empty[values.stage]);
      values.Next();
    };

    cuda::BarrierWait(&sh.q_full, q_phase);
    q_phase ^= 1;
    multiply_keys();
    load_bits();
    cuda::WgmmaWait<0>();
    finish_keys(item.steps == 1);
    softmax.Step(s, scale, lag, rescale);
    PackOperand(s, p);
    for (int i = 1; i < item.steps; ++i) {
      multiply_keys();
      multiply_values(i > 1);
      load_bits();
      cuda::WgmmaWait<1>();
      finish_keys(i + 1 == item.steps);
      const bool any = softmax.Step(s, scale, lag, rescale);
      finish_values();
      if (any) {
#pragma unroll
        for (int j = 0; j < kValueDim / 2; ++j) o[j] *= rescale[j / 2 % 2];
      }
      PackOperand(s, p);
    }
    multiply_values(item.steps > 1);
    finish_values();
    Finish(params, item, place, softmax, o);
  }
}

template <bool kSelected>
__global__ void __launch_bounds__(kThreads, 1)
    ForwardKernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap q_map,
                  const __grid_constant__ CUtensorMap k_map,
                  const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  Shared& sh = *reinterpret_cast<Shared*>(raw_shared);
  if (threadIdx.x == 0) {
    sh.items.Init(kConsumerWarps + 1);
    cuda::BarrierInit(&sh.q_full, 1);
    cuda::BarrierInit(&sh.q_empty, kConsumerWarps);
    for (int i = 0; i < kStages; ++i) {
      cuda::BarrierInit(&sh.k_full[i], 1);
      cuda::BarrierInit(&sh.v_full[i], 1);
      cuda::BarrierInit(&sh.k_empty[i], kConsumerWarps);
      cuda::BarrierInit(&sh.v_empty[i], kConsumerWarps);
    }
    cuda::FenceBarrierInit();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp >= kConsumerWarps) {
    cuda::LowerRegisters<40>();
    if (threadIdx.x == 32 * kConsumerWarps) {
      ProduceKeys<kSelected>(sh, params, q_map, k_map);
    } else if (threadIdx.x == 32 * kConsumerWarps + 32) {
      ProduceValues(sh, params, v_map);
    }
  } else {
    cuda::RaiseRegisters<232>();
    const int consumer = __shfl_sync(kAllLanes, warp / 4, 0);
    Consume<kSelected>(sh, params, {consumer, warp * 16 + static_cast<int>(threadIdx.x) % 32 / 4});
  }
}

template <bool kSelected>
void LaunchKernel(const Params& params, cudaStream_t stream) {
  const MaskedAttentionForwardArgs& args = params.args;
  const int heads = args.num_heads;
  cuda::CheckCuda(cudaFuncSetAttribute(ForwardKernel<kSelected>,
                                       cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(Shared)),
                  "masked attention forward: shared memory");
  ForwardKernel<kSelected><<<cuda::NumMultiprocessors(), kThreads, sizeof(Shared), stream>>>(
      params, HeadsMap(args.q_THQ, args.keys.num_rows, heads, kQueryDim, kTile),
      HeadsMap(args.k_SHQ, args.keys.num_keys, heads, kQueryDim, kTile),
      HeadsMap(args.v_SHV, args.keys.num_keys, heads, kValueDim, kTile));
  cuda::CheckLaunch("masked attention forward");
}

}  // namespace

void LaunchMaskedAttentionForward(const MaskedAttentionForwardArgs& args, void* stream) {
  if (args.keys.num_rows == 0 || args.num_heads == 0) return;
  const cudaStream_t on = cuda::AsStream(stream);
  constexpr MaskedAttentionPass kPass = MaskedAttentionPass::kForward;
  const MaskedAttentionSchedule schedule = PlaceMaskedAttentionSchedule(
      args.keys, kPass, LayOutMaskedAttention(args.keys, kPass, args.num_heads), args.workspace);
  LaunchMaskedAttentionSchedule(args.keys, schedule, on);
  const Work work = {schedule.by_rows, args.num_heads,
                     HeadsPerGroup(args.keys.num_keys, args.num_heads), /*last_first=*/true,
                     schedule.counters};
  const Params params = {args, schedule, work};
  schedule.selected ? LaunchKernel<true>(params, on) : LaunchKernel<false>(params, on);
}

}  // namespace baleen
