// The CPU definition behind hadamard.h, for float and double. hadamard.cc has checked the
// arguments.
#pragma once

#include "kernels/ops/hadamard.h"

namespace baleen {

template <typename T>
Tensor HadamardTransformCpu(const Context& context, const Tensor& x);

}  // namespace baleen
