// Vectors of one memory access: kWidth elements of T moved as one word of up to 16 bytes, computed
// with as floats. A kernel takes the width as a template argument: kLanes<T> where all its arrays
// are 16-byte aligned, 1 where they are not.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "kernels/cuda/element.h"
#include "kernels/cuda/warp.cuh"

namespace baleen::cuda {

// Elements of a 16-byte access.
template <typename T>
inline constexpr int kLanes = 16 / static_cast<int>(sizeof(T));

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using Type = uint4;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<4> {
  using Type = uint32_t;
};
template <>
struct WordOf<2> {
  using Type = uint16_t;
};
// kWidth elements of T as they lie in memory.
template <typename T, int kWidth>
using Word = typename WordOf<static_cast<int>(sizeof(T)) * kWidth>::Type;

template <typename T, int kWidth>
__device__ __forceinline__ Word<T, kWidth> LoadWord(const T* address) {
  return *reinterpret_cast<const Word<T, kWidth>*>(address);
}
template <typename T, int kWidth>
__device__ __forceinline__ void StoreWord(T* address, const Word<T, kWidth>& word) {
  *reinterpret_cast<Word<T, kWidth>*>(address) = word;
}

template <typename T, int kWidth>
__device__ __forceinline__ void Unpack(const Word<T, kWidth>& word, float (&values)[kWidth]) {
  if constexpr (std::is_same_v<T, float>) {
    const float* const floats = reinterpret_cast<const float*>(&word);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) values[i] = floats[i];
  } else if constexpr (kWidth == 1) {
    values[0] = LowBf16(word);
  } else {
    const uint32_t* const pairs = reinterpret_cast<const uint32_t*>(&word);
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      values[2 * i] = LowBf16(pairs[i]);
      values[2 * i + 1] = HighBf16(pairs[i]);
    }
  }
}

// Rounds to nearest even.
template <typename T, int kWidth>
__device__ __forceinline__ Word<T, kWidth> Pack(const float (&values)[kWidth]) {
  Word<T, kWidth> word;
  if constexpr (std::is_same_v<T, float>) {
    float* const floats = reinterpret_cast<float*>(&word);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) floats[i] = values[i];
  } else if constexpr (kWidth == 1) {
    word = __bfloat16_as_ushort(__float2bfloat16_rn(values[0]));
  } else {
    uint32_t* const pairs = reinterpret_cast<uint32_t*>(&word);
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) {
      pairs[i] = PackBf16(values[2 * i], values[2 * i + 1]);
    }
  }
  return word;
}

template <typename T, int kWidth>
__device__ __forceinline__ void Load(const T* address, float (&values)[kWidth]) {
  Unpack<T, kWidth>(LoadWord<T, kWidth>(address), values);
}
template <typename T, int kWidth>
__device__ __forceinline__ void Store(T* address, const float (&values)[kWidth]) {
  StoreWord<T, kWidth>(address, Pack<T, kWidth>(values));
}

// --- Host: which instance of a kernel runs.

inline bool Aligned16(std::initializer_list<const void*> addresses) {
  uintptr_t bits = 0;
  for (const void* address : addresses) bits |= reinterpret_cast<uintptr_t>(address);
  return bits % 16 == 0;
}

// Calls function(T{}) with the device type of `element`.
template <typename Function>
void ForElement(CudaElement element, Function function) {
  element == CudaElement::kBF16 ? function(__nv_bfloat16{}) : function(float{});
}

template <int kWidth>
using Width = std::integral_constant<int, kWidth>;
// Calls function(Width<kLanes<T>>{}) or function(Width<1>{}).
template <typename T, typename Function>
void ForWidth(bool vectors, Function function) {
  vectors ? function(Width<kLanes<T>>{}) : function(Width<1>{});
}

}  // namespace baleen::cuda
