// AdamW on the CPU, in T; the constants of a step are formed in fp64 (1 - 0.999 loses 10 bits in
// fp32).
#include "kernels/ops/adamw_cpu.h"

#include <algorithm>
#include <cmath>

namespace baleen {

namespace {

template <typename T>
T Read(T moment) {
  return moment;
}
template <typename T>
T Read(BFloat16 moment) {
  return static_cast<T>(moment.ToFloat());
}
template <typename T>
void Write(T value, T* moment) {
  *moment = value;
}
template <typename T>
void Write(T value, BFloat16* moment) {
  *moment = BFloat16::FromFloat(static_cast<float>(value));
}

}  // namespace

template <typename T, typename Moment>
void AdamwCpu(const AdamwParams& params, int64_t count, T* __restrict param,
              const T* __restrict grad, Moment* __restrict m, Moment* __restrict v, T clip_scale) {
  const double step = static_cast<double>(params.step);
  const T beta1 = static_cast<T>(params.beta1), beta2 = static_cast<T>(params.beta2);
  const T rest1 = static_cast<T>(1 - params.beta1), rest2 = static_cast<T>(1 - params.beta2);
  const T correction1 = static_cast<T>(1 - std::pow(params.beta1, step));
  const T correction2 = static_cast<T>(1 - std::pow(params.beta2, step));
  const T lr = static_cast<T>(params.lr), eps = static_cast<T>(params.eps);
  const T weight_decay = static_cast<T>(params.weight_decay);
  for (int64_t i = 0; i < count; ++i) {
    const T g = grad[i] * clip_scale;
    const T first = beta1 * Read<T>(m[i]) + rest1 * g;
    const T second = beta2 * Read<T>(v[i]) + rest2 * (g * g);
    Write(first, &m[i]);
    Write(second, &v[i]);
    const T update = (first / correction1) / (std::sqrt(second / correction2) + eps);
    param[i] -= lr * (update + weight_decay * param[i]);
  }
}

template <typename T>
void ClipControlCpu(double sum_of_squares, double max_norm, T* control) {
  const bool finite = std::isfinite(sum_of_squares);
  double scale = 1;
  // Nothing reads the scale of a skipped step, but it shall be a number.
  if (max_norm > 0)
    scale = finite ? std::min(1.0, max_norm / (std::sqrt(sum_of_squares) + 1e-6)) : 0;
  control[0] = static_cast<T>(scale);
  control[1] = finite ? 0 : 1;
}

template void AdamwCpu(const AdamwParams&, int64_t, float*, const float*, float*, float*, float);
template void AdamwCpu(const AdamwParams&, int64_t, float*, const float*, BFloat16*, BFloat16*,
                       float);
template void AdamwCpu(const AdamwParams&, int64_t, double*, const double*, double*, double*,
                       double);
template void AdamwCpu(const AdamwParams&, int64_t, double*, const double*, BFloat16*, BFloat16*,
                       double);
template void ClipControlCpu(double, double, float*);
template void ClipControlCpu(double, double, double*);

}  // namespace baleen
