// KL loss of the lightning indexer on the selected keys and its whole backward, on the GPU
// (sm_90a):
//
//   a[t,i,j] = q[t,j] . k[ids[t,i]];  score = sum_j w[t,j] relu(a)
//   pi = softmax of score over the row's chosen keys;  p = target_scale * target;  P[t] = sum_i p
//
//   loss[t] = sum_i p ln p - sum_i p score + P lse      (0 ln 0 = 0)
//   delta   = grad_scale * (pi * P - p)
//   dw[t,j] = sum_i delta relu(a)
//   dq[t,j] = w[t,j] sum_i delta 1[a > 0] k[ids[t,i]]
//   dk[s]  += sum over (t, i) with ids[t,i] = s of delta sum_j w[t,j] 1[a > 0] q[t,j]
//
// Deterministic: dk is summed in 32-bit integers with a power-of-two scale of each key's own,
// chosen from an exact bound so that no sum can overflow; the rounding of a key's sum is below
// 2^-29 sqrt(n) of the sum of the n magnitudes. Operands of the products are bf16 (q, k as given;
// delta and w rounded), accumulation is fp32. Shape legend: T query rows, S keys, K chosen keys of
// a row, I index heads (64 or 32), J = 128.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

namespace baleen {

inline constexpr int kIndexerBackwardMaxK = 2048;

struct IndexerBackwardArgs {
  const void* q_TIJ = nullptr;  // [T, I, 128] bf16, 16-byte aligned
  const void* k_SJ = nullptr;   // [S, 128] bf16, 16-byte aligned
  const float* w_TI = nullptr;  // [T, I] fp32 with I^-0.5 J^-0.5 in it, 16-byte aligned
  // [T, K]: distinct in a row and ascending (in another order: right, but slower); -1 = none.
  const int32_t* ids_TK = nullptr;
  const float* target_TK = nullptr;  // [T, K] fp32 >= 0, finite; ignored where the id is -1
  // [T, K] fp32 scores of the ids if at hand (TopkSelect gives them); null: computed here from q,
  // k, w. The masks of the gradient always come from q and k.
  const float* scores_TK = nullptr;
  float target_scale = 1.0f;  // 1 / (number of main heads over all ranks)
  float grad_scale = 1.0f;    // g
  int num_rows = 0;           // T
  int num_keys = 0;           // S, 1 .. 2^28 - 1
  int num_heads = 0;          // I
  int topk = 0;               // K <= kIndexerBackwardMaxK
  float* loss_T = nullptr;    // [T] out, not scaled by g; 0 for a row without keys
  float* dw_TI = nullptr;     // [T, I] out
  void* dq_TIJ = nullptr;     // [T, I, 128] bf16 out
  float* dk_SJ = nullptr;     // [S, 128] fp32, 16-byte aligned, added to
  void* workspace = nullptr;  // IndexerBackwardWorkspaceBytes, 256-byte aligned
};

// 8 T K + 524 S bytes and a little. Rows can be given in chunks (of whole groups of four, which go
// together) to bound it: dk adds up over the calls in their order.
size_t IndexerBackwardWorkspaceBytes(int num_rows, int num_keys, int topk);

struct IndexerBackwardPlan {
  int gradient_blocks = 0;  // persistent, a group of four rows at a time
  int gradient_shared_bytes = 0;
};

IndexerBackwardPlan PlanIndexerBackward(int num_rows, int num_sms);

// Enqueues six kernels and one memset.
cudaError_t LaunchIndexerBackward(const IndexerBackwardArgs& args, cudaStream_t stream);

}  // namespace baleen
