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
};

__device__ __forceinline__ const float* StatisticsOf(const GradientParams& params, int head,
                                                     int step) {
  const int64_t steps = params.schedule.padded_rows / kStep;
  return params.statistics + (head * steps + step) * (2 * kStep);
}

}  // namespace baleen::masked_attention
