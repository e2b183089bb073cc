// Internal: the kernels behind weighted_swiglu.h; rows of F elements, arithmetic in fp32.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

struct WeightedSwigluCudaArgs {
  CudaElement element;
  int64_t rows, F;
  const void* gate;
  const void* up;
  const float* weight_N;
};
void WeightedSwigluCuda(const WeightedSwigluCudaArgs& args, void* y, void* stream);

struct WeightedSwigluCudaGradients {
  const void* dy;
  void* dgate;
  void* dup;
  float* dweight_N;
};
void WeightedSwigluBackwardCuda(const WeightedSwigluCudaArgs& args,
                                const WeightedSwigluCudaGradients& gradients, void* stream);

}  // namespace baleen
