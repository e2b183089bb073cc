// LayerNorm with bias over the last dimension, the indexer's k_norm (eps 1e-6):
//
//   xhat = (x - mean) * rstd,  y = xhat * weight + bias,  rstd = 1 / sqrt(var(x) + eps)  (biased)
//   dx = rstd * (g - mean(g) - xhat * mean(g * xhat)),  g = dy * weight
//   dweight += sum dy * xhat;  dbias += sum dy
// x, weight, bias, y, dy, dx are of one dtype: on the CPU kF32 or kF64, on CUDA kF32 or kBF16
// (arithmetic in fp32, results rounded once). mean, rstd, dweight, dbias: kF32 (kF64 for kF64 x).
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

struct LayerNormResult {
  Tensor y;
  Tensor mean;  // [rows]
  Tensor rstd;  // [rows]
};

LayerNormResult LayerNorm(const Context& context, const Tensor& x, const Tensor& weight,
                          const Tensor& bias, double eps);
Tensor LayerNormBackwardInput(const Context& context, const Tensor& dy, const Tensor& x,
                              const Tensor& weight, const Tensor& mean, const Tensor& rstd);
void LayerNormBackwardWeight(const Context& context, const Tensor& dy, const Tensor& x,
                             const Tensor& mean, const Tensor& rstd, const Tensor& dweight,
                             const Tensor& dbias);

}  // namespace baleen
