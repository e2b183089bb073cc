// SwiGLU on the CPU, element by element in T.
#include "kernels/ops/swiglu_cpu.h"

#include <cmath>

namespace baleen {
namespace {

// exp overflows to infinity for gates far below zero, which gives the right limit 0.
template <typename T>
T Sigmoid(T x) {
  return 1 / (1 + std::exp(-x));
}

}  // namespace

template <typename T>
void SwigluCpu(int64_t count, const T* __restrict gate, const T* __restrict up, T* __restrict y) {
  for (int64_t i = 0; i < count; ++i) y[i] = gate[i] * Sigmoid(gate[i]) * up[i];
}

template <typename T>
void SwigluBackwardCpu(int64_t count, const T* __restrict dy, const T* __restrict gate,
                       const T* __restrict up, T* __restrict dgate, T* __restrict dup) {
  for (int64_t i = 0; i < count; ++i) {
    const T sigmoid = Sigmoid(gate[i]);
    dup[i] = dy[i] * gate[i] * sigmoid;
    dgate[i] = dy[i] * up[i] * sigmoid * (1 + gate[i] * (1 - sigmoid));
  }
}

template void SwigluCpu(int64_t, const float*, const float*, float*);
template void SwigluCpu(int64_t, const double*, const double*, double*);
template void SwigluBackwardCpu(int64_t, const float*, const float*, const float*, float*, float*);
template void SwigluBackwardCpu(int64_t, const double*, const double*, const double*, double*,
                                double*);

}  // namespace baleen
