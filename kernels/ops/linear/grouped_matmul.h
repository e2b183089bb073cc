// Linear layers of several experts at once: rows of x are sorted by expert, expert l owns rows
// offsets[l]..offsets[l+1].
//
//   GroupedLinear                    y[n] = W[l(n)] x[n]    x [N, in]  W [L, out, in]  y [N, out]
//   GroupedLinearBackwardInput       dx[n] = W[l(n)]^T dy[n]
//   GroupedLinearBackwardInputOfTwo  dx[n] = Wa[l(n)]^T dya[n] + Wb[l(n)]^T dyb[n]
//   GroupedLinearBackwardWeight      dW[l] += sum_n dy[n] x[n]^T, or = for a step's first gradient
//
// OfTwo is the gradient of an input that two layers share (gate and up): one sum over both, without
// dx of either in memory. The sum of an expert without rows is zero: its dW stays as it is, or
// becomes zero where dW is written.
// CPU: all of one dtype, kF32 or kF64. CUDA: kBF16 or kF32, and dW kF32; the offsets stay on the
// device unread, so that nobody waits for them: the caller answers for their being as below. A
// row's bits depend on neither the other rows of the call nor, in dW, on other experts' rows.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"
#include "kernels/ops/linear/matmul.h"

namespace baleen {

// offsets_L1 [L + 1] kI32, non-decreasing from 0 to N; an expert may own no row.
Tensor GroupedLinear(const Context& context, const Tensor& x, const Tensor& weight_LOI,
                     const Tensor& offsets_L1);
Tensor GroupedLinearBackwardInput(const Context& context, const Tensor& dy,
                                  const Tensor& weight_LOI, const Tensor& offsets_L1);
Tensor GroupedLinearBackwardInputOfTwo(const Context& context, const Tensor& dya,
                                       const Tensor& weight_a_LOI, const Tensor& dyb,
                                       const Tensor& weight_b_LOI, const Tensor& offsets_L1);
void GroupedLinearBackwardWeight(const Context& context, const Tensor& dy, const Tensor& x,
                                 const Tensor& offsets_L1, const Tensor& dweight_LOI,
                                 Accumulate accumulate = Accumulate::kAdd);

}  // namespace baleen
