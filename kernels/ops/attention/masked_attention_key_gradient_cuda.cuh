// Masked attention backward: dk and dv. Keys stay, rows pass; masked_attention_backward_cuda.cu
// tells the story.
//
// A consumer warpgroup has 64 keys: dk in 96 registers a thread, dv in 64. Scores come transposed,
// keys by rows, so that P as it stands in registers is the left operand of dv += P do. Registers
// are what is scarce: S and dP of 64 rows (32 each) are never held together, and dS goes to dk +=
// dS q through shared memory. A step is
//   S of this step, dk of the step before | exponentials, P as bf16 | dP, dv | dS as bf16
// where each pair of products is issued at once and only the first is waited for, so that the
// arithmetic that follows it runs beside the second. Where dS is kept, each warp sends its part of
// it on to memory, and waits for the copy only when it writes the next step's.
#pragma once

#include "kernels/ops/attention/masked_attention_gradients_cuda.cuh"

namespace baleen::masked_attention {

constexpr int kKeyWords = kStep / 32;

// First to leave L2, which holds what is read again.
__device__ __forceinline__ void BulkStore(void* global, uint32_t shared, uint32_t bytes) {
  asm volatile(
      "cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint [%0], [%1], %2, %3;" ::"l"(
          global),
      "r"(shared), "r"(bytes), "l"(cuda::PolicyEvictFirst())
      : "memory");
}

struct alignas(16) StepStatistics {
  float lse[kStep], delta[kStep];
};

struct KeyShared {
  uint8_t k[kQueryRuns * kTileRun];
  uint8_t v[kValueRuns * kTileRun];
  uint8_t q[kStages][kQueryRuns * kStepRun];
  uint8_t d_o[kStages][kValueRuns * kStepRun];
  uint8_t ds[2][kStepRun];  // of each consumer: 64 keys, 64 rows
  StepStatistics statistics[kStages];
  union {
    uint32_t bits[kStages][kKeyWords][kTile];  // of rows, key by key
    struct {
      int32_t begin[kStep], end[kStep];
    } windows[kStages];
  };
  int entry[kStages];
  int place[kStages];  // of the tile in the kept dS
  ItemRing items;
  uint64_t keys_full, keys_empty;
  uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(KeyShared) <= 232448, "sm_90 gives a block 227 KiB");

// The bits, or the windows, of a step's rows.
template <bool kSelected>
__device__ __forceinline__ void LoadMask(KeyShared& sh, const MaskedAttentionSchedule& schedule,
                                         int stage, int step, int first_key) {
  uint64_t* full = &sh.full[stage];
  if constexpr (kSelected) {
    const uint32_t* from = schedule.key_bits +
                           static_cast<int64_t>(step) * kKeyWords * schedule.padded_keys +
                           first_key;
    for (int w = 0; w < kKeyWords; ++w, from += schedule.padded_keys) {
      cuda::BulkLoad(cuda::SharedAddress(sh.bits[stage][w]), from, kTile * 4, full);
    }
  } else {
    cuda::BulkLoad(cuda::SharedAddress(sh.windows[stage].begin), schedule.begin_T + step * kStep,
                   kStep * 4, full);
    cuda::BulkLoad(cuda::SharedAddress(sh.windows[stage].end), schedule.end_T + step * kStep,
                   kStep * 4, full);
  }
}

template <bool kSelected, bool kKeeps>
__device__ void ProduceForKeys(KeyShared& sh, const GradientParams& params, const Work& work,
                               const CUtensorMap& q_map, const CUtensorMap& do_map,
                               const CUtensorMap& k_map, const CUtensorMap& v_map) {
  constexpr int kMaskBytes = kSelected ? kKeyWords * kTile * 4 : 2 * kStep * 4;
  Ring<kItemStages> items;
  Ring<kStages> ring;
  uint32_t keys_phase = 0;
  const int tiles_of_head = kKeeps ? __ldg(&params.schedule.rounds->tiles) : 0;
  int index = atomicAdd(work.counter, 1);
  for (;;) {
    const Item item = sh.items.Draw(work, items, index);
    if (item.steps < 0) return;
    if (item.steps == 0) continue;
    const int32_t* list =
        work.lists.entries + static_cast<int64_t>(item.tile) * work.lists.stride + 1;
    const auto place_of = [&](int entry) {
      if constexpr (!kKeeps) return 0;
      const int tile = entry / 2 * kStep / kTile * (params.schedule.padded_keys / kTile);
      return (item.head - work.first_head) * tiles_of_head +
             __ldg(params.schedule.places + tile + item.tile);
    };
    int next = __ldg(list), next_place = place_of(next);
    for (int i = 0; i < item.steps; ++i, ring.Next()) {
      const int entry = next, step = entry / 2, place = next_place;
      if (i + 1 < item.steps) {
        next = __ldg(list + i + 1);
        next_place = place_of(next);
      }
      uint64_t* full = &sh.full[ring.stage];
      cuda::BarrierWait(&sh.empty[ring.stage], ring.phase ^ 1);
      sh.entry[ring.stage] = entry;
      if (kKeeps) sh.place[ring.stage] = place;
      cuda::BarrierArriveExpect(full, (kQueryRuns + kValueRuns) * kStepRun +
                                          sizeof(StepStatistics) + (entry & 1 ? kMaskBytes : 0));
      LoadRuns<kQueryRuns, kStep>(sh.q[ring.stage], q_map, item.head * kQueryDim, step * kStep,
                                  full);
      LoadRuns<kValueRuns, kStep>(sh.d_o[ring.stage], do_map, item.head * kValueDim, step * kStep,
                                  full);
      cuda::BulkLoad(cuda::SharedAddress(&sh.statistics[ring.stage]),
                     StatisticsOf(params, item.head, step), sizeof(StepStatistics), full);
      if (entry & 1) {
        LoadMask<kSelected>(sh, params.schedule, ring.stage, step, item.tile * kTile);
      }
      if (i == 0) {
        cuda::BarrierWait(&sh.keys_empty, keys_phase ^ 1);
        cuda::BarrierArriveExpect(&sh.keys_full, (kQueryRuns + kValueRuns) * kTileRun);
        LoadRuns<kQueryRuns, kTile>(sh.k, k_map, item.head * kQueryDim, item.tile * kTile,
                                    &sh.keys_full);
        LoadRuns<kValueRuns, kTile>(sh.v, v_map, item.head * kValueDim, item.tile * kTile,
                                    &sh.keys_full);
        keys_phase ^= 1;
      }
    }
  }
}

// The top bits of two bytes of (low, high) as a mask for two bf16: kSelector has 8 + byte twice for
// each.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t SpreadSigns(uint32_t low, uint32_t high) {
  uint32_t mask;  // __byte_perm knows no sign selectors
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(mask) : "r"(low), "r"(high), "n"(kSelector));
  return mask;
}

