// Hadamard rotation of the last dimension (spec 1.4): y = H_D x / sqrt(D), Sylvester order, D a power of two.
// Orthogonal and symmetric: the backward is the same transform.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

Tensor HadamardTransform(const Context& context, const Tensor& x);

}  // namespace baleen
