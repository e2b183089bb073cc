// Dense warm-up of the lightning indexer on the GPU (sm_90a): KL of the main attention's
// head-summed probabilities against the indexer's softmax over each row's whole window of keys, and
// its backward. For key_begin[t] <= s < key_end[t]:
//
//   p[t,s] = 1/H sum_h exp(scale q_h.k_h - lse[t,h])
//   I[t,s] = sum_j w[t,j] relu(a_j),  a_j = q_j.k_s
//   loss[t] = sum_s p (ln p - I + lse_I),  delta = exp(I - lse_I) - p
//   dw_j = g sum_s delta relu(a_j)
//   dq_j = g w_j sum_s delta 1[a_j > 0] k_s
//   dk_s += g sum_t delta sum_j w_j 1[a_j > 0] q_j
//
// Shape legend: T query rows (any subset of a sequence's), S keys, H main heads, Q = 192, I = 64
// index heads, J = 128 index_head_dim.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace baleen {

inline constexpr int kDenseIndexerHeads = 64;

// Operands of the products are bf16 (delta and w rounded), sums fp32. Every order of sums is fixed:
// the same inputs on the same kind of GPU give the same bits.
struct DenseIndexerLossArgs {
  const void* q_TIJ = nullptr;           // [T, 64, 128] bf16, 16-byte aligned, as all bf16 inputs
  const void* k_SJ = nullptr;            // [S, 128] bf16
  const float* w_TI = nullptr;           // [T, 64] fp32 with I^-0.5 J^-0.5 in it, 16-byte aligned
  const void* main_q_THQ = nullptr;      // [T, H, 192] bf16
  const void* main_k_SHQ = nullptr;      // [S, H, 192] bf16
  const float* lse_TH = nullptr;         // [T, H] natural log, over the row's window
  const int32_t* key_begin_T = nullptr;  // [T]
  const int32_t* key_end_T = nullptr;    // [T], exclusive; begin >= end: a row without keys
  float softmax_scale = 1.0f;
  float grad_scale = 1.0f;    // g
  int num_rows = 0;           // T
  int num_keys = 0;           // S >= 1
  int num_main_heads = 0;     // H >= 1
  float* loss_T = nullptr;    // [T] out, not scaled by g; 0 for a row without keys
  float* dw_TI = nullptr;     // [T, 64] out
  void* dq_TIJ = nullptr;     // [T, 64, 128] bf16 out, 16-byte aligned
  float* dk_SJ = nullptr;     // [S, 128] fp32, 16-byte aligned, added to
  void* workspace = nullptr;  // 256-byte aligned, as large as the plan says
};

// Rows go through the kernels in chunks, so that scores, delta and the relu masks of a chunk (14
// bytes a pair) and never of all rows exist at once.
struct DenseIndexerLossPlan {
  int rows_per_chunk = 0;  // a multiple of 256
  size_t workspace_bytes = 0;
};

// The most rows a chunk that `most_bytes` holds (never below 256 rows, which may need more); chunks
// of about equal size.
DenseIndexerLossPlan PlanDenseIndexerLoss(int num_rows, int num_keys, int num_sms,
                                          size_t most_bytes);

// Enqueues one kernel and eight a chunk. Adding into dk_SJ goes chunk by chunk, so another
// rows_per_chunk rounds differently.
cudaError_t LaunchDenseIndexerLoss(const DenseIndexerLossArgs& args,
                                   const DenseIndexerLossPlan& plan, cudaStream_t stream);

}  // namespace baleen
