// What the two kernels of the masked attention backward share.
#pragma once

#include "kernels/ops/attention/masked_attention_backward_cuda.h"
#include "kernels/ops/attention/masked_attention_tiles_cuda.cuh"

namespace baleen::masked_attention {

constexpr int kTile = kMaskedTile;     // rows, or keys, that stay
constexpr int kStep = kMaskedStep;     // keys, or rows, that pass
constexpr int kTileRun = kTile * 128;  // bytes of a run of 64 columns
constexpr int kStepRun = kStep * 128;
constexpr int kStages = 3;

struct GradientParams {
  MaskedAttentionBackwardArgs args;
  MaskedAttentionSchedule schedule;
  // [H, padded T / 64, 2, 64]: log2(e) lse, +inf for rows without keys or beyond T, so that P = 0;
  // D.
  float* statistics;
  // Kept dS: tiles [keys' half][rows' half] of [64 keys][64 rows], as they were in shared memory.
  uint8_t* ds;
  int head_round = 0;
};

__device__ __forceinline__ const float* StatisticsOf(const GradientParams& params, int head,
                                                     int step) {
  const int64_t steps = params.schedule.padded_rows / kStep;
  return params.statistics + (head * steps + step) * (2 * kStep);
}

// dq of the rows t and t + 8.
__device__ __forceinline__ void StoreQueryGradient(const GradientParams& params, int head, int t,
                                                   const float (&dq)[kQueryDim / 2]) {
  const MaskedAttentionBackwardArgs& args = params.args;
#pragma unroll
  for (int r = 0; r < 2; ++r, t += 8) {
    const int64_t at = static_cast<int64_t>(t) * args.num_heads + head;
    StoreRow<kQueryDim>(static_cast<uint4*>(args.dq_THQ) + at * (kQueryDim / 8),
                        t < args.keys.num_rows, dq, r, args.scale);
  }
}

}  // namespace baleen::masked_attention
