// Weighted SwiGLU on the CPU, element by element in T; a weight's gradient is a sum in the order of
// the row.
#include "kernels/ops/moe/weighted_swiglu_cpu.h"

#include <cmath>

namespace baleen {

template <typename T>
void WeightedSwigluCpu(int64_t rows, int64_t F, const T* __restrict gate, const T* __restrict up,
                       const T* __restrict weight, T* __restrict y) {
  for (int64_t n = 0; n < rows; ++n) {
    for (int64_t i = n * F; i < (n + 1) * F; ++i) {
      y[i] = weight[n] * gate[i] / (1 + std::exp(-gate[i])) * up[i];
    }
  }
}

template <typename T>
void WeightedSwigluBackwardCpu(int64_t rows, int64_t F, const T* __restrict dy,
                               const T* __restrict gate, const T* __restrict up,
                               const T* __restrict weight, T* __restrict dgate, T* __restrict dup,
                               T* __restrict dweight) {
  for (int64_t n = 0; n < rows; ++n) {
    T sum = 0;
    for (int64_t i = n * F; i < (n + 1) * F; ++i) {
      const T sigmoid = 1 / (1 + std::exp(-gate[i]));
      const T silu = gate[i] * sigmoid;
      sum += dy[i] * silu * up[i];
      dup[i] = weight[n] * dy[i] * silu;
      dgate[i] = weight[n] * dy[i] * up[i] * sigmoid * (1 + gate[i] * (1 - sigmoid));
    }
    dweight[n] = sum;
  }
}

template void WeightedSwigluCpu(int64_t, int64_t, const float*, const float*, const float*, float*);
template void WeightedSwigluCpu(int64_t, int64_t, const double*, const double*, const double*,
                                double*);
template void WeightedSwigluBackwardCpu(int64_t, int64_t, const float*, const float*, const float*,
                                        const float*, float*, float*, float*);
template void WeightedSwigluBackwardCpu(int64_t, int64_t, const double*, const double*,
                                        const double*, const double*, double*, double*, double*);

}  // namespace baleen
