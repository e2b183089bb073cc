// SwiGLU: y = silu(gate) * up, silu(g) = g * sigmoid(g). The product is formed in fp32.
//
//   dup = dy * silu(gate);  dgate = dy * up * sigmoid(g) * (1 + g * (1 - sigmoid(g)))
// All of one shape and dtype: on the CPU kF32 or kF64, on CUDA kF32 or kBF16 (rounded once).
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

Tensor Swiglu(const Context& context, const Tensor& gate, const Tensor& up);

struct SwigluGradients {
  Tensor dgate;
  Tensor dup;
};
SwigluGradients SwigluBackward(const Context& context, const Tensor& dy, const Tensor& gate,
                               const Tensor& up);

}  // namespace baleen
