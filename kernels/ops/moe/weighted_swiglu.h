// SwiGLU of rows with a weight each: what a routed expert does between its projections.
//
//   y[n] = w[n] * silu(gate[n]) * up[n];  silu(g) = g * sigmoid(g)
//   dup = w dy silu(g);  dgate = w dy up sigmoid(g) (1 + g (1 - sigmoid(g)));
//   dw[n] = sum over f of dy silu(g) up
// The routing weight stands before the down-projection, which is linear, instead of behind it: then
// no gradient needs the projection's output, and none is kept, nor made again.
// gate, up, dy [N, F]: on the CPU kF32 or kF64, on CUDA kF32 or kBF16 (products in fp32, rounded
// once). weight_N: kF32 (kF64 for kF64 rows); dweight_N like it, summed in one order.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

Tensor WeightedSwiglu(const Context& context, const Tensor& gate, const Tensor& up,
                      const Tensor& weight_N);

struct WeightedSwigluGradients {
  Tensor dgate;
  Tensor dup;
  Tensor dweight_N;
};
WeightedSwigluGradients WeightedSwigluBackward(const Context& context, const Tensor& dy,
                                               const Tensor& gate, const Tensor& up,
                                               const Tensor& weight_N);

}  // namespace baleen
