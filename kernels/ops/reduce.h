// Sums for norms, losses and metrics, always accumulated in fp64 and in a fixed order.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

// result_1 (kF64 [1]) += sum of x^2 (NaN and infinity propagate).
void AddSumOfSquares(const Context& context, const Tensor& x, const Tensor& result_1);
// result_1 (kF64 [1]) += sum of x.
void AddSum(const Context& context, const Tensor& x, const Tensor& result_1);

}  // namespace baleen
