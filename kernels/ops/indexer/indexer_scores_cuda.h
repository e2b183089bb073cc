// Lightning-indexer scores on the GPU (sm_90a):
//
//   I[t, s] = k_scale[s] * sum_j w[t, j] * relu(q[t, j] . k[s]),   key_begin[t] <= s < key_end[t]
//
// Shape legend: T query rows, S keys, I index heads (64 or 32), J = 128 index_head_dim.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace baleen {

// What is written: the scores inside each row's window. All other elements keep what they held; a
// reader stays inside the windows (TopkSelect does). The order of sums is fixed: the same inputs
// give the same bits.
struct IndexerScoresArgs {
  const void* q_TIJ = nullptr;  // [T, I, 128] bf16 or e4m3, 16-byte aligned
  const void* k_SJ = nullptr;   // [S, 128] the same type, 16-byte aligned
  const float* w_TI = nullptr;  // [T, I] fp32, 16-byte aligned, with I^-0.5 J^-0.5 in it
  // [T, I] fp32, 16-byte aligned, e4m3 only: of q's heads; null: in w.
  const float* q_scale_TI = nullptr;
  const float* k_scale_S = nullptr;      // [S] fp32 > 0, e4m3 only
  const int32_t* key_begin_T = nullptr;  // [T]; null: 0
  const int32_t* key_end_T = nullptr;    // [T], exclusive; null: S. Windows are clipped to [0, S)
  int num_rows = 0;                      // T
  int num_keys = 0;                      // S
  int num_heads = 0;                     // I: 64 or 32
  float* scores_TS = nullptr;            // out, row t at scores_TS + t * score_stride
  int64_t score_stride = 0;              // elements, >= S
};

enum class IndexerDtype { kBf16, kE4m3 };

struct IndexerScoresPlan {
  int num_blocks = 0;  // persistent: at most one per SM
  int threads = 0;
  int shared_bytes = 0;
  int rows_per_tile = 0;  // query rows that share one tile of keys
};

IndexerScoresPlan PlanIndexerScores(IndexerDtype dtype, int num_rows, int num_keys, int num_heads,
                                    int num_sms);

// Enqueues one kernel.
cudaError_t LaunchIndexerScores(IndexerDtype dtype, const IndexerScoresArgs& args,
                                cudaStream_t stream);

}  // namespace baleen
