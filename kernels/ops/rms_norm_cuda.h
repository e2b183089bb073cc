// Internal: the kernels behind rms_norm.h. x, y, dy, dx [rows, D] and weight [D] are of `element`;
// rstd [rows] and dweight [D] are fp32. Arithmetic in fp32.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

struct RmsNormCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t rows = 0, D = 0;
  const void* x = nullptr;
  const void* weight = nullptr;
  float eps = 0;
  void* y = nullptr;
  float* rstd = nullptr;
};
void RmsNormCuda(const RmsNormCudaArgs& args, void* stream);

struct RmsNormBackwardInputCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t rows = 0, D = 0;
  const void* dy = nullptr;
  const void* x = nullptr;
  const void* weight = nullptr;
  const float* rstd = nullptr;
  void* dx = nullptr;
};
void RmsNormBackwardInputCuda(const RmsNormBackwardInputCudaArgs& args, void* stream);

// Floats of workspace that the weight gradient needs.
int64_t RmsNormWorkspaceFloats(int64_t rows, int64_t D);
struct RmsNormBackwardWeightCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t rows = 0, D = 0;
  const void* dy = nullptr;
  const void* x = nullptr;
  const float* rstd = nullptr;
  float* workspace = nullptr;
  float* dweight = nullptr;  // added to
};
void RmsNormBackwardWeightCuda(const RmsNormBackwardWeightCudaArgs& args, void* stream);

}  // namespace baleen
