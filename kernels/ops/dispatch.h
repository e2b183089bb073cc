// What every op's x.cc does first: check its tensors, then choose the definition for the device and
// the dtype.
//
// On CUDA, behind the checks and the allocation of the result:
//
//   if (OnCuda(context)) {
//     if constexpr (kHaveCuda) {
//       XCuda(..., context.stream());  // x_cuda.h: plain structs, pointers, cudaStream_t as void*
//       CheckLaunch(kOp);
//       return y;
//     }
//     NoCudaKernel(kOp);
//   }
//
// x_cuda.h is read by builds without CUDA too, so it includes no CUDA header. Dtypes there:
// activations and working weights kBF16 (kF32 also where the kernel says so), statistics kF32, all
// gradients of weights and parameters kF32; kF64 is the CPU's alone.
//
// The messages carry op, argument, expected and found: a wrong shape is found by reading one line.
//
// In a dry context (kernels/core/context.h) an op ends where it would begin to compute on floating
// numbers. Their contents are unknown then and checks of values are left out; dtypes are those of a
// GPU or of the CPU, whatever the machine: the plan of a bf16 run, with its fp32 sums, shows that
// the trainer hands every op the dtypes it takes. What decides shapes is computed as ever: which
// rows go to which expert (permute.h, CountExperts), from a balanced choice (Route).
#pragma once

#include <type_traits>

#include "kernels/core/check.h"
#include "kernels/core/context.h"
#include "kernels/core/cuda_context.h"
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

// A tensor of such sums beside operands of `dtype`.
inline void CheckStatistics(const Context& context, const char* op, const char* name,
                            const Tensor& tensor, DType dtype, const Shape& shape) {
  CheckTensor(context, op, name, tensor, StatisticsOf(dtype), shape);
}

// The number of dimensions, where the tensor itself says the extents.
inline void CheckRank(const char* op, const char* name, const Tensor& tensor, int rank) {
  CHECK_EQ(tensor.rank(), rank) << op << ": " << name << " is " << tensor.DebugString();
}

[[noreturn]] inline void NoCudaKernel(const char* op) {
  CHECK(false) << op << ": this build has no CUDA kernel of the op; run it on the CPU";
  __builtin_unreachable();
}

inline bool OnCuda(const Context& context) { return context.device().kind == DeviceKind::kCuda; }

// After the launches of a kernel: aborts with the op's name when CUDA refused one of them.
inline void CheckLaunch(const char* op) {
  if constexpr (kHaveCuda) CheckCudaLaunch(op);
}

// What kernels of activations take: bf16 or fp32. Says so with op, argument and dtype.
inline void CheckCudaActivation(const char* op, const char* name, const Tensor& tensor) {
  CHECK(tensor.dtype() == DType::kBF16 || tensor.dtype() == DType::kF32)
      << op << ": " << name << " is " << tensor.DebugString()
      << ", the CUDA kernels take BF16 and F32";
}

// Calls function(T{}) with the element type of the CPU definitions: float or double. In a dry
// context a function that returns nothing is not called; one that returns its result is, since it
// allocates it, and itself stops before it computes (T is then no promise about the operands).
template <typename Function>
auto ForFloatOrDouble(const Context& context, const char* op, DType dtype, Function function) {
  using Result = decltype(function(float{}));
  if constexpr (std::is_void_v<Result>) {
    if (context.dry()) return;
  }
  CHECK(context.dry() || dtype == DType::kF32 || dtype == DType::kF64)
      << op << ": on the CPU F32 and F64 are defined, not " << DTypeName(dtype);
  return dtype == DType::kF64 ? function(double{}) : function(float{});
}

// Memory that only the CPU definition needs while it runs: a dry call takes it like a real one, but
// not for dtypes that the CPU does not compute with (kernels of devices have workspaces of their
// own).
inline Tensor CpuScratch(const Context& context, DType dtype, const Shape& shape) {
  if (dtype != DType::kF32 && dtype != DType::kF64) return Tensor();
  return context.Empty(dtype, shape);
}

// Adds to the counter of a dry context.
inline void CountWork(const Context& context, const char* op, double flops, double bytes) {
  if (context.counter() == nullptr) return;
  OpCount& count = context.counter()->ops[op];
  ++count.calls;
  count.flops += flops;
  count.bytes += bytes;
}
inline void CountBytes(const Context& context, const char* op, int64_t bytes) {
  CountWork(context, op, 0, static_cast<double>(bytes));
}

}  // namespace baleen
