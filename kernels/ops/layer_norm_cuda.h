// Internal: the kernels behind layer_norm.h. x, y, dy, dx [rows, D], weight and bias [D] are of
// `element`; mean, rstd [rows], dweight and dbias [D] are fp32. Arithmetic in fp32.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

struct LayerNormCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t rows = 0, D = 0;
  const void* x = nullptr;
  const void* weight = nullptr;
  const void* bias = nullptr;
  float eps = 0;
  void* y = nullptr;
  float* mean = nullptr;
  float* rstd = nullptr;
};
void LayerNormCuda(const LayerNormCudaArgs& args, void* stream);

struct LayerNormBackwardInputCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t rows = 0, D = 0;
  const void* dy = nullptr;
  const void* x = nullptr;
  const void* weight = nullptr;
  const float* mean = nullptr;
  const float* rstd = nullptr;
  void* dx = nullptr;
};
void LayerNormBackwardInputCuda(const LayerNormBackwardInputCudaArgs& args, void* stream);

// Floats of workspace that the parameters' gradients need.
int64_t LayerNormWorkspaceFloats(int64_t rows, int64_t D);
struct LayerNormBackwardWeightCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t rows = 0, D = 0;
  const void* dy = nullptr;
  const void* x = nullptr;
  const float* mean = nullptr;
  const float* rstd = nullptr;
  float* workspace = nullptr;
  float* dweight = nullptr;  // both added to
  float* dbias = nullptr;
};
void LayerNormBackwardWeightCuda(const LayerNormBackwardWeightCudaArgs& args, void* stream);

}  // namespace baleen
