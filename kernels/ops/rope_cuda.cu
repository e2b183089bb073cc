// RoPE in place on a strided view.
//
// Bytes: 2 * heads * tokens * 2 half * s; cos and sin (8 half bytes a token) come from L1 and L2. A
// thread rotates one 16-byte vector of interleaved pairs, or two vectors that lie half a row apart.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/rope_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

// The angle is formed in fp64, so that position 131071 keeps all bits of cos and sin.
__global__ void __launch_bounds__(kFlatThreads)
    RopeTableKernel(__grid_constant__ const RopeTableCudaArgs args) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (i >= args.positions * args.half) return;
  const int64_t position = i / args.half;
  double sin, cos;
  sincos(static_cast<double>(position) * args.frequencies[i - position * args.half], &sin, &cos);
  args.cos[i] = static_cast<float>(cos);
  args.sin[i] = static_cast<float>(sin);
}

// Work item i: unit i % units of head i / units % heads of token i / (units * heads).
struct Place {
  int64_t token, head;
  int unit;
};
__device__ __forceinline__ Place PlaceOf(int64_t i, uint32_t units, uint32_t heads) {
  // Items of one launch stay below 2^32 (the host cuts tokens).
  const auto item = static_cast<uint32_t>(i);
  const uint32_t row = item / units, token = row / heads;
  return {token, row - token * heads, static_cast<int>(item - row * units)};
}

template <typename T, int kPairs>
__device__ __forceinline__ void Rotate(const float* cos, const float* sin, float sign,
                                       float (&a)[kPairs], float (&b)[kPairs]) {
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const float c = cos[k], s = sign * sin[k], x = a[k], y = b[k];
    a[k] = x * c - y * s;
    b[k] = x * s + y * c;
  }
}

// kPairs pairs (2i, 2i + 1): one vector of 2 kPairs elements; with kPairs 1, two single elements.
template <typename T, int kPairs>
__global__ void __launch_bounds__(kFlatThreads)
    InterleavedKernel(ApplyRopeCudaArgs args, int64_t items) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (i >= items) return;
  const Place place = PlaceOf(i, args.half / kPairs, static_cast<uint32_t>(args.heads));
  T* const x = static_cast<T*>(args.x) + place.head * args.head_stride +
               place.token * args.row_stride + place.unit * 2 * kPairs;
  float a[kPairs], b[kPairs];
  if constexpr (kPairs == 1) {
    Load<T, 1>(x, a);
    Load<T, 1>(x + 1, b);
  } else {
    float v[2 * kPairs];
    Load<T, 2 * kPairs>(x, v);
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      a[k] = v[2 * k];
      b[k] = v[2 * k + 1];
    }
  }
  const int64_t angle = int64_t{args.positions_T[place.token]} * args.half + place.unit * kPairs;
  Rotate<T>(args.cos + angle, args.sin + angle, args.sign, a, b);
  if constexpr (kPairs == 1) {
    Store<T, 1>(x, a);
    Store<T, 1>(x + 1, b);
  } else {
    float v[2 * kPairs];
#pragma unroll
    for (int k = 0; k < kPairs; ++k) {
      v[2 * k] = a[k];
      v[2 * k + 1] = b[k];
    }
    Store<T, 2 * kPairs>(x, v);
  }
}

// kPairs pairs (i, i + half).
template <typename T, int kPairs>
__global__ void __launch_bounds__(kFlatThreads)
    HalfSplitKernel(ApplyRopeCudaArgs args, int64_t items) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (i >= items) return;
  const Place place = PlaceOf(i, args.half / kPairs, static_cast<uint32_t>(args.heads));
  T* const x = static_cast<T*>(args.x) + place.head * args.head_stride +
               place.token * args.row_stride + place.unit * kPairs;
  float a[kPairs], b[kPairs];
  Load<T, kPairs>(x, a);
  Load<T, kPairs>(x + args.half, b);
  const int64_t angle = int64_t{args.positions_T[place.token]} * args.half + place.unit * kPairs;
  Rotate<T>(args.cos + angle, args.sin + angle, args.sign, a, b);
  Store<T, kPairs>(x, a);
  Store<T, kPairs>(x + args.half, b);
}

template <typename T, int kPairs>
void LaunchInterleaved(const ApplyRopeCudaArgs& args, void* stream) {
  const int64_t items = args.tokens * args.heads * (args.half / kPairs);
  InterleavedKernel<T, kPairs>
      <<<static_cast<unsigned>(CeilDiv(items, kFlatThreads)), kFlatThreads, 0, AsStream(stream)>>>(
          args, items);
  CheckLaunch("rope, interleaved");
}

template <typename T, int kPairs>
void LaunchHalfSplit(const ApplyRopeCudaArgs& args, void* stream) {
  const int64_t items = args.tokens * args.heads * (args.half / kPairs);
  HalfSplitKernel<T, kPairs>
      <<<static_cast<unsigned>(CeilDiv(items, kFlatThreads)), kFlatThreads, 0, AsStream(stream)>>>(
          args, items);
  CheckLaunch("rope, half split");
}

}  // namespace

void RopeTableCuda(const RopeTableCudaArgs& args, void* stream) {
  const int64_t items = args.positions * args.half;
  if (items == 0) return;
  RopeTableKernel<<<static_cast<unsigned>(CeilDiv(items, kFlatThreads)), kFlatThreads, 0,
                    AsStream(stream)>>>(args);
  CheckLaunch("rope table");
}

void ApplyRopeCuda(const ApplyRopeCudaArgs& args, void* stream) {
  if (args.tokens == 0 || args.heads == 0) return;
  // Whole launches of fewer than 2^31 items.
  const int64_t token_items = args.heads * args.half;
  const int64_t most = std::max<int64_t>(1, (int64_t{1} << 31) / token_items);
  if (args.tokens > most) {
    ApplyRopeCudaArgs part = args;
    part.tokens = most;
    ApplyRopeCuda(part, stream);
    part = args;
    part.tokens -= most;
    part.positions_T += most;
    const int64_t bytes = args.element == CudaElement::kF32 ? 4 : 2;
    part.x = static_cast<char*>(args.x) + most * args.row_stride * bytes;
    return ApplyRopeCuda(part, stream);
  }
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    constexpr int kWidth = kLanes<T>;
    const bool strides = Aligned16({args.x}) && (args.head_stride | args.row_stride) % kWidth == 0;
    if (args.interleaved) {
      // 16 bytes are half as many pairs as elements.
      strides&& args.half % (kWidth / 2) == 0 ? LaunchInterleaved<T, kWidth / 2>(args, stream)
                                              : LaunchInterleaved<T, 1>(args, stream);
    } else {
      strides&& args.half % kWidth == 0 ? LaunchHalfSplit<T, kWidth>(args, stream)
                                        : LaunchHalfSplit<T, 1>(args, stream);
    }
  });
}

}  // namespace baleen
