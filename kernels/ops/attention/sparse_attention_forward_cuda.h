// Forward of sparse attention in the absorbed MQA form on sm_90a: o = softmax(scale q
// kv^T over the selected keys) kv[:, :512]. Contracts are checked by the caller.
//
// Legend: T query rows, S keys, H heads, K selected keys a row, C = 576, V = 512.
#pragma once

#include <cstdint>

#include "kernels/ops/attention/sparse_attention_forward_plan_cuda.h"

namespace baleen {

struct SparseAttentionForwardArgs {
  const void* q_THC = nullptr;  // bf16
  const void* kv_SC = nullptr;  // bf16
  // Distinct in a row, -1 only at a row's end; of packs the entries_IU (the bits of uint32).
  const int32_t* ids_TK = nullptr;
  void* o_THV = nullptr;    // bf16; 0 in rows without keys
  float* lse_TH = nullptr;  // natural log; -inf in rows without keys
  int num_tokens = 0;       // T
  int num_heads = 0;        // 1..128, padded to tiles of 64
  int num_selected = 0;     // K, a multiple of 64, at most 2048; of packs U
  float scale = 0;          // of the scores, YaRN's factor included
  // Packs of queries that share 64 rows (sparse_attention_packs_cuda.h); 1 = none.
  int queries_a_pack = 1;
  const int32_t* counts_I = nullptr;
  float* parts = nullptr;  // SparseAttentionForwardPartFloats; null = no work is divided
};

// The result does not depend on the order of launches: bitwise reproducible.
void LaunchSparseAttentionForward(const SparseAttentionForwardArgs& args, void* stream);

}  // namespace baleen
