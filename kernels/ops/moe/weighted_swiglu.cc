#include "kernels/ops/moe/weighted_swiglu.h"

#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/moe/weighted_swiglu_cpu.h"
#include "kernels/ops/moe/weighted_swiglu_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "weighted swiglu";

void CheckRows(const Context& context, const Tensor& gate, const Tensor& up,
               const Tensor& weight_N) {
  CheckRank(kOp, "gate", gate, 2);
  CheckTensor(context, kOp, "gate", gate, gate.dtype(), gate.shape());
  CheckTensor(context, kOp, "up", up, gate.dtype(), gate.shape());
  CheckStatistics(context, kOp, "weight", weight_N, gate.dtype(), {gate.dim(0)});
}

WeightedSwigluCudaArgs CudaArgs(const Tensor& gate, const Tensor& up, const Tensor& weight_N) {
  return {.element = ElementOf(kOp, "gate", gate),
          .rows = gate.dim(0),
          .F = gate.dim(1),
          .gate = gate.raw(),
          .up = up.raw(),
          .weight_N = weight_N.data<float>()};
}

}  // namespace

Tensor WeightedSwiglu(const Context& context, const Tensor& gate, const Tensor& up,
                      const Tensor& weight_N) {
  CheckRows(context, gate, up, weight_N);
  const Tensor y = context.Empty(gate.dtype(), gate.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      WeightedSwigluCuda(CudaArgs(gate, up, weight_N), y.raw(), context.stream());
      return y;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 3 * gate.bytes());
  ForFloatOrDouble(context, kOp, gate.dtype(), [&](auto element) {
    using T = decltype(element);
    WeightedSwigluCpu(gate.dim(0), gate.dim(1), gate.data<T>(), up.data<T>(), weight_N.data<T>(),
                      y.data<T>());
  });
  return y;
}

WeightedSwigluGradients WeightedSwigluBackward(const Context& context, const Tensor& dy,
                                               const Tensor& gate, const Tensor& up,
                                               const Tensor& weight_N) {
  CheckRows(context, gate, up, weight_N);
  CheckTensor(context, kOp, "dy", dy, gate.dtype(), gate.shape());
  const WeightedSwigluGradients gradients{context.Empty(gate.dtype(), gate.shape()),
                                          context.Empty(gate.dtype(), gate.shape()),
                                          context.Empty(weight_N.dtype(), weight_N.shape())};
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      WeightedSwigluBackwardCuda(CudaArgs(gate, up, weight_N),
                                 {.dy = dy.raw(),
                                  .dgate = gradients.dgate.raw(),
                                  .dup = gradients.dup.raw(),
                                  .dweight_N = gradients.dweight_N.data<float>()},
                                 context.stream());
      return gradients;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 5 * gate.bytes());
  ForFloatOrDouble(context, kOp, gate.dtype(), [&](auto element) {
    using T = decltype(element);
    WeightedSwigluBackwardCpu(gate.dim(0), gate.dim(1), dy.data<T>(), gate.data<T>(), up.data<T>(),
                              weight_N.data<T>(), gradients.dgate.data<T>(),
                              gradients.dup.data<T>(), gradients.dweight_N.data<T>());
  });
  return gradients;
}

}  // namespace baleen
