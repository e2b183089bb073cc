// Backward of sparse attention in the absorbed MQA form on sm_90a: structs of device
// pointers and a launch function; contracts are checked by the caller.
//
// Legend: T query rows, S keys, H heads, K selected keys a row, C = 576 (512 latent + 64 rope),
// V = 512 (the first columns of C).
#pragma once

#include <cstdint>

#include "kernels/ops/attention/sparse_attention_backward_plan_cuda.h"

namespace baleen {

struct SparseAttentionBackwardArgs : SparseAttentionBackwardShape {
  // Inputs.
  const void* q_THC = nullptr;      // bf16
  const void* kv_SC = nullptr;      // bf16
  const void* o_THV = nullptr;      // bf16, the forward's output
  const void* do_THV = nullptr;     // bf16
  const float* lse_TH = nullptr;    // natural log; +inf or -inf marks a row without keys: P = 0
  const int32_t* ids_TK = nullptr;  // ascending or not, distinct in a row; -1 only at a row's end
  // Packs of queries (sparse_attention_packs_cuda.h), which the device may choose to use; with
  // packs.queries = 1 there are none.
  SparseAttentionBackwardPacksPlan packs;
  const int32_t* entries_IU = nullptr;  // the bits of uint32
  const int32_t* counts_I = nullptr;
  int32_t* choice = nullptr;  // SparseAttentionBackwardChoiceInts, contents arbitrary
  // Outputs.
  void* dq_THC = nullptr;      // bf16, overwritten
  float* dkv_SC = nullptr;     // fp32, added to
  float* target_TK = nullptr;  // fp32, overwritten: sum over H of P (as bf16), 0 at -1
  float scale = 0;             // of the scores, YaRN's factor included
};

// Runs all launches on `stream`. `workspace` as sized above, 256-byte aligned, contents arbitrary.
// Bitwise reproducible for a given plan.
void LaunchSparseAttentionBackward(const SparseAttentionBackwardArgs& args,
                                   const SparseAttentionBackwardPlan& plan, void* workspace,
                                   void* stream);

}  // namespace baleen
