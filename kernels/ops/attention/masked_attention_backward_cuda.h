// Backward of dense attention in the 192/128 MHA form of MLA on sm_90a, over a window of keys for
// each row and, if given, a selection of them (attention.h has the mathematics):
//
//   P = exp(S - lse),  D = do.o,  dS = P (do.v_s - D)
//   dq = scale sum_s dS k_s,  dk_s += scale sum_t dS q,  dv_s += sum_t P do
//
// Legend: T query rows, S keys, H heads, Q = 192, V = 128.
#pragma once

#include "kernels/ops/attention/masked_attention_plan_cuda.h"

namespace baleen {

// All bf16 tensors are 16-byte aligned, fp32 ones too. Same inputs, same bits: every sum has a
// fixed order, and each element of dk and dv is added to, or written, once.
struct MaskedAttentionBackwardArgs {
  MaskedAttentionKeys keys;
  const void* q_THQ = nullptr;    // bf16
  const void* k_SHQ = nullptr;    // bf16
  const void* v_SHV = nullptr;    // bf16
  const void* o_THV = nullptr;    // bf16, the forward's
  const float* lse_TH = nullptr;  // the forward's, natural log; infinite for a row without keys
  const void* do_THV = nullptr;   // bf16
  int num_heads = 0;              // H
  float scale = 0;                // > 0
  void* dq_THQ = nullptr;         // bf16 out; 0 for a row without keys
  void* dk_SHQ = nullptr;         // fp32, added to; or bf16, written
  void* dv_SHV = nullptr;         // likewise
  bool writes_keys = false;       // dk and dv are bf16
  float* target_TK = nullptr;  // with ids: sum over heads of P, 0 where a row does not see the id
  void* workspace = nullptr;   // 256-byte aligned, of the layout's bytes, contents arbitrary
};

void LaunchMaskedAttentionBackward(const MaskedAttentionBackwardArgs& args, void* stream);

}  // namespace baleen
