#include "kernels/ops/adamw.h"

#include <cmath>

#include "kernels/ops/adamw_cpu.h"
#include "kernels/ops/adamw_cuda.h"
#include "kernels/ops/dispatch.h"

namespace baleen {
namespace {

constexpr char kOp[] = "adamw";

bool HasSegments(const AdamwTensors& tensors) { return !tensors.decay_N.empty(); }

void CheckAdamw(const Context& context, const AdamwParams& params, const AdamwTensors& tensors,
                const Tensor& control_2) {
  const Tensor& param = tensors.param;
  CheckRank(kOp, "param", param, 1);
  CheckTensor(context, kOp, "param", param, param.dtype(), param.shape());
  CheckTensor(context, kOp, "grad", tensors.grad, param.dtype(), param.shape());
  const DType moments = tensors.m.dtype() == DType::kBF16 ? DType::kBF16 : param.dtype();
  CheckTensor(context, kOp, "m", tensors.m, moments, param.shape());
  CheckTensor(context, kOp, "v", tensors.v, moments, param.shape());
  CheckTensor(context, kOp, "control", control_2, param.dtype(), {2});
  if (!tensors.working.empty()) {
    CheckTensor(context, kOp, "working", tensors.working, DType::kBF16, param.shape());
  }
  CHECK_EQ(tensors.decay_begin_N1.empty(), tensors.decay_N.empty()) << kOp << ": decay segments";
  if (HasSegments(tensors)) {
    const int64_t N = tensors.decay_N.dim(0);
    CHECK_GE(N, 1) << kOp << ": decay segments";
    CheckTensor(context, kOp, "decay", tensors.decay_N, param.dtype(), {N});
    CheckTensor(context, kOp, "decay_begin", tensors.decay_begin_N1, DType::kI64, {N + 1});
  }
  CHECK(params.step >= 1 && params.beta1 >= 0 && params.beta1 < 1 && params.beta2 >= 0 &&
        params.beta2 < 1)
      << kOp << ": step " << params.step << ", beta1 " << params.beta1 << ", beta2 "
      << params.beta2;
}

// The constants of a step are formed in fp64 (1 - 0.999 loses 10 bits in fp32).
void UpdateOnCuda(const Context& context, const AdamwParams& params, const AdamwTensors& tensors,
                  const Tensor& control_2) {
  const double step = static_cast<double>(params.step);
  AdamwCudaArgs args{.count = tensors.param.num_elements(),
                     .lr = static_cast<float>(params.lr),
                     .beta1 = static_cast<float>(params.beta1),
                     .beta2 = static_cast<float>(params.beta2),
                     .rest1 = static_cast<float>(1 - params.beta1),
                     .rest2 = static_cast<float>(1 - params.beta2),
                     .correction1 = static_cast<float>(1 - std::pow(params.beta1, step)),
                     .correction2 = static_cast<float>(1 - std::pow(params.beta2, step)),
                     .eps = static_cast<float>(params.eps),
                     .weight_decay = static_cast<float>(params.weight_decay),
                     .param = tensors.param.data<float>(),
                     .grad = tensors.grad.data<float>(),
                     .m = tensors.m.raw(),
                     .v = tensors.v.raw(),
                     .bf16_moments = tensors.m.dtype() == DType::kBF16,
                     .control_2 = control_2.data<float>()};
  if (!tensors.working.empty()) args.working = tensors.working.raw();
  if (HasSegments(tensors)) {
    args.num_segments = static_cast<int>(tensors.decay_N.dim(0));
    args.begin_N1 = tensors.decay_begin_N1.data<int64_t>();
    args.decay_N = tensors.decay_N.data<float>();
  }
  AdamwCuda(args, context.stream());
}

// Elements [begin, end) with one decay.
template <typename T>
void UpdateRange(const AdamwParams& params, const AdamwTensors& tensors, T clip_scale,
                 int64_t begin, int64_t end) {
  const auto update = [&](auto moment) {
    using Moment = decltype(moment);
    AdamwCpu(params, end - begin, tensors.param.data<T>() + begin, tensors.grad.data<T>() + begin,
             tensors.m.data<Moment>() + begin, tensors.v.data<Moment>() + begin, clip_scale);
  };
  tensors.m.dtype() == DType::kBF16 ? update(BFloat16{}) : update(T{});
  if (tensors.working.empty()) return;
  for (int64_t i = begin; i < end; ++i) {
    tensors.working.data<BFloat16>()[i] =
        BFloat16::FromFloat(static_cast<float>(tensors.param.data<T>()[i]));
  }
}

template <typename T>
void UpdateOnCpu(const AdamwParams& params, const AdamwTensors& tensors, const T* control) {
  if (control[1] != 0) return;
  if (!HasSegments(tensors)) {
    return UpdateRange(params, tensors, control[0], 0, tensors.param.num_elements());
  }
  const int64_t N = tensors.decay_N.dim(0);
  const int64_t* const begin = tensors.decay_begin_N1.data<int64_t>();
  CHECK(begin[0] == 0 && begin[N] == tensors.param.num_elements())
      << kOp << ": decay segments from " << begin[0] << " to " << begin[N] << " of "
      << tensors.param.DebugString();
  for (int64_t n = 0; n < N; ++n) {
    CHECK_LE(begin[n], begin[n + 1]) << kOp << ": decay segment " << n;
    AdamwParams of_segment = params;
    of_segment.weight_decay = static_cast<double>(tensors.decay_N.data<T>()[n]);
    UpdateRange(of_segment, tensors, control[0], begin[n], begin[n + 1]);
  }
}

}  // namespace

void AdamwUpdate(const Context& context, const AdamwParams& params, const AdamwTensors& tensors,
                 const Tensor& control_2) {
  CheckAdamw(context, params, tensors, control_2);
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return UpdateOnCuda(context, params, tensors, control_2);
    NoCudaKernel(kOp);
  }
  // Reads four, writes three, and the working copy.
  CountBytes(context, kOp,
             3 * tensors.param.bytes() + 4 * tensors.m.bytes() + tensors.working.bytes());
  ForFloatOrDouble(context, kOp, tensors.param.dtype(), [&](auto element) {
    using T = decltype(element);
    UpdateOnCpu<T>(params, tensors, control_2.data<T>());
  });
}

