// The logistic function as activations of T want it.
#pragma once

#include <type_traits>

namespace baleen::cuda {

// bf16 uses the special function unit's exponential and division (their error is 2^-20, bf16 rounds
// at 2^-8), fp32 the exact ones. exp overflows to infinity for gates far below zero, which gives
// the right limit 0.
template <typename T>
__device__ __forceinline__ float Sigmoid(float x) {
  if constexpr (std::is_same_v<T, float>) {
    return 1.0f / (1.0f + expf(-x));
  } else {
    return __fdividef(1.0f, 1.0f + __expf(-x));
  }
}

}  // namespace baleen::cuda
