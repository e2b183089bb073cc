// Loads of what a kernel reads once and is larger than the L2: first to leave it, so that what lies
// there stays, and dirty lines of others are not written back in this kernel's time.
#pragma once

#include "kernels/cuda/vector.cuh"

namespace baleen::cuda {

template <typename T, int kWidth>
__device__ __forceinline__ Word<T, kWidth> LoadWordOnce(const T* address) {
  return __ldcs(reinterpret_cast<const Word<T, kWidth>*>(address));
}
template <typename T, int kWidth>
__device__ __forceinline__ void LoadOnce(const T* address, float (&values)[kWidth]) {
  Unpack<T, kWidth>(LoadWordOnce<T, kWidth>(address), values);
}

}  // namespace baleen::cuda
