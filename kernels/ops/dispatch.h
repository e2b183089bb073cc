// What every op's x.cc does first: check its tensors, then choose the definition for the device and
// the dtype.
//
// The messages carry op, argument, expected and found: a wrong shape is found by reading one line.
#pragma once

#include "kernels/core/check.h"
#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

// The tensor lies on the context's device and has this dtype and shape.
inline void CheckTensor(const Context& context, const char* op, const char* name,
                        const Tensor& tensor, DType dtype, const Shape& shape) {
  CHECK(tensor.dtype() == dtype && tensor.shape() == shape)
      << op << ": " << name << " is " << tensor.DebugString() << ", expected " << DTypeName(dtype)
      << ShapeString(shape);
  CHECK(tensor.device() == context.device())
      << op << ": " << name << " " << tensor.DebugString() << " lies on another device";
}

// The number of dimensions, where the tensor itself says the extents.
inline void CheckRank(const char* op, const char* name, const Tensor& tensor, int rank) {
  CHECK_EQ(tensor.rank(), rank) << op << ": " << name << " is " << tensor.DebugString();
}

[[noreturn]] inline void NoCudaKernel(const char* op) {
  CHECK(false) << op << ": this build has no CUDA kernel of the op; run it on the CPU";
  __builtin_unreachable();
}

// Calls function(T{}) with the element type of the CPU definitions: float or double.
template <typename Function>
auto ForFloatOrDouble(const char* op, DType dtype, Function function) {
  CHECK(dtype == DType::kF32 || dtype == DType::kF64)
      << op << ": on the CPU F32 and F64 are defined, not " << DTypeName(dtype);
  return dtype == DType::kF64 ? function(double{}) : function(float{});
}

}  // namespace baleen
