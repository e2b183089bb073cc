#include "kernels/ops/layer_norm.h"

#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/layer_norm_cpu.h"
#include "kernels/ops/layer_norm_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "layer_norm";

// x [.., D] has rows of D > 0 elements; returns their number.
int64_t RowsOf(const Tensor& x) {
  CHECK(x.rank() >= 1 && x.dim(-1) > 0) << kOp << ": x is " << x.DebugString();
  return x.num_elements() / x.dim(-1);
}

}  // namespace

LayerNormResult LayerNorm(const Context& context, const Tensor& x, const Tensor& weight,
                          const Tensor& bias, double eps) {
  const int64_t rows = RowsOf(x), D = x.dim(-1);
  CheckTensor(context, kOp, "weight", weight, x.dtype(), {D});
  CheckTensor(context, kOp, "x", x, x.dtype(), x.shape());
  CheckTensor(context, kOp, "bias", bias, x.dtype(), {D});
  const DType statistics = StatisticsOf(x.dtype());
  LayerNormResult result{context.Empty(x.dtype(), x.shape()), context.Empty(statistics, {rows}),
                         context.Empty(statistics, {rows})};
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      LayerNormCuda({.element = ElementOf(kOp, "x", x),
                     .rows = rows,
                     .D = D,
                     .x = x.raw(),
                     .weight = weight.raw(),
                     .bias = bias.raw(),
                     .eps = static_cast<float>(eps),
                     .y = result.y.raw(),
                     .mean = result.mean.data<float>(),
                     .rstd = result.rstd.data<float>()},
                    context.stream());
      return result;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 2 * x.bytes());
  ForFloatOrDouble(context, kOp, x.dtype(), [&](auto element) {
    using T = decltype(element);
    LayerNormCpu(rows, D, x.data<T>(), weight.data<T>(), bias.data<T>(), eps, result.y.data<T>(),
                 result.mean.data<T>(), result.rstd.data<T>());
  });
  return result;
}

Tensor LayerNormBackwardInput(const Context& context, const Tensor& dy, const Tensor& x,
                              const Tensor& weight, const Tensor& mean, const Tensor& rstd) {
  const int64_t rows = RowsOf(x), D = x.dim(-1);
  CheckTensor(context, kOp, "dy", dy, x.dtype(), x.shape());
  CheckTensor(context, kOp, "weight", weight, x.dtype(), {D});
  CheckStatistics(context, kOp, "mean", mean, x.dtype(), {rows});
  CheckStatistics(context, kOp, "rstd", rstd, x.dtype(), {rows});
  const Tensor dx = context.Empty(x.dtype(), x.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      LayerNormBackwardInputCuda({.element = ElementOf(kOp, "x", x),
                                  .rows = rows,
                                  .D = D,
                                  .dy = dy.raw(),
                                  .x = x.raw(),
                                  .weight = weight.raw(),
                                  .mean = mean.data<float>(),
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
    LayerNormBackwardInputCpu(rows, D, dy.data<T>(), x.data<T>(), weight.data<T>(), mean.data<T>(),
                              rstd.data<T>(), dx.data<T>());
  });
  return dx;
}

void LayerNormBackwardWeight(const Context& context, const Tensor& dy, const Tensor& x,
                             const Tensor& mean, const Tensor& rstd, const Tensor& dweight,
                             const Tensor& dbias) {
  const int64_t rows = RowsOf(x), D = x.dim(-1);
  CheckTensor(context, kOp, "dy", dy, x.dtype(), x.shape());
  CheckStatistics(context, kOp, "mean", mean, x.dtype(), {rows});
  CheckStatistics(context, kOp, "rstd", rstd, x.dtype(), {rows});
  CheckStatistics(context, kOp, "dweight", dweight, x.dtype(), {D});
  CheckStatistics(context, kOp, "dbias", dbias, x.dtype(), {D});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      const Tensor workspace = CudaScratch(context, LayerNormWorkspaceFloats(rows, D));
      return LayerNormBackwardWeightCuda({.element = ElementOf(kOp, "x", x),
                                          .rows = rows,
                                          .D = D,
                                          .dy = dy.raw(),
                                          .x = x.raw(),
                                          .mean = mean.data<float>(),
                                          .rstd = rstd.data<float>(),
                                          .workspace = workspace.data<float>(),
                                          .dweight = dweight.data<float>(),
                                          .dbias = dbias.data<float>()},
                                         context.stream());
    }
    NoCudaKernel(kOp);
  }
  ForFloatOrDouble(context, kOp, x.dtype(), [&](auto element) {
    using T = decltype(element);
    LayerNormBackwardWeightCpu(rows, D, dy.data<T>(), x.data<T>(), mean.data<T>(), rstd.data<T>(),
                               dweight.data<T>(), dbias.data<T>());
  });
}

}  // namespace baleen
