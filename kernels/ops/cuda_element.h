// Between tensors and the kernels' element types, for the x.cc of ops.
#pragma once

#include "kernels/cuda/element.h"
#include "kernels/ops/dispatch.h"

namespace baleen {

// What the kernel is called with; kernels take bf16 and fp32.
inline CudaElement ElementOf(const char* op, const char* name, const Tensor& tensor) {
  CheckCudaActivation(op, name, tensor);
  return tensor.dtype() == DType::kBF16 ? CudaElement::kBF16 : CudaElement::kF32;
}

// Floats that a kernel needs while it runs.
inline Tensor CudaScratch(const Context& context, int64_t floats) {
  return context.Empty(DType::kF32, {floats});
}

}  // namespace baleen