// Clears the elements of p, packed pairs of rows of 16 a step, of keys r = 0, 1 whose bits are 0.
// `bits` [r][word] are of the keys, bit = row.
__device__ __forceinline__ void MaskPairs(uint32_t (&p)[kStep / 16][4],
                                          const uint32_t (&bits)[2][kKeyWords]) {
  const int shift = threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int w = 0; w < kKeyWords; ++w) {
      // Rows 8 j + 2 (lane % 4) and the next at the top of byte j.
      const uint32_t even = bits[r][w] << (7 - shift), odd = bits[r][w] << (6 - shift);
      p[2 * w][r] &= SpreadSigns<0xCC88>(even, odd);
      p[2 * w][2 + r] &= SpreadSigns<0xDD99>(even, odd);
      p[2 * w + 1][r] &= SpreadSigns<0xEEAA>(even, odd);
      p[2 * w + 1][2 + r] &= SpreadSigns<0xFFBB>(even, odd);
    }
  }
}

// The same by the windows of the rows; `key` is the thread's first, the other is key + 8.
__device__ __forceinline__ void MaskPairsByWindows(uint32_t (&p)[kStep / 16][4],
                                                   const int32_t* begin, const int32_t* end,
                                                   int key) {
#pragma unroll
  for (int j = 0; j < kStep / 8; ++j) {
    const int row = 8 * j + 2 * (threadIdx.x % 4);
    const int2 from = *reinterpret_cast<const int2*>(begin + row);
    const int2 to = *reinterpret_cast<const int2*>(end + row);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int own = key + 8 * r;
      const uint32_t even = own >= from.x && own < to.x ? 0xFFFFu : 0;
      const uint32_t odd = own >= from.y && own < to.y ? 0xFFFF0000u : 0;
      p[j / 2][j % 2 * 2 + r] &= even | odd;
    }
  }
}

