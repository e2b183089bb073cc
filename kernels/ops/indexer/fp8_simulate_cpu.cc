// E4M3 with one power-of-two scale a group. The scale is found without a logarithm: the smallest
// 2^e with 448 * 2^e >= amax, from amax = m * 2^E with m in [0.5, 1) and 448 = 0.875 * 2^9.
// Dividing by it is exact.
#include "kernels/ops/indexer/fp8_simulate_cpu.h"

#include <algorithm>
#include <cmath>

namespace baleen {
namespace {

constexpr double kSmallestAmax = 1e-4;

// 2^ceil(log2(amax / 448)), exactly. An amax that is not finite is its own scale: the group becomes
// NaN.
template <typename T>
T PowerOfTwoScale(T amax) {
  if (!std::isfinite(amax)) return amax;
  int exponent = 0;
  const T mantissa = std::frexp(amax, &exponent);
  return std::ldexp(T{1}, mantissa <= T{0.875} ? exponent - 9 : exponent - 8);
}

}  // namespace

template <typename T>
Tensor SimulateFp8Cpu(const Context& context, const Tensor& x, int64_t group) {
  Tensor y = context.Empty(x.dtype(), x.shape());
  if (context.dry()) return y;
  for (int64_t begin = 0; begin < x.num_elements(); begin += group) {
    const T* in = x.data<T>() + begin;
    T amax = static_cast<T>(kSmallestAmax);
    for (int64_t i = 0; i < group; ++i) amax = std::max(amax, std::fabs(in[i]));
    const T scale = PowerOfTwoScale(amax);
    for (int64_t i = 0; i < group; ++i) {
      // E4M3 is rounded from fp32; a double is rounded to fp32 before.
      const float code = Float8E4M3::FromFloat(static_cast<float>(in[i] / scale)).ToFloat();
      y.data<T>()[begin + i] = static_cast<T>(code) * scale;
    }
  }
  return y;
}

template Tensor SimulateFp8Cpu<float>(const Context&, const Tensor&, int64_t);
template Tensor SimulateFp8Cpu<double>(const Context&, const Tensor&, int64_t);

}  // namespace baleen
