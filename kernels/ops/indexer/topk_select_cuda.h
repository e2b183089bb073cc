// Exact, deterministic top-k of score rows on the GPU.
//
// For each row t with the window [key_begin[t], key_end[t]) the k keys with the highest scores are
// chosen; of equal scores the LOWER key index wins, and -0.0 equals +0.0. A window of at most k
// keys is taken whole. Shape legend: T rows (queries), S keys, K = topk.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace baleen {

// The largest topk and the longest row (keys) that the kernel takes.
inline constexpr int kTopkSelectMaxK = 2048;
inline constexpr int kTopkSelectMaxKeys = 1 << 18;

struct TopkSelectArgs {
  const float* scores_TS = nullptr;      // [T, S] fp32, row t at scores_TS + t * score_stride
  int64_t score_stride = 0;              // elements between rows, >= num_keys
  const int32_t* key_begin_T = nullptr;  // [T]; null: 0
  // [T], exclusive; null: num_keys. Windows are clipped to [0, num_keys).
  const int32_t* key_end_T = nullptr;
  int num_rows = 0;           // T
  int num_keys = 0;           // S <= kTopkSelectMaxKeys
  int topk = 0;               // K, 1 .. kTopkSelectMaxK
  int32_t* ids_TK = nullptr;  // [T, K] out: chosen keys ascending, then -1
  // [T, K] out or null: the scores of ids_TK, 0 where the id is -1.
  float* chosen_scores_TK = nullptr;
  // [T] out or null: keys left out that equal the lowest chosen score.
  int32_t* ties_cut_T = nullptr;
  // [1] in/out or null: lowered to the first row with a NaN in its window; set it to INT32_MAX
  // before. Such a row gets ids of -1 only.
  int32_t* first_nan_row = nullptr;
};

// How one launch is laid out: one block per row.
struct TopkSelectPlan {
  int num_blocks = 0;
  int threads = 0;
  int shared_bytes = 0;
};

TopkSelectPlan PlanTopkSelect(int num_rows, int num_keys);

// Enqueues one kernel. The same inputs give the same bits, whatever the launch order.
cudaError_t LaunchTopkSelect(const TopkSelectArgs& args, cudaStream_t stream);

}  // namespace baleen
