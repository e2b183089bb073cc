// Linear layers of several experts at once: rows of x are sorted by expert, expert l owns rows
// offsets[l]..offsets[l+1].
//
//   GroupedLinear               y[n] = W[l(n)] x[n]          x [N, in]  W [L, out, in]  y [N, out]
//   GroupedLinearBackwardInput  dx[n] = W[l(n)]^T dy[n]
//   GroupedLinearBackwardWeight dW[l] += sum_n dy[n] x[n]^T  (an expert without rows is left as it
//   is)
//
// CPU: all of one dtype, kF32 or kF64. CUDA: kBF16 or kF32, and dW kF32; the offsets stay on the
// device unread, so that nobody waits for them: the caller answers for their being as below. A
// row's bits depend on neither the other rows of the call nor, in dW, on other experts' rows.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

// offsets_L1 [L + 1] kI32, non-decreasing from 0 to N; an expert may own no row.
Tensor GroupedLinear(const Context& context, const Tensor& x, const Tensor& weight_LOI,
                     const Tensor& offsets_L1);
Tensor GroupedLinearBackwardInput(const Context& context, const Tensor& dy,
                                  const Tensor& weight_LOI, const Tensor& offsets_L1);
void GroupedLinearBackwardWeight(const Context& context, const Tensor& dy, const Tensor& x,
                                 const Tensor& offsets_L1, const Tensor& dweight_LOI);

}  // namespace baleen
