// The CPU definitions behind attention.h, for float and double. attention.cc has checked the
// arguments.
#pragma once

#include "kernels/ops/attention/attention.h"

namespace baleen {

template <typename T>
struct AttentionCpu {
  static AttentionResult Forward(const Context& context, const Tensor& q_THQ, const Tensor& k_SHQ,
                                 const Tensor& v_SHV, const KeyWindows& windows, double scale);
  static Tensor Backward(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                         const Tensor& k_SHQ, const Tensor& v_SHV, const AttentionResult& forward,
                         const KeyWindows& windows, double scale, const Tensor& dk_SHQ,
                         const Tensor& dv_SHV);
};

template <typename T>
struct MaskedAttentionCpu {
  static AttentionResult Forward(const Context& context, const Tensor& q_THQ, const Tensor& k_SHQ,
                                 const Tensor& v_SHV, const Tensor& ids_TK, double scale);
  static Tensor Backward(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                         const Tensor& k_SHQ, const Tensor& v_SHV, const AttentionResult& forward,
                         const Tensor& ids_TK, double scale, const Tensor& dk_SHQ,
                         const Tensor& dv_SHV, const Tensor& target_TK);
};

}  // namespace baleen