// P of a step as bf16 pairs of rows.
__device__ __forceinline__ void Exponentiate(const float (&s)[kStep / 2],
                                             const StepStatistics& statistics, float scale,
                                             uint32_t (&p)[kStep / 16][4]) {
#pragma unroll
  for (int j = 0; j < kStep / 8; ++j) {
    const float2 lse =
        *reinterpret_cast<const float2*>(&statistics.lse[8 * j + 2 * (threadIdx.x % 4)]);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      p[j / 2][j % 2 * 2 + r] =
          cuda::PackBf16(cuda::Exp2(fmaf(s[4 * j + 2 * r], scale, -lse.x)),
                         cuda::Exp2(fmaf(s[4 * j + 2 * r + 1], scale, -lse.y)));
    }
  }
}

// dS = P (dP - D), likewise, into the K-major tile `ds` of the consumer: its reader is the tensor
// core.
template <bool kKeeps>
__device__ __forceinline__ void Differentiate(const uint32_t (&p)[kStep / 16][4],
                                              const float (&dp)[kStep / 2],
                                              const StepStatistics& statistics, uint32_t ds) {
  const int lane = threadIdx.x % 32, matrix = lane / 8;
  const int line = threadIdx.x % 128 / 32 * 16 + matrix % 2 * 8 + lane % 8;
  if constexpr (kKeeps) {  // the warp's lines of the step before have left
    if (lane == 0) cuda::BulkWaitRead<0>();
    __syncwarp();
  }
#pragma unroll
  for (int step = 0; step < kStep / 16; ++step) {
    uint32_t pairs[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = 2 * step + half;
      const float2 delta =
          *reinterpret_cast<const float2*>(&statistics.delta[8 * j + 2 * (lane % 4)]);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const uint32_t pair = p[step][2 * half + r];
        pairs[2 * half + r] =
            cuda::PackBf16(cuda::LowBf16(pair) * (dp[4 * j + 2 * r] - delta.x),
                           cuda::HighBf16(pair) * (dp[4 * j + 2 * r + 1] - delta.y));
      }
    }
    cuda::StoreMatrix4(ds + cuda::SwizzledOffset(line, 2 * step + matrix / 2), pairs[0], pairs[1],
                       pairs[2], pairs[3]);
  }
  cuda::FenceProxyAsync();
}

// Each warp sends its 16 keys of dS to the consumer's half of the tile.
__device__ __forceinline__ void KeepDifferences(const GradientParams& params, int place, int entry,
                                                int consumer, uint32_t ds) {
  __syncwarp();
  if (threadIdx.x % 32 != 0) return;
  const uint32_t own = threadIdx.x % 128 / 32 * (16 * 128);
  uint8_t* const to = params.ds + place * kMaskedTileBytes + consumer * (2 * kStepRun) +
                      entry / 2 % 2 * kStepRun + own;
  BulkStore(to, ds + own, 16 * 128);
  cuda::BulkCommit();
}

template <bool kSelected>
__device__ __forceinline__ void MaskStep(const KeyShared& sh, int stage, const Item& item, int key,
                                         uint32_t (&p)[kStep / 16][4]) {
  if constexpr (kSelected) {
    uint32_t bits[2][kKeyWords];
#pragma unroll
    for (int i = 0; i < 2 * kKeyWords; ++i) {
      bits[i % 2][i / 2] = sh.bits[stage][i / 2][key + 8 * (i % 2)];
    }
    MaskPairs(p, bits);
  } else {
    MaskPairsByWindows(p, sh.windows[stage].begin, sh.windows[stage].end, item.tile * kTile + key);
  }
}

