// SwiGLU, one flat pass each way.
//
// Bytes for n elements of s bytes: forward 3 n s, backward 5 n s. At 3 TB/s a multiprocessor takes
// 2.2 bf16 elements a cycle, so some 50 instructions an element would already be the limit: bf16
// uses the special function unit's exponential and division (their error is 2^-20, bf16 rounds at
// 2^-8), fp32 the exact ones.
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/flat.cuh"
#include "kernels/ops/sigmoid.cuh"
#include "kernels/ops/swiglu_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

template <typename T, int kWidth>
struct ForwardOp {
  const T* gate;
  const T* up;
  T* y;
  struct Value {
    Word<T, kWidth> gate, up;
  };
  __device__ Value Load(int64_t i) const {
    return {LoadWord<T, kWidth>(gate + i), LoadWord<T, kWidth>(up + i)};
  }
  __device__ void Store(int64_t i, const Value& value) const {
    float g[kWidth], u[kWidth];
    Unpack<T, kWidth>(value.gate, g);
    Unpack<T, kWidth>(value.up, u);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) u[k] = g[k] * Sigmoid<T>(g[k]) * u[k];
    cuda::Store<T, kWidth>(y + i, u);
  }
};

template <typename T, int kWidth>
struct BackwardOp {
  const T* dy;
  const T* gate;
  const T* up;
  T* dgate;
  T* dup;
  struct Value {
    Word<T, kWidth> dy, gate, up;
  };
  __device__ Value Load(int64_t i) const {
    return {LoadWord<T, kWidth>(dy + i), LoadWord<T, kWidth>(gate + i),
            LoadWord<T, kWidth>(up + i)};
  }
  __device__ void Store(int64_t i, const Value& value) const {
    float d[kWidth], g[kWidth], u[kWidth];
    Unpack<T, kWidth>(value.dy, d);
    Unpack<T, kWidth>(value.gate, g);
    Unpack<T, kWidth>(value.up, u);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float sigmoid = Sigmoid<T>(g[k]);
      const float dy_sigmoid = d[k] * sigmoid;
      d[k] = dy_sigmoid * u[k] * (1.0f + g[k] * (1.0f - sigmoid));
      u[k] = dy_sigmoid * g[k];
    }
    cuda::Store<T, kWidth>(dgate + i, d);
    cuda::Store<T, kWidth>(dup + i, u);
  }
};

}  // namespace

void SwigluCuda(CudaElement element, int64_t count, const void* gate, const void* up, void* y,
                void* stream) {
  ForElement(element, [&](auto zero) {
    using T = decltype(zero);
    const ForwardOp<T, kLanes<T>> vector{static_cast<const T*>(gate), static_cast<const T*>(up),
                                         static_cast<T*>(y)};
    const ForwardOp<T, 1> scalar{vector.gate, vector.up, vector.y};
    LaunchFlat<kLanes<T>, 2>("swiglu", count, Aligned16({gate, up, y}), vector, scalar, stream);
  });
}

void SwigluBackwardCuda(CudaElement element, int64_t count, const void* dy, const void* gate,
                        const void* up, void* dgate, void* dup, void* stream) {
  ForElement(element, [&](auto zero) {
    using T = decltype(zero);
    const BackwardOp<T, kLanes<T>> vector{static_cast<const T*>(dy), static_cast<const T*>(gate),
                                          static_cast<const T*>(up), static_cast<T*>(dgate),
                                          static_cast<T*>(dup)};
    const BackwardOp<T, 1> scalar{vector.dy, vector.gate, vector.up, vector.dgate, vector.dup};
    LaunchFlat<kLanes<T>, 2>("swiglu backward", count, Aligned16({dy, gate, up, dgate, dup}),
                             vector, scalar, stream);
  });
}

}  // namespace baleen
