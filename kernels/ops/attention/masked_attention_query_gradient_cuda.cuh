// Masked attention backward: dq. Rows stay, keys pass; masked_attention_backward_cuda.cu tells the
// story.
//
// A consumer warpgroup has 64 rows: dq in 96 registers a thread, S and dP of 64 keys in 32 each, dS
// as bf16 in 16. A step issues S and dP of its keys and dq += dS k of the keys before, so that the
// exponentials run beside the last two, and dS beside the last. So keys stay a step longer than
// values.
#pragma once

#include "kernels/ops/attention/masked_attention_gradients_cuda.cuh"

namespace baleen::masked_attention {

constexpr int kRowWords = kStep / 32;

struct RowShared {
  uint8_t q[kQueryRuns * kTileRun];
  uint8_t d_o[kValueRuns * kTileRun];
  uint8_t k[kStages][kQueryRuns * kStepRun];
  uint8_t v[kStages][kValueRuns * kStepRun];
  uint32_t bits[kStages][kRowWords][kTile];
  int entry[kStages];
  ItemRing items;
  uint64_t rows_full, rows_empty;
  uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(RowShared) <= 232448, "sm_90 gives a block 227 KiB");

template <bool kSelected>
__device__ void ProduceForRows(RowShared& sh, const GradientParams& params, const Work& work,
                               const CUtensorMap& q_map, const CUtensorMap& do_map,
                               const CUtensorMap& k_map, const CUtensorMap& v_map) {
  const MaskedAttentionSchedule& schedule = params.schedule;
  Ring<kItemStages> items;
  Ring<kStages> ring;
  uint32_t rows_phase = 0;
  int index = atomicAdd(work.counter, 1);
  for (;;) {
    const Item item = sh.items.Draw(work, items, index);
    if (item.steps < 0) return;
    const int32_t* list =
        work.lists.entries + static_cast<int64_t>(item.tile) * work.lists.stride + 1;
    int next = __ldg(list);
    for (int i = 0; i < item.steps; ++i, ring.Next()) {
      const int entry = next, first_key = entry / 2 * kStep;
      if (i + 1 < item.steps) next = __ldg(list + i + 1);
      uint64_t* full = &sh.full[ring.stage];
      const bool bits = kSelected && entry & 1;
      cuda::BarrierWait(&sh.empty[ring.stage], ring.phase ^ 1);
      sh.entry[ring.stage] = entry;
      cuda::BarrierArriveExpect(
          full, (kQueryRuns + kValueRuns) * kStepRun + (bits ? kRowWords * kTile * 4 : 0));
      LoadRuns<kQueryRuns, kStep>(sh.k[ring.stage], k_map, item.head * kQueryDim, first_key, full);
      LoadRuns<kValueRuns, kStep>(sh.v[ring.stage], v_map, item.head * kValueDim, first_key, full);
      if (bits) {
        const uint32_t* from = schedule.row_bits +
                               static_cast<int64_t>(first_key / 32) * schedule.padded_rows +
                               item.tile * kTile;
        for (int w = 0; w < kRowWords; ++w, from += schedule.padded_rows) {
          cuda::BulkLoad(cuda::SharedAddress(sh.bits[ring.stage][w]), from, kTile * 4, full);
        }
      }
      if (i == 0) {
        cuda::BarrierWait(&sh.rows_empty, rows_phase ^ 1);
        cuda::BarrierArriveExpect(&sh.rows_full, (kQueryRuns + kValueRuns) * kTileRun);
        LoadRuns<kQueryRuns, kTile>(sh.q, q_map, item.head * kQueryDim, item.tile * kTile,
                                    &sh.rows_full);
        LoadRuns<kValueRuns, kTile>(sh.d_o, do_map, item.head * kValueDim, item.tile * kTile,
                                    &sh.rows_full);
        rows_phase ^= 1;
      }
    }
  }
}

// What a consumer thread knows of its rows `row` and row + 8 of the tile.
struct RowPair {
  int row;
  int begin[2], end[2];
  float lse[2], delta[2];

  template <bool kSelected>
  __device__ __forceinline__ void Load(const GradientParams& params, const Item& item) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int in_tile = row + 8 * r, at = item.tile * kTile + in_tile;
      const float* from = StatisticsOf(params, item.head, at / kStep) + in_tile % kStep;
      lse[r] = __ldg(from);
      delta[r] = __ldg(from + kStep);
      if constexpr (!kSelected) {
        begin[r] = __ldg(params.schedule.begin_T + at);
        end[r] = __ldg(params.schedule.end_T + at);
      }
    }
  }
};

