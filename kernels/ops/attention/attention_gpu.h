// Internal: which kernels of a GPU compute dense attention, the memory they take meanwhile, and the
// calls. attention.cc has checked the arguments.
//
// Heads of 192/128 in bf16 run on Baleen's tensor-core kernels, whatever the windows, lists, rows
// and number of heads: measured against cuDNN from 64 to 32K rows, 1 to 128 heads, documents of 256
// to 4000 rows and chunks of rows, the backward takes 0.49 to 1.04 of cuDNN's time and the forward
// 0.57 to 1.10 (kernels/bench/RESULTS_attention.md), and no run of rows is too short. Of other
// heads in bf16 the causal segments go to cuDNN (attention_segments.h); the general kernels take
// the rest.
#pragma once

#include <string>
#include <vector>

#include "kernels/ops/attention/attention.h"
#include "kernels/ops/attention/masked_attention_gpu.h"

namespace baleen {

// dk and dv are bf16: written. Else they are fp32 sums (attention.h).
bool KeyGradientsAreWritten(const Tensor& dk_SHQ);

// In a dry call: what AttentionBackward holds on a GPU beside its operands and results.
std::vector<Tensor> PlanAttentionBackward(const Context& context, const Tensor& q_THQ,
                                          const Tensor& k_SHQ, const Tensor& v_SHV,
                                          const KeyWindows& windows, const Tensor& dk_SHQ);

AttentionResult AttentionOnCuda(const Context& context, const Tensor& q_THQ, const Tensor& k_SHQ,
                                const Tensor& v_SHV, const KeyWindows& windows, double scale);
Tensor AttentionBackwardOnCuda(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                               const Tensor& k_SHQ, const Tensor& v_SHV,
                               const AttentionResult& forward, const KeyWindows& windows,
                               double scale, const Tensor& dk_SHQ, const Tensor& dv_SHV);
AttentionResult MaskedAttentionOnCuda(const Context& context, const Tensor& q_THQ,
                                      const Tensor& k_SHQ, const Tensor& v_SHV,
                                      const Tensor& ids_TK, double scale);
Tensor MaskedAttentionBackwardOnCuda(const Context& context, const Tensor& do_THV,
                                     const Tensor& q_THQ, const Tensor& k_SHQ, const Tensor& v_SHV,
                                     const AttentionResult& forward, const Tensor& ids_TK,
                                     double scale, const Tensor& dk_SHQ, const Tensor& dv_SHV,
                                     const Tensor& target_TK);
std::string AttentionCudaKernelName(const Context& context, DType dtype, int64_t q_dim,
                                    int64_t v_dim, const KeyWindows& windows);

}  // namespace baleen