void AdamwUpdate(const Context& context, const AdamwParams& params, const Tensor& param,
                 const Tensor& grad, const Tensor& m, const Tensor& v, const Tensor& control_2) {
  AdamwUpdate(context, params, AdamwTensors{.param = param, .grad = grad, .m = m, .v = v},
              control_2);
}

void ClipControl(const Context& context, const Tensor& sum_of_squares_1, double max_norm,
                 const Tensor& control_2) {
  constexpr char kClip[] = "clip control";
  CheckTensor(context, kClip, "sum of squares", sum_of_squares_1, DType::kF64, {1});
  CheckTensor(context, kClip, "control", control_2, control_2.dtype(), {2});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return ClipControlCuda(sum_of_squares_1.data<double>(), max_norm, control_2.data<float>(),
                             context.stream());
    }
    NoCudaKernel(kClip);
  }
  ForFloatOrDouble(context, kClip, control_2.dtype(), [&](auto element) {
    using T = decltype(element);
    ClipControlCpu(sum_of_squares_1.data<double>()[0], max_norm, control_2.data<T>());
  });
}

void ShareSkipFlag(const Context& context, const Tensor& a_2, const Tensor& b_2) {
  constexpr char kShare[] = "share skip flag";
  CheckTensor(context, kShare, "a", a_2, a_2.dtype(), {2});
  CheckTensor(context, kShare, "b", b_2, a_2.dtype(), {2});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return ShareSkipFlagCuda(a_2.data<float>(), b_2.data<float>(), context.stream());
    }
    NoCudaKernel(kShare);
  }
  ForFloatOrDouble(context, kShare, a_2.dtype(), [&](auto element) {
    using T = decltype(element);
    T* a = a_2.data<T>();
    T* b = b_2.data<T>();
    a[1] = b[1] = (a[1] != 0 || b[1] != 0) ? T(1) : T(0);
  });
}

}  // namespace baleen
