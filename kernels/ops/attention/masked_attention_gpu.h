// Internal: dense attention of 192/128 heads in bf16 on tensor cores, over windows or lists of
// keys: which calls it takes, the memory it holds meanwhile, and the calls. attention.cc has
// checked the arguments.
#pragma once

#include "kernels/ops/attention/attention.h"
#include "kernels/ops/attention/masked_attention_plan_cuda.h"

namespace baleen {

// What a row sees. Without windows every row has all keys; without ids nothing is selected among
// them.
struct SeenKeys {
  KeyWindows windows;
  Tensor ids_TK;
};

// bf16, Q = 192, V = 128.
bool MaskedAttentionOnTensorCores(DType dtype, int64_t q_dim, int64_t v_dim);
// The same of a call, which has at least one key.
bool AttentionOnTensorCores(const Tensor& q_THQ, const Tensor& v_SHV);

// What a call holds beside its operands and results, under a use of its own; empty where the call
// is not for these kernels. A dry bf16 call takes it too, so that a plan knows it.
Tensor MakeMaskedAttentionWorkspace(const Context& context, const Tensor& q_THQ,
                                    const Tensor& v_SHV, const SeenKeys& seen,
                                    MaskedAttentionPass pass);

// Positive scales only: the maximum of the scaled scores is taken from the unscaled ones.
AttentionResult AttentionForwardOnTensorCores(const Context& context, const Tensor& q_THQ,
                                              const Tensor& k_SHQ, const Tensor& v_SHV,
                                              const SeenKeys& seen, double scale);
// dk and dv in fp32 are added to, in bf16 written. With ids, target_TK gets the head-summed
// probabilities; else it may be empty.
Tensor AttentionBackwardOnTensorCores(const Context& context, const Tensor& do_THV,
                                      const Tensor& q_THQ, const Tensor& k_SHQ, const Tensor& v_SHV,
                                      const AttentionResult& forward, const SeenKeys& seen,
                                      double scale, const Tensor& dk_SHQ, const Tensor& dv_SHV,
                                      const Tensor& target_TK);

}  // namespace baleen
