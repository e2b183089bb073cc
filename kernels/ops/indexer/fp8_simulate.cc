// SimulateFp8 and QuantiseFp8: checks, then the definition for the device and the dtype.
#include "kernels/ops/indexer/fp8_simulate.h"

#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer/fp8_simulate_cpu.h"
#include "kernels/ops/indexer/fp8_simulate_cuda.h"

namespace baleen {
namespace {

void CheckGroups(const Context& context, const char* op, const Tensor& x, int64_t group) {
  CHECK_GE(x.rank(), 1) << op << ": x is " << x.DebugString();
  CheckTensor(context, op, "x", x, x.dtype(), x.shape());
  CHECK(group >= 1 && x.dim(-1) % group == 0)
      << op << ": groups of " << group << " do not divide the last dimension of "
      << x.DebugString();
}

}  // namespace

Tensor SimulateFp8(const Context& context, const Tensor& x, int64_t group) {
  constexpr const char* kOp = "SimulateFp8";
  CheckGroups(context, kOp, x, group);
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

Fp8Codes QuantiseFp8(const Context& context, const Tensor& x, int64_t group) {
  constexpr const char* kOp = "QuantiseFp8";
  CheckGroups(context, kOp, x, group);
  Shape groups = x.shape();
  groups.back() /= group;
  const Fp8Codes result{context.Empty(DType::kF8E4M3, x.shape()),
                        context.Empty(StatisticsOf(x.dtype()), groups)};
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      QuantiseFp8Cuda(ElementOf(kOp, "x", x), x.num_elements() / group, group, x.raw(),
                      result.codes.raw(), result.scales.data<float>(), context.stream());
      return result;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, x.bytes() + result.codes.bytes() + result.scales.bytes());
  ForFloatOrDouble(context, kOp, x.dtype(),
                   [&](auto zero) { QuantiseFp8Cpu<decltype(zero)>(x, group, result); });
  return result;
}

}  // namespace baleen
