#include "kernels/ops/reduce.h"

#include "kernels/ops/dispatch.h"
#include "kernels/ops/reduce_cpu.h"

namespace baleen {

void AddSumOfSquares(const Context& context, const Tensor& x, const Tensor& result_1) {
  CheckTensor(context, "sum of squares", "result", result_1, DType::kF64, {1});
  if (context.device().kind != DeviceKind::kCpu) NoCudaKernel("sum of squares");
  CountBytes(context, "sum of squares", x.bytes());
  ForFloatOrDouble(context, "sum of squares", x.dtype(), [&](auto element) {
    using T = decltype(element);
    result_1.data<double>()[0] += SumOfSquaresCpu(x.num_elements(), x.data<T>());
  });
}

void AddSum(const Context& context, const Tensor& x, const Tensor& result_1) {
  CheckTensor(context, "sum", "result", result_1, DType::kF64, {1});
  if (context.device().kind != DeviceKind::kCpu) NoCudaKernel("sum");
  CountBytes(context, "sum", x.bytes());
  ForFloatOrDouble(context, "sum", x.dtype(), [&](auto element) {
    using T = decltype(element);
    result_1.data<double>()[0] += SumCpu(x.num_elements(), x.data<T>());
  });
}

}  // namespace baleen
