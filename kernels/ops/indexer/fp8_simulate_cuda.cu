// E4M3 rounding with one power-of-two scale a group.
//
// Bytes: 2 * elements * s, or elements * (s + 1) for codes. Groups of kLanes times a power of two
// up to 32 (128 is the usual one) are held by a part of a warp; others are walked twice by a warp,
// the second time from L1. The same bits as the definition: the scale is exact, and so is
// multiplying by its inverse.
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

// Codes of a and b, b's in the second byte. The inverse of a power of two is exact; that of an
// infinity, 0, makes NaN of an infinity and 0 of what is finite, as dividing does.
__device__ __forceinline__ uint32_t CodesOf(float a, float b, float inverse) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a * inverse, b * inverse), __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ float2 ValuesOf(uint32_t codes) {
  const __half2_raw halves =
      __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
  return __half22float2(__half2(halves));
}

// What is written: the rounded values, or codes and scales.
template <typename T>
struct Rounded {
  T* y;
  template <int kWidth>
  __device__ __forceinline__ void Store(int64_t at, float scale, float (&x)[kWidth]) const {
    const float inverse = 1.0f / scale;
    if constexpr (kWidth == 1) {
      x[0] = ValuesOf(CodesOf(x[0], 0, inverse)).x * scale;
    } else {
#pragma unroll
      for (int k = 0; k < kWidth; k += 2) {
        const float2 values = ValuesOf(CodesOf(x[k], x[k + 1], inverse));
        x[k] = values.x * scale;
        x[k + 1] = values.y * scale;
      }
    }
    cuda::Store<T, kWidth>(y + at, x);
  }
  __device__ __forceinline__ void StoreScale(int64_t, float) const {}
};
struct Codes {
  uint8_t* codes;
  float* scales;
  template <int kWidth>
  __device__ __forceinline__ void Store(int64_t at, float scale, const float (&x)[kWidth]) const {
    const float inverse = 1.0f / scale;
    if constexpr (kWidth == 1) {
      codes[at] = static_cast<uint8_t>(CodesOf(x[0], 0, inverse));
    } else {
      uint32_t words[kWidth / 4] = {};
#pragma unroll
      for (int k = 0; k < kWidth; k += 2)
        words[k / 4] |= CodesOf(x[k], x[k + 1], inverse) << k % 4 * 8;
      if constexpr (kWidth == 8) {
        *reinterpret_cast<uint2*>(codes + at) = make_uint2(words[0], words[1]);
      } else {
        *reinterpret_cast<uint32_t*>(codes + at) = words[0];
      }
    }
  }
  __device__ __forceinline__ void StoreScale(int64_t group, float scale) const {
    scales[group] = scale;
  }
};

// group = kLanes<T> * group_lanes, group_lanes a power of two up to 32.
template <typename T, class Out>
__global__ void __launch_bounds__(kFlatThreads)
    WarpKernel(int64_t vectors, int group_lanes, const T* x, Out out) {
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
  if (i >= vectors) return;
  out.Store(i * kWidth, scale, v);
  if ((i & (group_lanes - 1)) == 0) out.StoreScale(i / group_lanes, scale);
}

// One warp a group, any group.
template <typename T, class Out>
__global__ void __launch_bounds__(kFlatThreads)
    AnyGroupKernel(int64_t groups, int64_t group, const T* x, Out out) {
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
    out.Store(g * group + i, scale, v);
  }
  if (lane == 0) out.StoreScale(g, scale);
}

// `aligned`: all arrays begin at multiples of 16 bytes.
template <typename T, class Out>
void Launch(int64_t groups, int64_t group, const T* x, Out out, bool aligned, void* stream) {
  const int64_t lanes = group / kLanes<T>;
  const bool fits = group % kLanes<T> == 0 && lanes <= 32 && (lanes & (lanes - 1)) == 0;
  if (fits && aligned) {
    const int64_t vectors = groups * lanes;
    WarpKernel<T><<<static_cast<unsigned>(CeilDiv(vectors, kFlatThreads)), kFlatThreads, 0,
                    AsStream(stream)>>>(vectors, static_cast<int>(lanes), x, out);
  } else {
    AnyGroupKernel<T><<<static_cast<unsigned>(CeilDiv(groups, kFlatThreads / 32)), kFlatThreads, 0,
                        AsStream(stream)>>>(groups, group, x, out);
  }
}

}  // namespace

void SimulateFp8Cuda(CudaElement element, int64_t groups, int64_t group, const void* x, void* y,
                     void* stream) {
  if (groups == 0) return;
  ForElement(element, [&](auto zero) {
    using T = decltype(zero);
    Launch(groups, group, static_cast<const T*>(x), Rounded<T>{static_cast<T*>(y)},
           Aligned16({x, y}), stream);
    CheckLaunch("fp8 simulate");
  });
}

void QuantiseFp8Cuda(CudaElement element, int64_t groups, int64_t group, const void* x, void* codes,
                     float* scales, void* stream) {
  if (groups == 0) return;
  ForElement(element, [&](auto zero) {
    using T = decltype(zero);
    Launch(groups, group, static_cast<const T*>(x), Codes{static_cast<uint8_t*>(codes), scales},
           Aligned16({x, codes}), stream);
    CheckLaunch("fp8 quantise");
  });
}

}  // namespace baleen