template <bool kSelected>
__device__ __forceinline__ void ConsumeForRows(RowShared& sh, const GradientParams& params,
                                               int consumer, int row) {
  const float scale = params.args.scale * kLog2E;
  const uint64_t q_rows = cuda::DescriptorKMajor(cuda::SharedAddress(sh.q) + consumer * 64 * 128);
  const uint64_t do_rows =
      cuda::DescriptorKMajor(cuda::SharedAddress(sh.d_o) + consumer * 64 * 128);
  const uint64_t k_keys = cuda::DescriptorKMajor(cuda::SharedAddress(sh.k));
  const uint64_t k_columns = cuda::DescriptorMnMajor(cuda::SharedAddress(sh.k), kStepRun);
  const uint64_t v_keys = cuda::DescriptorKMajor(cuda::SharedAddress(sh.v));
  Ring<kItemStages> items;
  Ring<kStages> ring;
  uint32_t rows_phase = 0;
  for (;;) {
    const Item item = sh.items.Take(items);
    if (item.steps < 0) return;
    float dq[kQueryDim / 2], s[kStep / 2], dp[kStep / 2];
    uint32_t ds[kStep / 16][4];
    RowPair rows = {row};
    rows.Load<kSelected>(params, item);
    int previous = 0;
    const auto multiply_scores = [&] {
      cuda::BarrierWait(&sh.full[ring.stage], ring.phase);
      cuda::WgmmaFence();
      MultiplyTransposed<kQueryRuns, kTile, kStep>(
          s, q_rows, cuda::Advance(k_keys, ring.stage * kQueryRuns * kStepRun));
      MultiplyTransposed<kValueRuns, kTile, kStep>(
          dp, do_rows, cuda::Advance(v_keys, ring.stage * kValueRuns * kStepRun));
    };
    const auto multiply_keys = [&](bool accumulate) {
      cuda::WgmmaFence();
      MultiplyRegisters<kStep / 16, kQueryDim>(
          dq, ds, cuda::Advance(k_columns, previous * kQueryRuns * kStepRun), accumulate);
    };
    // s becomes P.
    const auto exponentiate = [&] {
      cuda::PinRegisters(s);
      const int entry = sh.entry[ring.stage];
      if (entry & 1) {
        uint32_t bits[2][kRowWords];
#pragma unroll
        for (int r = 0; r < 2; ++r) {
#pragma unroll
          for (int w = 0; w < kRowWords; ++w) {
            bits[r][w] = kSelected
                             ? sh.bits[ring.stage][w][row + 8 * r]
                             : WindowBits(rows.begin[r], rows.end[r], entry / 2 * kStep + 32 * w);
          }
        }
        MaskScores(s, bits);
      }
#pragma unroll
      for (int i = 0; i < kStep / 2; ++i) {
        s[i] = cuda::Exp2(fmaf(s[i], scale, -rows.lse[i / 2 % 2]));
      }
    };
    // s becomes dS.
    const auto differentiate = [&] {
      cuda::PinRegisters(dp);
#pragma unroll
      for (int i = 0; i < kStep / 2; ++i) s[i] *= dp[i] - rows.delta[i / 2 % 2];
    };
    const auto next = [&] {
      PackOperand(s, ds);
      previous = ring.stage;
      ring.Next();
    };
    const auto finish_keys = [&] {
      cuda::WgmmaWait<0>();
      cuda::PinRegisters(dq);
      PinOperand(ds);
      __syncwarp();  // all lanes have read the entry and the bits
      Release(&sh.empty[previous]);
    };

    cuda::BarrierWait(&sh.rows_full, rows_phase);
    rows_phase ^= 1;
    multiply_scores();
    cuda::WgmmaWait<1>();
    exponentiate();
    cuda::WgmmaWait<0>();
    differentiate();
    if (item.steps == 1) Release(&sh.rows_empty);
    next();
    for (int i = 1; i < item.steps; ++i) {
      multiply_scores();
      multiply_keys(i > 1);
      cuda::WgmmaWait<2>();
      exponentiate();
      cuda::WgmmaWait<1>();
      differentiate();
      if (i + 1 == item.steps) Release(&sh.rows_empty);
      finish_keys();
      next();
    }
    multiply_keys(item.steps > 1);
    finish_keys();
    StoreQueryGradient(params, item.head, item.tile * kTile + row, dq);
  }
}

template <bool kSelected>
__global__ void __launch_bounds__(kThreads, 1)
    QueryGradientKernel(const __grid_constant__ GradientParams params,
                        const __grid_constant__ Work work,
                        const __grid_constant__ CUtensorMap q_map,
                        const __grid_constant__ CUtensorMap do_map,
                        const __grid_constant__ CUtensorMap k_map,
                        const __grid_constant__ CUtensorMap v_map) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  RowShared& sh = *reinterpret_cast<RowShared*>(raw_shared);
  if (threadIdx.x == 0) {
    sh.items.Init(kConsumerWarps);
    cuda::BarrierInit(&sh.rows_full, 1);
    cuda::BarrierInit(&sh.rows_empty, kConsumerWarps);
    InitStages(sh.full, sh.empty, kConsumerWarps);
    cuda::FenceBarrierInit();
  }
  __syncthreads();
  const int warp = threadIdx.x / 32;
  if (warp >= kConsumerWarps) {
    cuda::LowerRegisters<40>();
    if (threadIdx.x == 32 * kConsumerWarps) {
      ProduceForRows<kSelected>(sh, params, work, q_map, do_map, k_map, v_map);
    }
  } else {
    cuda::RaiseRegisters<232>();
    ConsumeForRows<kSelected>(sh, params, __shfl_sync(kAllLanes, warp / 4, 0),
                              warp * 16 + static_cast<int>(threadIdx.x) % 32 / 4);
  }
}

}  // namespace baleen::masked_attention
