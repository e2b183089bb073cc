// Forward of dense attention in the 192/128 MHA form of MLA on sm_90a, over a window of keys for
// each row and, if given, a selection of them (attention.h has the mathematics):
//
//   S = scale * q.k,  P = softmax over the keys that the row sees,  o = sum_s P v_s,  lse = log sum
//   exp S
//
// Legend: T query rows, S keys, H heads, Q = 192, V = 128.
#pragma once

#include "kernels/ops/attention/masked_attention_plan_cuda.h"

namespace baleen {

// All bf16 tensors are 16-byte aligned. Same inputs, same bits: no sum depends on timing.
struct MaskedAttentionForwardArgs {
  MaskedAttentionKeys keys;
  const void* q_THQ = nullptr;  // bf16
  const void* k_SHQ = nullptr;  // bf16
  const void* v_SHV = nullptr;  // bf16
  int num_heads = 0;            // H
  float scale = 0;              // > 0
  void* o_THV = nullptr;        // bf16 out; 0 for a row without keys
  float* lse_TH = nullptr;      // out, natural log; -inf for a row without keys
  void* workspace = nullptr;    // 256-byte aligned, of the layout's bytes, contents arbitrary
};

void LaunchMaskedAttentionForward(const MaskedAttentionForwardArgs& args, void* stream);

}  // namespace baleen
