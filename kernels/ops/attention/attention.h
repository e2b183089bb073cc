// Dense attention in the 192/128 MHA form of MLA, per head, over a window of keys for each query
// row:
//
//   S = scale * q.k,  P = softmax over s in [key_begin[t], key_end[t])
//   o = sum_s P v_s,  lse = log sum exp S (natural)
//   D = do.o,  dS = P (do.v_s - D)
//   dq = scale * sum_s dS k_s,  dk_s += scale * dS q,  dv_s += P do
//
// Windows make causality, packed samples, document masks, chunks of query rows and context
// parallelism one thing. With ids (sparse stage in masked form) the softmax runs over the listed
// keys only; the same mathematics as sparse_attention.h (DeepSeek-V3.2 report 2.1, eq. 2). An empty
// row has o = 0, lse = -inf and gradient 0. Never a whole T x S array: what a kernel keeps of it is
// bounded.
//
// Legend: T query rows, S keys, H heads, Q = 192, V = 128, K selected keys.
#pragma once

#include <string>

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

// Which keys each query row may see: kI32 [T] each, 0 <= begin <= end <= S.
struct KeyWindows {
  Tensor begin_T;
  Tensor end_T;
  // The same values in host memory, where begin_T and end_T lie on a GPU: long runs of rows whose
  // windows make a causal triangle go to a kernel of their own. May be empty.
  Tensor host_begin_T;
  Tensor host_end_T;

  KeyWindows Rows(int64_t begin, int64_t end) const;
};

struct AttentionResult {
  Tensor o_THV;
  Tensor lse_TH;  // kF32 (kF64 for kF64)
};

// What runs Attention for such heads and windows, for people: "tensor cores", "cuDNN 9.19.0 SDPA, 3
// segments", "general kernels: BF16 heads 160/64", "CPU definition". Heads of 192/128 in bf16 run
// on Baleen's tensor-core kernels, whatever the windows (masked_attention_gpu.h). Of other widths
// in bf16 cuDNN takes runs of rows (256 or more) whose windows make a causal triangle, where the
// windows have host copies; the general kernels take everything else and are many times slower.
std::string AttentionKernelName(const Context& context, DType dtype, int64_t q_dim, int64_t v_dim,
                                const KeyWindows& windows);
// What runs MaskedAttention on a GPU: tensor cores for bf16 and 192/128 heads.
std::string MaskedAttentionKernelName(DType dtype, int64_t q_dim, int64_t v_dim);

AttentionResult Attention(const Context& context, const Tensor& q_THQ, const Tensor& k_SHQ,
                          const Tensor& v_SHV, const KeyWindows& windows, double scale);
// Returns dq_THQ. dk_SHQ and dv_SHV are fp32 sums (kF64 for kF64), added to; or, beside bf16
// operands, bf16: written, each element rounded once, for a call that has all rows which see the
// keys.
Tensor AttentionBackward(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                         const Tensor& k_SHQ, const Tensor& v_SHV, const AttentionResult& forward,
                         const KeyWindows& windows, double scale, const Tensor& dk_SHQ,
                         const Tensor& dv_SHV);

// The same over the keys of ids_TK (kI32, -1 = none). The backward also gives the head-summed
// probabilities target_TK[t, i] = sum_h P[t, h, ids[t, i]] (0 where -1), the indexer's target
// before division by the head count.
AttentionResult MaskedAttention(const Context& context, const Tensor& q_THQ, const Tensor& k_SHQ,
                                const Tensor& v_SHV, const Tensor& ids_TK, double scale);
Tensor MaskedAttentionBackward(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                               const Tensor& k_SHQ, const Tensor& v_SHV,
                               const AttentionResult& forward, const Tensor& ids_TK, double scale,
                               const Tensor& dk_SHQ, const Tensor& dv_SHV, const Tensor& target_TK);

}  // namespace baleen
