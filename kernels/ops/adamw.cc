#include "kernels/ops/adamw.h"

#include "kernels/ops/adamw_cpu.h"
#include "kernels/ops/dispatch.h"

namespace baleen {

void AdamwUpdate(const Context& context, const AdamwParams& params, const Tensor& param,
                 const Tensor& grad, const Tensor& m, const Tensor& v, const Tensor& control_2) {
  CheckRank("adamw", "param", param, 1);
  CheckTensor(context, "adamw", "grad", grad, param.dtype(), param.shape());
  CheckTensor(context, "adamw", "m", m, param.dtype(), param.shape());
  CheckTensor(context, "adamw", "v", v, param.dtype(), param.shape());
  CheckTensor(context, "adamw", "control", control_2, grad.dtype(), {2});
  CHECK(params.step >= 1 && params.beta1 >= 0 && params.beta1 < 1 && params.beta2 >= 0 &&
        params.beta2 < 1)
      << "adamw: step " << params.step << ", beta1 " << params.beta1 << ", beta2 " << params.beta2;
  if (context.device().kind != DeviceKind::kCpu) NoCudaKernel("adamw");
  CountBytes(context, "adamw", 7 * param.bytes());  // reads four, writes three
  ForFloatOrDouble(context, "adamw", param.dtype(), [&](auto element) {
    using T = decltype(element);
    const T* const control = control_2.data<T>();
    if (control[1] != 0) return;
    AdamwCpu(params, param.num_elements(), param.data<T>(), grad.data<T>(), m.data<T>(),
             v.data<T>(), control[0]);
  });
}

void ClipControl(const Context& context, const Tensor& sum_of_squares_1, double max_norm,
                 const Tensor& control_2) {
  CheckTensor(context, "clip control", "sum of squares", sum_of_squares_1, DType::kF64, {1});
  CheckTensor(context, "clip control", "control", control_2, control_2.dtype(), {2});
  if (context.device().kind != DeviceKind::kCpu) NoCudaKernel("clip control");
  ForFloatOrDouble(context, "clip control", control_2.dtype(), [&](auto element) {
    using T = decltype(element);
    ClipControlCpu(sum_of_squares_1.data<double>()[0], max_norm, control_2.data<T>());
  });
}

void ShareSkipFlag(const Context& context, const Tensor& a_2, const Tensor& b_2) {
  CheckTensor(context, "share skip flag", "a", a_2, a_2.dtype(), {2});
  CheckTensor(context, "share skip flag", "b", b_2, a_2.dtype(), {2});
  if (context.device().kind != DeviceKind::kCpu) NoCudaKernel("share skip flag");
  ForFloatOrDouble(context, "share skip flag", a_2.dtype(), [&](auto element) {
    using T = decltype(element);
    T* a = a_2.data<T>();
    T* b = b_2.data<T>();
    a[1] = b[1] = (a[1] != 0 || b[1] != 0) ? T(1) : T(0);
  });
}

}  // namespace baleen
