// Sums for norms, losses and metrics, always accumulated in fp64 and in a fixed order.
//
// x is kF32 or kF64, on CUDA kBF16 too; results are kF64 [1] and are added to. NaN and infinity
// propagate.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

// result_1 += sum of x^2.
void AddSumOfSquares(const Context& context, const Tensor& x, const Tensor& result_1);
// result_1 += sum of x.
void AddSum(const Context& context, const Tensor& x, const Tensor& result_1);
// result_1 += sum of the integers x (kI32).
void AddIntSum(const Context& context, const Tensor& x, const Tensor& result_1);
// result_1 += factor * sum of a * b; same dtype and shape.
void AddDot(const Context& context, const Tensor& a, const Tensor& b, double factor,
            const Tensor& result_1);
// result_1 += value.
void AddConstant(const Context& context, double value, const Tensor& result_1);

}  // namespace baleen
