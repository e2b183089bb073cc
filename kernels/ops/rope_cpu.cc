// RoPE on the CPU. Angles are formed in fp64, so that position 131071 keeps all bits of cos and
// sin.
#include "kernels/ops/rope_cpu.h"

#include <cmath>

namespace baleen {

template <typename T>
void RopeTableCpu(const std::vector<double>& frequencies, int64_t num_positions, T* cos, T* sin) {
  const int64_t half = static_cast<int64_t>(frequencies.size());
  for (int64_t position = 0; position < num_positions; ++position) {
    for (int64_t i = 0; i < half; ++i) {
      const double angle = static_cast<double>(position) * frequencies[i];
      cos[position * half + i] = static_cast<T>(std::cos(angle));
      sin[position * half + i] = static_cast<T>(std::sin(angle));
    }
  }
}

template <typename T>
void ApplyRopeCpu(const RopeArguments<T>& p, RopeLayout layout, RopeDirection direction) {
  // Pair i is (x[i * step], x[i * step + partner]).
  const int64_t step = layout == RopeLayout::kInterleaved ? 2 : 1;
  const int64_t partner = layout == RopeLayout::kInterleaved ? 1 : p.half;
  const T sign = direction == RopeDirection::kForward ? 1 : -1;
  for (int64_t t = 0; t < p.tokens; ++t) {
    const T* __restrict const cos = p.cos + p.positions[t] * p.half;
    const T* __restrict const sin = p.sin + p.positions[t] * p.half;
    for (int64_t head = 0; head < p.heads; ++head) {
      T* __restrict const x = p.x + head * p.head_stride + t * p.row_stride;
      for (int64_t i = 0; i < p.half; ++i) {
        const T a = x[i * step], b = x[i * step + partner];
        x[i * step] = a * cos[i] - b * (sign * sin[i]);
        x[i * step + partner] = a * (sign * sin[i]) + b * cos[i];
      }
    }
  }
}

template void RopeTableCpu(const std::vector<double>&, int64_t, float*, float*);
template void RopeTableCpu(const std::vector<double>&, int64_t, double*, double*);
template void ApplyRopeCpu(const RopeArguments<float>&, RopeLayout, RopeDirection);
template void ApplyRopeCpu(const RopeArguments<double>&, RopeLayout, RopeDirection);

}  // namespace baleen