// Adds to the rows of a [S, H, kDim] fp32 matrix; each element is touched by one thread of the
// grid.
template <int kDim>
__device__ __forceinline__ void AddKeyGradient(float* to, const GradientParams& params,
                                               const Item& item, int key, float scale,
                                               const float (&d)[kDim / 2]) {
  const bool odd = threadIdx.x % 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int s = item.tile * kTile + key + 8 * r;
    // Lanes 2 i and 2 i + 1 exchange halves: each has four columns of every other group of eight.
    float* out = to + (static_cast<int64_t>(s) * params.args.num_heads + item.head) * kDim +
                 threadIdx.x % 4 / 2 * 4 + (odd ? 8 : 0);
#pragma unroll
    for (int j = 0; j < kDim / 8; j += 2) {
      const float2 low = make_float2(d[4 * j + 2 * r] * scale, d[4 * j + 2 * r + 1] * scale);
      const float2 high = make_float2(d[4 * j + 2 * r + 4] * scale, d[4 * j + 2 * r + 5] * scale);
      const float x = __shfl_xor_sync(kAllLanes, odd ? low.x : high.x, 1);
      const float y = __shfl_xor_sync(kAllLanes, odd ? low.y : high.y, 1);
      if (s >= params.args.keys.num_keys) continue;
      odd ? cuda::AddVector4(out + 8 * j, x, y, high.x, high.y)
          : cuda::AddVector4(out + 8 * j, low.x, low.y, x, y);
    }
  }
}

// Adds to fp32 sums, or writes bf16.
template <int kDim>
__device__ __forceinline__ void GiveKeyGradient(void* to, const GradientParams& params,
                                                const Item& item, int key, float scale,
                                                const float (&d)[kDim / 2]) {
  if (!params.args.writes_keys) {
    return AddKeyGradient<kDim>(static_cast<float*>(to), params, item, key, scale, d);
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int s = item.tile * kTile + key + 8 * r;
    const int64_t at = static_cast<int64_t>(s) * params.args.num_heads + item.head;
    StoreRow<kDim>(static_cast<uint4*>(to) + at * (kDim / 8), s < params.args.keys.num_keys, d, r,
                   scale);
  }
}

// Of keys that no row sees, where gradients are written.
template <int kDim>
__device__ __forceinline__ void StoreNoKeyGradient(void* to, const GradientParams& params,
                                                   const Item& item, int key) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int s = item.tile * kTile + key + 8 * r;
    if (s >= params.args.keys.num_keys) continue;
    const int64_t at = static_cast<int64_t>(s) * params.args.num_heads + item.head;
    uint4* const row = static_cast<uint4*>(to) + at * (kDim / 8);
    for (int j = threadIdx.x % 4; j < kDim / 8; j += 4) row[j] = make_uint4(0, 0, 0, 0);
  }
}

