// Sparse attention in the absorbed MQA form: every head attends to the same K
// latent rows.
//
//   S = scale * q~_{t,h}.c~_s,  P = softmax over s in ids[t],  o~ = sum_s P c~_s[:V],  lse natural
//   D = do~.o~,  dS = P (do~.c_s[:V] - D),  dq~ = scale * sum_s dS c~_s
//   dc~_s += scale * sum_h dS q~  and  dc_s[:V] += sum_h P do~
//   target[t, i] = sum_h P[t, h, ids[t, i]]
//
// Legend: T query rows, S keys, H heads, C = kv_lora_rank + rope (576), V = kv_lora_rank (512),
// K selected keys.
// ids_TK kI32: key rows, each at most once per row, -1 = none; in the lists of a GPU's bf16 -1
// stands only at a row's end, as TopkSelect writes it.
// An empty row has o = 0, lse = -inf, gradient 0. The target is the sum over this rank's heads
// (0 where -1): ranks that split heads add theirs, then divide by all heads.
#pragma once

#include <string>

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

struct SparseAttentionResult {
  Tensor o_THV;
  Tensor lse_TH;
};

SparseAttentionResult SparseAttention(const Context& context, const Tensor& q_THC,
                                      const Tensor& kv_SC, const Tensor& ids_TK, int64_t value_dim,
                                      double scale);
// Returns dq_THC; adds to dkv_SC; overwrites target_TK.
Tensor SparseAttentionBackward(const Context& context, const Tensor& do_THV, const Tensor& q_THC,
                               const Tensor& kv_SC, const SparseAttentionResult& forward,
                               const Tensor& ids_TK, double scale, const Tensor& dkv_SC,
                               const Tensor& target_TK);

// What computes both on a GPU, in words: on tensor cores for bf16, C = 576, V = 512, up to 128
// heads and K up to 2048; else in fp32 on the ordinary cores.
std::string SparseAttentionKernelName(DType dtype, int64_t num_heads, int64_t width,
                                      int64_t value_dim, int64_t num_selected);

}  // namespace baleen
