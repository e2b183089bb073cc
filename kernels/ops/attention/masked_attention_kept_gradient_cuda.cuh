// Masked attention backward: dq where dS was kept. Rows stay, keys pass.
//
// dq = scale dS k, and nothing else: a consumer warpgroup has 128 rows, their dq in 192 registers a
// thread. dS comes from memory as the kernel of the keys had it, [64 keys][64 rows], so that it is
// the left operand as it lies. Two bytes of dS a pair and head from device memory bound it: 256
// rows share k, so that L2 gives 1.5 more.
#pragma once

#include "kernels/ops/attention/masked_attention_gradients_cuda.cuh"

namespace baleen::masked_attention {

constexpr int kKeptStages = 4;
constexpr int kKeptRun = 2 * kStepRun;  // of dS: 64 keys, a consumer's 128 rows

struct KeptShared {
  uint8_t k[kKeptStages][kQueryRuns * kStepRun];
  uint8_t ds[kKeptStages][2][kKeptRun];
  int present[kKeptStages];  // bit c: dS of consumer c; 0: the item's end
  ItemRing items;
  uint64_t full[kKeptStages], empty[kKeptStages];
};
static_assert(sizeof(KeptShared) <= 232448, "sm_90 gives a block 227 KiB");

// A warp: 32 tiles of keys are looked up at once.
__device__ __forceinline__ void ProduceKept(KeptShared& sh, const GradientParams& params,
                                            const Work& work, const CUtensorMap& k_map) {
  const MaskedAttentionSchedule& schedule = params.schedule;
  const int lane = threadIdx.x % 32, stride = schedule.padded_keys / kTile;
  const int num_tiles = (schedule.num_keys + kTile - 1) / kTile;
  const int tiles_of_head = __ldg(&schedule.rounds->tiles);
  const uint64_t policy = cuda::PolicyEvictFirst();
  Ring<kItemStages> items;
  Ring<kKeptStages> ring;
  int index = lane == 0 ? atomicAdd(work.counter, 1) : 0;
  const auto load_step = [&](const Item& item, int step, const int(&place)[2]) {
    uint64_t* const full = &sh.full[ring.stage];
    const int present = (place[0] >= 0) + 2 * (place[1] >= 0);
    cuda::BarrierWait(&sh.empty[ring.stage], ring.phase ^ 1);
    sh.present[ring.stage] = present;
    cuda::BarrierArriveExpect(full, kQueryRuns * kStepRun + __popc(present) * kKeptRun);
    LoadRuns<kQueryRuns, kStep>(sh.k[ring.stage], k_map, item.head * kQueryDim, step * kStep, full);
    for (int c = 0; c < 2; ++c) {
      if (place[c] < 0) continue;
      const int64_t tile = (item.head - work.first_head) * tiles_of_head + place[c];
      cuda::BulkLoadHint(cuda::SharedAddress(sh.ds[ring.stage][c]),
                         params.ds + tile * kMaskedTileBytes + step % 2 * kKeptRun, kKeptRun, full,
                         policy);
    }
  };
  for (;;) {
    Item item = {};
    if (lane == 0) item = sh.items.Draw(work, items, index);
    item.tile = __shfl_sync(kAllLanes, item.tile, 0);
    item.head = __shfl_sync(kAllLanes, item.head, 0);
    if (__shfl_sync(kAllLanes, item.steps, 0) < 0) return;
    const int32_t* const places = schedule.places + static_cast<int64_t>(2 * item.tile) * stride;
    for (int first = 0; first < num_tiles; first += 32) {
      const int own = first + lane;
      const int low = own < num_tiles ? __ldg(places + own) : -1;
      const int high = own < num_tiles ? __ldg(places + stride + own) : -1;
      uint32_t left = __ballot_sync(kAllLanes, low >= 0 || high >= 0);
      for (; left != 0; left &= left - 1) {
        const int from = __ffs(left) - 1;
        const int place[2] = {__shfl_sync(kAllLanes, low, from),
                              __shfl_sync(kAllLanes, high, from)};
        for (int half = 0; half < 2; ++half, ring.Next()) {
          if (lane == 0) load_step(item, 2 * (first + from) + half, place);
        }
      }
    }
    if (lane == 0) {
      cuda::BarrierWait(&sh.empty[ring.stage], ring.phase ^ 1);
      sh.present[ring.stage] = 0;
      cuda::BarrierArrive(&sh.full[ring.stage]);
    }
    __syncwarp();
    ring.Next();
  }
}

// Issues dq += dS k of 64 rows: dS [64 keys][64 rows].
__device__ __forceinline__ void MultiplyKept(float (&dq)[kQueryDim / 2], uint64_t ds, uint64_t k) {
  ds = cuda::Opaque(ds);
  k = cuda::Opaque(k);
#pragma unroll
  for (int step = 0; step < kStep / 16; ++step) {
    cuda::WgmmaBf16<kQueryDim, true, true>::Shared(dq, cuda::Advance(ds, step * 2048),
                                                   cuda::Advance(k, step * 2048), true);
  }
}

__device__ __forceinline__ void ConsumeKept(KeptShared& sh, const GradientParams& params,
                                            int consumer, int row) {
  const uint64_t k_columns = cuda::DescriptorMnMajor(cuda::SharedAddress(sh.k), kStepRun);
  const uint64_t ds_rows =
      cuda::DescriptorMnMajor(cuda::SharedAddress(sh.ds[0][consumer]), kStepRun);
  Ring<kItemStages> items;
  Ring<kKeptStages> ring;
  for (;;) {
    const Item item = sh.items.Take(items);
    if (item.steps < 0) return;
    float low[kQueryDim / 2], high[kQueryDim / 2];  // of the first and the last 64 rows
#pragma unroll
    for (int i = 0; i < kQueryDim / 2; ++i) low[i] = high[i] = 0;
    int previous = -1;  // stage whose products are in flight
    int present;
    do {
      cuda::BarrierWait(&sh.full[ring.stage], ring.phase);
      present = __shfl_sync(kAllLanes, sh.present[ring.stage], 0);
      if (present >> consumer & 1) {
        const uint64_t ds = cuda::Advance(ds_rows, ring.stage * 2 * kKeptRun);
        const uint64_t k = cuda::Advance(k_columns, ring.stage * kQueryRuns * kStepRun);
        cuda::WgmmaFence();
        MultiplyKept(low, ds, k);
        MultiplyKept(high, cuda::Advance(ds, kStepRun), k);
      }
      cuda::WgmmaCommit();  // of nothing too: the stage before is given back at each step
      cuda::WgmmaWait<1>();
      __syncwarp();  // all lanes have read what is present
      if (previous >= 0) Release(&sh.empty[previous]);
      previous = ring.stage;
      ring.Next();
    } while (present != 0);
    cuda::WgmmaWait<0>();
    cuda::PinRegisters(low);
    cuda::PinRegisters(high);
    Release(&sh.empty[previous]);
    const int first = item.tile * kMaskedKeptRows + consumer * kTile + row;
    StoreQueryGradient(params, item.head, first, low);
    StoreQueryGradient(params, item.head, first + 64, high);
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    KeptQueryGradientKernel(const __grid_constant__ GradientParams params,
                            const __grid_constant__ Work all_heads,
                            const __grid_constant__ CUtensorMap k_map) {
  const Work work = InRound(all_heads, params.schedule.rounds->heads, params.head_round);
  if (work.num_heads == 0) return;
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  KeptShared& sh = *reinterpret_cast<KeptShared*>(raw_shared);
  if (threadIdx.x == 0) {
    sh.items.Init(kConsumerWarps);
    InitStages(sh.full, sh.empty, kConsumerWarps);
    cuda::FenceBarrierInit();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp >= kConsumerWarps) {
    cuda::LowerRegisters<40>();
    if (warp == kConsumerWarps) ProduceKept(sh, params, work, k_map);
  } else {
    cuda::RaiseRegisters<232>();
    ConsumeKept(sh, params, __shfl_sync(kAllLanes, warp / 4, 0),
                warp % 4 * 16 + static_cast<int>(threadIdx.x) % 32 / 4);
  }
}

}  // namespace baleen::masked_attention
