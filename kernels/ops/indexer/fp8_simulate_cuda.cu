// E4M3 rounding with one power-of-two scale a group.
//
// Bytes: 2 * elements * s. Groups of kLanes times a power of two up to 32 (128 is the usual one)
// are held by a part of a warp; others are walked twice by a warp, the second time from L1. The
// same bits as the definition: the scale is exact, and so is multiplying by its inverse.
#include <cuda_fp8.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/indexer/fp8_simulate_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

constexpr float kSmallestAmax = 1e-4f;

// 2^ceil(log2(amax / 448)) for amax >= 1e-4, from amax = m 2^e with m in [1, 2) and 448 = 1.75 2^8.
// An amax that is not finite is its own scale: the group becomes NaN.
__device__ __forceinline__ float PowerOfTwoScale(float amax) {
  const uint32_t bits = __float_as_uint(amax), exponent = bits >> 23;
  if (exponent == 255) return amax;
  const uint32_t mantissa = bits & 0x7FFFFFu;
  return __uint_as_float((exponent - (mantissa <= 0x600000u ? 8 : 7)) << 23);
}

__device__ __forceinline__ float RoundToFp8(float x, float scale) {
  // A scale of infinity or NaN has no exact inverse; x / scale gives what the definition gives.
  const float code = isfinite(scale) ? x * (1.0f / scale) : x / scale;
  const __nv_fp8_storage_t fp8 = __nv_cvt_float_to_fp8(code, __NV_SATFINITE, __NV_E4M3);
  const __half_raw half = __nv_cvt_fp8_to_halfraw(fp8, __NV_E4M3);
  return __half2float(__half(half)) * scale;
}

// group = kLanes<T> * group_lanes, group_lanes a power of two up to 32.
template <typename T>
__global__ void __launch_bounds__(kFlatThreads)
    WarpKernel(int64_t vectors, int group_lanes, const T* x, T* y) {
  constexpr int kWidth = kLanes<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  float v[kWidth] = {};
  if (i < vectors) Load<T, kWidth>(x + i * kWidth, v);
  float amax = kSmallestAmax;  // fmaxf passes over NaN, as the definition does
#pragma unroll
  for (int k = 0; k < kWidth; ++k) amax = fmaxf(amax, fabsf(v[k]));
  for (int half = 1; half < group_lanes; half *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, half));
  }
  const float scale = PowerOfTwoScale(amax);
#pragma unroll
  for (int k = 0; k < kWidth; ++k) v[k] = RoundToFp8(v[k], scale);
  if (i < vectors) Store<T, kWidth>(y + i * kWidth, v);
}

// One warp a group, any group.
template <typename T>
__global__ void __launch_bounds__(kFlatThreads)
    AnyGroupKernel(int64_t groups, int64_t group, const T* x, T* y) {
  const int64_t g = static_cast<int64_t>(blockIdx.x) * (kFlatThreads / 32) + threadIdx.x / 32;
  if (g >= groups) return;
  const int lane = threadIdx.x % 32;
  float amax = kSmallestAmax, v[1];
  for (int64_t i = lane; i < group; i += 32) {
    Load<T, 1>(x + g * group + i, v);
    amax = fmaxf(amax, fabsf(v[0]));
  }
#pragma unroll
  for (int half = 1; half < 32; half *= 2) {
    amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, half));
  }
  const float scale = PowerOfTwoScale(amax);
  for (int64_t i = lane; i < group; i += 32) {
    Load<T, 1>(x + g * group + i, v);
    v[0] = RoundToFp8(v[0], scale);
    Store<T, 1>(y + g * group + i, v);
  }
}

}  // namespace

void SimulateFp8Cuda(CudaElement element, int64_t groups, int64_t group, const void* x, void* y,
                     void* stream) {
  if (groups == 0) return;
  ForElement(element, [&](auto zero) {
    using T = decltype(zero);
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    const int64_t lanes = group / kLanes<T>;
    const bool fits = group % kLanes<T> == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0;
    if (fits && Aligned16({x, y})) {
      const int64_t vectors = groups * lanes;
      WarpKernel<T><<<static_cast<unsigned>(CeilDiv(vectors, kFlatThreads)), kFlatThreads, 0,
                      AsStream(stream)>>>(vectors, static_cast<int>(lanes), from, to);
    } else {
      AnyGroupKernel<T><<<static_cast<unsigned>(CeilDiv(groups, kFlatThreads / 32)), kFlatThreads,
                          0, AsStream(stream)>>>(groups, group, from, to);
    }
    CheckLaunch("fp8 simulate");
  });
}

}  // namespace baleen