template <bool kSelected, bool kKeeps>
__device__ __forceinline__ void ConsumeForKeys(KeyShared& sh, const GradientParams& params,
                                               int consumer, int key) {
  const auto k_major = [](const void* shared, uint32_t offset) {
    return cuda::DescriptorKMajor(cuda::SharedAddress(shared) + offset);
  };
  const auto columns = [](const void* shared, uint32_t offset) {
    return cuda::DescriptorMnMajor(cuda::SharedAddress(shared) + offset, kStepRun);
  };
  const uint32_t own = consumer * 64 * 128;
  Ring<kItemStages> items;
  Ring<kStages> ring;
  uint32_t keys_phase = 0;
  for (;; items.Next()) {
    // Tile and head stay in shared memory until the end of the item.
    cuda::BarrierWait(&sh.items.full[items.stage], items.phase);
    const Item& item = sh.items.items[items.stage];
    int left = __shfl_sync(kAllLanes, item.steps, 0);
    if (left < 0) break;
    if (left > 0) {
      float dk[kQueryDim / 2], dv[kValueDim / 2], s[kStep / 2];
#pragma unroll
      for (float& x : dk) x = 0;
#pragma unroll
      for (float& x : dv) x = 0;
      uint32_t p[kStep / 16][4];
      int previous = -1;  // stage of the step before, until it is given back
      const auto multiply_scores = [&] {
        cuda::BarrierWait(&sh.full[ring.stage], ring.phase);
        cuda::WgmmaFence();
        MultiplyTransposed<kQueryRuns, kTile, kStep>(
            s, k_major(sh.k, own), k_major(sh.q, ring.stage * kQueryRuns * kStepRun));
      };
      const auto multiply_queries = [&] {
        cuda::WgmmaFence();
        MultiplyShared<kStep / 16, kQueryDim>(dk, k_major(sh.ds[consumer], 0),
                                              columns(sh.q, previous * kQueryRuns * kStepRun));
      };
      // From scores to dS; on its way dk of the stage before is done, which is given back, and dv
      // issued.
      const auto differentiate = [&](bool last) {
        cuda::PinRegisters(s);
        Exponentiate(s, sh.statistics[ring.stage], params.args.scale * kLog2E, p);
        if (sh.entry[ring.stage] & 1) MaskStep<kSelected>(sh, ring.stage, item, key, p);
        float dp[kStep / 2];
        cuda::WgmmaFence();
        MultiplyTransposed<kValueRuns, kTile, kStep>(
            dp, k_major(sh.v, own), k_major(sh.d_o, ring.stage * kValueRuns * kStepRun));
        MultiplyRegisters<kStep / 16, kValueDim>(
            dv, p, columns(sh.d_o, ring.stage * kValueRuns * kStepRun), true);
        cuda::WgmmaWait<1>();
        cuda::PinRegisters(dk);
        cuda::PinRegisters(dp);
        if (previous >= 0) Release(&sh.empty[previous]);
        if (last) Release(&sh.keys_empty);
        Differentiate<kKeeps>(p, dp, sh.statistics[ring.stage],
                              cuda::SharedAddress(sh.ds[consumer]));
        if constexpr (kKeeps) {
          KeepDifferences(params, sh.place[ring.stage], sh.entry[ring.stage], consumer,
                          cuda::SharedAddress(sh.ds[consumer]));
        }
        cuda::NamedSync(1 + consumer, 128);  // dS of all four warps is there
        previous = ring.stage;
        ring.Next();
      };

      cuda::BarrierWait(&sh.keys_full, keys_phase);
      keys_phase ^= 1;
      multiply_scores();
      cuda::WgmmaWait<0>();
      while (--left > 0) {
        differentiate(false);
        multiply_scores();
        multiply_queries();
        cuda::WgmmaWait<1>();  // dv and the scores
        cuda::PinRegisters(dv);
        PinOperand(p);
      }
      differentiate(true);
      multiply_queries();
      cuda::WgmmaWait<0>();
      cuda::PinRegisters(dk);
      cuda::PinRegisters(dv);
      PinOperand(p);
      Release(&sh.empty[previous]);
      GiveKeyGradient<kValueDim>(params.args.dv_SHV, params, item, key, 1.0f, dv);
      GiveKeyGradient<kQueryDim>(params.args.dk_SHQ, params, item, key, params.args.scale, dk);
    } else if (params.args.writes_keys) {
      StoreNoKeyGradient<kValueDim>(params.args.dv_SHV, params, item, key);
      StoreNoKeyGradient<kQueryDim>(params.args.dk_SHQ, params, item, key);
    }
    __syncwarp();
    Release(&sh.items.empty[items.stage]);
  }
  if (kKeeps && threadIdx.x % 32 == 0) cuda::BulkWaitRead<0>();
}

template <bool kSelected, bool kKeeps>
__global__ void __launch_bounds__(kThreads, 1)
    KeyGradientKernel(const __grid_constant__ GradientParams params,
                      const __grid_constant__ Work all_heads,
                      const __grid_constant__ CUtensorMap q_map,
                      const __grid_constant__ CUtensorMap do_map,
                      const __grid_constant__ CUtensorMap k_map,
                      const __grid_constant__ CUtensorMap v_map) {
  const Work work =
      kKeeps ? InRound(all_heads, params.schedule.rounds->heads, params.head_round) : all_heads;
  if (kKeeps && work.num_heads == 0) return;
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  KeyShared& sh = *reinterpret_cast<KeyShared*>(raw_shared);
  if (threadIdx.x == 0) {
    sh.items.Init(kConsumerWarps);
    cuda::BarrierInit(&sh.keys_full, 1);
    cuda::BarrierInit(&sh.keys_empty, kConsumerWarps);
    InitStages(sh.full, sh.empty, kConsumerWarps);
    cuda::FenceBarrierInit();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp >= kConsumerWarps) {
    cuda::LowerRegisters<24>();
    if (threadIdx.x == 32 * kConsumerWarps) {
      ProduceForKeys<kSelected, kKeeps>(sh, params, work, q_map, do_map, k_map, v_map);
    }
  } else {
    cuda::RaiseRegisters<240>();
    ConsumeForKeys<kSelected, kKeeps>(sh, params, __shfl_sync(kAllLanes, warp / 4, 0),
                                      warp * 16 + static_cast<int>(threadIdx.x) % 32 / 4);
  }
}

}  // namespace baleen::masked_attention
