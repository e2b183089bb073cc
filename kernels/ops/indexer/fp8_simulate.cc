// SimulateFp8: checks, then the definition for the device and the dtype.
#include "kernels/ops/indexer/fp8_simulate.h"

#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer/fp8_simulate_cpu.h"
#include "kernels/ops/indexer/fp8_simulate_cuda.h"

namespace baleen {

Tensor SimulateFp8(const Context& context, const Tensor& x, int64_t group) {
  constexpr const char* kOp = "SimulateFp8";
  CHECK_GE(x.rank(), 1) << kOp << ": x is " << x.DebugString();
  CheckTensor(context, kOp, "x", x, x.dtype(), x.shape());
  CHECK(group >= 1 && x.dim(-1) % group == 0)
      << kOp << ": groups of " << group << " do not divide the last dimension of "
      << x.DebugString();
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      const Tensor y = context.Empty(x.dtype(), x.shape());
      SimulateFp8Cuda(ElementOf(kOp, "x", x), x.num_elements() / group, group, x.raw(), y.raw(),
                      context.stream());
      return y;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 2 * x.bytes());
  return ForFloatOrDouble(context, kOp, x.dtype(), [&](auto zero) {
    return SimulateFp8Cpu<decltype(zero)>(context, x, group);
  });
}

}  // namespace baleen
