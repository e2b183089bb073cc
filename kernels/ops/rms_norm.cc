#include "kernels/ops/rms_norm.h"

#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/rms_norm_cpu.h"
#include "kernels/ops/rms_norm_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "rms_norm";

// x [.., D] has rows of D > 0 elements; returns their number.
int64_t RowsOf(const Tensor& x) {
  CHECK(x.rank() >= 1 && x.dim(-1) > 0) << kOp << ": x is " << x.DebugString();
  return x.num_elements() / x.dim(-1);
}

}  // namespace

RmsNormResult RmsNorm(const Context& context, const Tensor& x, const Tensor& weight, double eps) {
  const int64_t rows = RowsOf(x), D = x.dim(-1);
  CheckTensor(context, kOp, "x", x, x.dtype(), x.shape());
  CheckTensor(context, kOp, "weight", weight, x.dtype(), {D});
  RmsNormResult result{context.Empty(x.dtype(), x.shape()),
                       context.Empty(StatisticsOf(x.dtype()), {rows})};
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      RmsNormCuda({.element = ElementOf(kOp, "x", x),
                   .rows = rows,
                   .D = D,
                   .x = x.raw(),
                   .weight = weight.raw(),
                   .eps = static_cast<float>(eps),
                   .y = result.y.raw(),
                   .rstd = result.rstd.data<float>()},
                  context.stream());
      return result;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 2 * x.bytes());
  ForFloatOrDouble(context, kOp, x.dtype(), [&](auto element) {
    using T = decltype(element);
    RmsNormCpu(rows, D, x.data<T>(), weight.data<T>(), eps, result.y.data<T>(),
               result.rstd.data<T>());
  });
  return result;
}

Tensor RmsNormBackwardInput(const Context& context, const Tensor& dy, const Tensor& x,
                            const Tensor& weight, const Tensor& rstd) {
  const int64_t rows = RowsOf(x), D = x.dim(-1);
  CheckTensor(context, kOp, "dy", dy, x.dtype(), x.shape());
  CheckTensor(context, kOp, "weight", weight, x.dtype(), {D});
  CheckStatistics(context, kOp, "rstd", rstd, x.dtype(), {rows});
  const Tensor dx = context.Empty(x.dtype(), x.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      RmsNormBackwardInputCuda({.element = ElementOf(kOp, "x", x),
                                .rows = rows,
                                .D = D,
                                .dy = dy.raw(),
                                .x = x.raw(),
                                .weight = weight.raw(),
                                .rstd = rstd.data<float>(),
                                .dx = dx.raw()},
                               context.stream());
      return dx;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 3 * x.bytes());
  ForFloatOrDouble(context, kOp, x.dtype(), [&](auto element) {
    using T = decltype(element);
    RmsNormBackwardInputCpu(rows, D, dy.data<T>(), x.data<T>(), weight.data<T>(), rstd.data<T>(),
                            dx.data<T>());
  });
  return dx;
}

void RmsNormBackwardWeight(const Context& context, const Tensor& dy, const Tensor& x,
                           const Tensor& rstd, const Tensor& dweight) {
  const int64_t rows = RowsOf(x), D = x.dim(-1);
  CheckTensor(context, kOp, "dy", dy, x.dtype(), x.shape());
  CheckStatistics(context, kOp, "rstd", rstd, x.dtype(), {rows});
  CheckStatistics(context, kOp, "dweight", dweight, x.dtype(), {D});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      const Tensor workspace = CudaScratch(context, RmsNormWorkspaceFloats(rows, D));
      return RmsNormBackwardWeightCuda({.element = ElementOf(kOp, "x", x),
                                        .rows = rows,
                                        .D = D,
                                        .dy = dy.raw(),
                                        .x = x.raw(),
                                        .rstd = rstd.data<float>(),
                                        .workspace = workspace.data<float>(),
                                        .dweight = dweight.data<float>()},
                                       context.stream());
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 2 * x.bytes());
  ForFloatOrDouble(context, kOp, x.dtype(), [&](auto element) {
    using T = decltype(element);
    RmsNormBackwardWeightCpu(rows, D, dy.data<T>(), x.data<T>(), rstd.data<T>(), dweight.data<T>());
  });
}

}  // namespace baleen
