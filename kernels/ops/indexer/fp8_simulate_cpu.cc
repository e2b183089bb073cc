// E4M3 with one power-of-two scale a group. The scale is found without a logarithm: the smallest
// 2^e with 448 * 2^e >= amax, from amax = m * 2^E with m in [0.5, 1) and 448 = 0.875 * 2^9.
// Dividing by it is exact.
#include "kernels/ops/indexer/fp8_simulate_cpu.h"

#include <algorithm>
#include <cmath>
#include <vector>

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

// Scale of the group, and its codes.
template <typename T>
T QuantiseGroup(const T* x, int64_t group, Float8E4M3* codes) {
  T amax = static_cast<T>(kSmallestAmax);
  for (int64_t i = 0; i < group; ++i) amax = std::max(amax, std::fabs(x[i]));  // passes over NaN
  const T scale = PowerOfTwoScale(amax);
  for (int64_t i = 0; i < group; ++i) {
    // E4M3 is rounded from fp32; a double is rounded to fp32 before.
    codes[i] = Float8E4M3::FromFloat(static_cast<float>(x[i] / scale));
  }
  return scale;
}

}  // namespace

template <typename T>
Tensor SimulateFp8Cpu(const Context& context, const Tensor& x, int64_t group) {
  Tensor y = context.Empty(x.dtype(), x.shape());
  if (context.dry()) return y;
  std::vector<Float8E4M3> codes(group);
  for (int64_t begin = 0; begin < x.num_elements(); begin += group) {
    const T scale = QuantiseGroup(x.data<T>() + begin, group, codes.data());
    for (int64_t i = 0; i < group; ++i)
      y.data<T>()[begin + i] = static_cast<T>(codes[i].ToFloat()) * scale;
  }
  return y;
}

template <typename T>
void QuantiseFp8Cpu(const Tensor& x, int64_t group, const Fp8Codes& result) {
  for (int64_t g = 0; g < result.scales.num_elements(); ++g) {
    result.scales.data<T>()[g] =
        QuantiseGroup(x.data<T>() + g * group, group, result.codes.data<Float8E4M3>() + g * group);
  }
}

template Tensor SimulateFp8Cpu<float>(const Context&, const Tensor&, int64_t);
template Tensor SimulateFp8Cpu<double>(const Context&, const Tensor&, int64_t);
template void QuantiseFp8Cpu<float>(const Tensor&, int64_t, const Fp8Codes&);
template void QuantiseFp8Cpu<double>(const Tensor&, int64_t, const Fp8Codes&);

}  // namespace baleen
