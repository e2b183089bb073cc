#include "kernels/ops/swiglu.h"

#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/swiglu_cpu.h"
#include "kernels/ops/swiglu_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "swiglu";

}  // namespace

Tensor Swiglu(const Context& context, const Tensor& gate, const Tensor& up) {
  CheckTensor(context, kOp, "up", up, gate.dtype(), gate.shape());
  CheckTensor(context, kOp, "gate", gate, gate.dtype(), gate.shape());
  const Tensor y = context.Empty(gate.dtype(), gate.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      SwigluCuda(ElementOf(kOp, "gate", gate), gate.num_elements(), gate.raw(), up.raw(), y.raw(),
                 context.stream());
      return y;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 3 * gate.bytes());
  ForFloatOrDouble(context, kOp, gate.dtype(), [&](auto element) {
    using T = decltype(element);
    SwigluCpu(gate.num_elements(), gate.data<T>(), up.data<T>(), y.data<T>());
  });
  return y;
}

SwigluGradients SwigluBackward(const Context& context, const Tensor& dy, const Tensor& gate,
                               const Tensor& up) {
  CheckTensor(context, kOp, "up", up, gate.dtype(), gate.shape());
  CheckTensor(context, kOp, "dy", dy, gate.dtype(), gate.shape());
  const SwigluGradients gradients{context.Empty(gate.dtype(), gate.shape()),
                                  context.Empty(gate.dtype(), gate.shape())};
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      SwigluBackwardCuda(ElementOf(kOp, "gate", gate), gate.num_elements(), dy.raw(), gate.raw(),
                         up.raw(), gradients.dgate.raw(), gradients.dup.raw(), context.stream());
      return gradients;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 5 * gate.bytes());
  ForFloatOrDouble(context, kOp, gate.dtype(), [&](auto element) {
    using T = decltype(element);
    SwigluBackwardCpu(gate.num_elements(), dy.data<T>(), gate.data<T>(), up.data<T>(),
                      gradients.dgate.data<T>(), gradients.dup.data<T>());
  });
  return gradients;
}

}  // namespace baleen
