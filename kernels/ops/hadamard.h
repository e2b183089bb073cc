// Hadamard rotation of the last dimension: y = H_D x / sqrt(D), Sylvester order, D a
// power of two. Orthogonal and symmetric: the backward is the same transform.
//
// On the CPU kF32 and kF64, on CUDA kF32 and kBF16 (arithmetic in fp32, rounded once; D <= 8192).
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

Tensor HadamardTransform(const Context& context, const Tensor& x);

}  // namespace baleen
