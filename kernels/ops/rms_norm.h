// RMSNorm over the last dimension: y = x * rstd * weight, rstd = 1 / sqrt(mean(x^2) +
// eps).
//
//   dx = rstd * (g - x * rstd^2 * mean(g * x)),  g = dy * weight
//   dweight += sum over rows of dy * x * rstd
// x, weight, y, dy, dx are of one dtype: on the CPU kF32 or kF64, on CUDA kF32 or kBF16 (arithmetic
// in fp32, results rounded once). rstd and dweight are kF32 (kF64 for kF64 x).
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

struct RmsNormResult {
  Tensor y;     // like x
  Tensor rstd;  // [rows], kF32 (kF64 for kF64): saved for the backward
};

// x [.., D], weight [D].
RmsNormResult RmsNorm(const Context& context, const Tensor& x, const Tensor& weight, double eps);
Tensor RmsNormBackwardInput(const Context& context, const Tensor& dy, const Tensor& x,
                            const Tensor& weight, const Tensor& rstd);
void RmsNormBackwardWeight(const Context& context, const Tensor& dy, const Tensor& x,
                           const Tensor& rstd, const Tensor& dweight);

}  // namespace baleen
