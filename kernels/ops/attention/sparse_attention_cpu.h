// The CPU definitions behind sparse_attention.h, for float and double. sparse_attention.cc has
// checked the arguments.
#pragma once

#include "kernels/ops/attention/sparse_attention.h"

namespace baleen {

template <typename T>
struct SparseAttentionCpu {
  static SparseAttentionResult Forward(const Context& context, const Tensor& q_THC,
                                       const Tensor& kv_SC, const Tensor& ids_TK, int64_t value_dim,
                                       double scale);
  static Tensor Backward(const Context& context, const Tensor& do_THV, const Tensor& q_THC,
                         const Tensor& kv_SC, const SparseAttentionResult& forward,
                         const Tensor& ids_TK, double scale, const Tensor& dkv_SC,
                         const Tensor& target_TK);
};

}  // namespace baleen
