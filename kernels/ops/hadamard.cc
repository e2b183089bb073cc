// HadamardTransform: checks, then the definition for the device and the dtype.
#include "kernels/ops/hadamard.h"

#include <bit>

#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/hadamard_cpu.h"
#include "kernels/ops/hadamard_cuda.h"

namespace baleen {

Tensor HadamardTransform(const Context& context, const Tensor& x) {
  constexpr const char* kOp = "HadamardTransform";
  CHECK_GE(x.rank(), 1) << kOp << ": x is " << x.DebugString();
  CheckTensor(context, kOp, "x", x, x.dtype(), x.shape());
  CHECK(x.dim(-1) > 0 && std::has_single_bit(static_cast<uint64_t>(x.dim(-1))))
      << kOp << ": x is " << x.DebugString() << ", its last dimension is no power of two";
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      CHECK_LE(x.dim(-1), kHadamardCudaMaxDim) << kOp << ": x is " << x.DebugString();
      const Tensor y = context.Empty(x.dtype(), x.shape());
      HadamardCuda(ElementOf(kOp, "x", x), x.num_elements() / x.dim(-1), x.dim(-1), x.raw(),
                   y.raw(), context.stream());
      return y;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 2 * x.bytes());
  return ForFloatOrDouble(context, kOp, x.dtype(), [&](auto zero) {
    return HadamardTransformCpu<decltype(zero)>(context, x);
  });
}

}  // namespace baleen
