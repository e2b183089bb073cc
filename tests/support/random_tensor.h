// Random and literal tensors for tests, and comparison of tensors by relative error and cosine.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/core/context.h"

namespace baleen::testing {

// Normal(0, scale) values of the given dtype (kF32 or kF64), a function of `seed`.
Tensor RandomTensor(const Context& context, DType dtype, Shape shape, uint64_t seed,
                    double scale = 1.0);
Tensor TensorOf(const Context& context, DType dtype, Shape shape,
                const std::vector<double>& values);
Tensor IntTensorOf(const Context& context, Shape shape, const std::vector<int32_t>& values);

// Elements of a kF32, kF64, kBF16, kI32 or kI64 tensor as doubles.
std::vector<double> ToDoubles(const Tensor& tensor);

// ||a - b|| / max(||b||, tiny).
double RelativeError(const Tensor& a, const Tensor& b);
double RelativeError(const std::vector<double>& a, const std::vector<double>& b);
// a.b / (||a|| ||b||); 1 when both are zero.
double Cosine(const Tensor& a, const Tensor& b);
bool SameBits(const Tensor& a, const Tensor& b);

}  // namespace baleen::testing
