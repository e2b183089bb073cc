// RoPE in place on a strided view.
//
// Bytes: 2 * heads * tokens * 2 half * s; cos and sin (8 half bytes a token) come from L1 and L2. A
// thread rotates, of up to four heads, one 16-byte vector of interleaved pairs, or two vectors that
// lie half a row apart.
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

// Work item i: unit i % units of a run of kHeads heads of a token: they share cos and sin, and
// their loads are in flight together.
struct Place {
  int64_t token, head;
  int unit;
};
template <int kHeads>
__device__ __forceinline__ Place PlaceOf(int64_t i, uint32_t units, uint32_t heads) {
  // Items of one launch stay below 2^32 (the host cuts tokens).
  const auto item = static_cast<uint32_t>(i);
  const uint32_t runs = heads / kHeads, row = item / units, token = row / runs;
  return {token, int64_t{row - token * runs} * kHeads, static_cast<int>(item - row * units)};
}

template <int kPairs>
__device__ __forceinline__ void Rotate(const float* cos, const float* sin, float sign,
                                       float (&a)[kPairs], float (&b)[kPairs]) {
#pragma unroll
  for (int k = 0; k < kPairs; ++k) {
    const float c = cos[k], s = sign * sin[k], x = a[k], y = b[k];
    a[k] = x * c - y * s;
    b[k] = x * s + y * c;
  }
}

// Where the pairs of a unit lie: (2i, 2i + 1), one vector of 2 kPairs elements; or (i, i + half),
// two vectors half a row apart.
template <typename T, int kPairs>
struct Interleaved {
  static __device__ __forceinline__ int Offset(int unit) { return unit * 2 * kPairs; }
  static __device__ __forceinline__ void Read(const T* x, int, float (&a)[kPairs],
                                              float (&b)[kPairs]) {
    if constexpr (kPairs == 1) {  // two single elements, which may lie anywhere
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
  }
  static __device__ __forceinline__ void Write(T* x, int, const float (&a)[kPairs],
                                               const float (&b)[kPairs]) {
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
};

template <typename T, int kPairs>
struct HalfSplit {
  static __device__ __forceinline__ int Offset(int unit) { return unit * kPairs; }
  static __device__ __forceinline__ void Read(const T* x, int half, float (&a)[kPairs],
                                              float (&b)[kPairs]) {
    Load<T, kPairs>(x, a);
    Load<T, kPairs>(x + half, b);
  }
  static __device__ __forceinline__ void Write(T* x, int half, const float (&a)[kPairs],
                                               const float (&b)[kPairs]) {
    Store<T, kPairs>(x, a);
    Store<T, kPairs>(x + half, b);
  }
};

template <typename T, int kPairs, int kHeads, typename Layout>
__global__ void __launch_bounds__(kFlatThreads) RopeKernel(ApplyRopeCudaArgs args, int64_t items) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (i >= items) return;
  const Place place = PlaceOf<kHeads>(i, args.half / kPairs, static_cast<uint32_t>(args.heads));
  T* const x = static_cast<T*>(args.x) + place.head * args.head_stride +
               place.token * args.row_stride + Layout::Offset(place.unit);
  const int half = static_cast<int>(args.half);
  float a[kHeads][kPairs], b[kHeads][kPairs];
#pragma unroll
  for (int h = 0; h < kHeads; ++h) Layout::Read(x + h * args.head_stride, half, a[h], b[h]);
  const int64_t angle = int64_t{args.positions_T[place.token]} * args.half + place.unit * kPairs;
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    Rotate(args.cos + angle, args.sin + angle, args.sign, a[h], b[h]);
    Layout::Write(x + h * args.head_stride, half, a[h], b[h]);
  }
}

template <typename T, int kPairs, int kHeads, typename Layout>
void Launch(const ApplyRopeCudaArgs& args, void* stream) {
  const int64_t items = args.tokens * (args.heads / kHeads) * (args.half / kPairs);
  RopeKernel<T, kPairs, kHeads, Layout>
      <<<static_cast<unsigned>(CeilDiv(items, kFlatThreads)), kFlatThreads, 0, AsStream(stream)>>>(
          args, items);
  CheckLaunch("rope");
}

template <typename T, int kPairs, template <typename, int> class Layout>
void LaunchHeads(const ApplyRopeCudaArgs& args, void* stream) {
  args.heads % 4 == 0 ? Launch<T, kPairs, 4, Layout<T, kPairs>>(args, stream)
                      : Launch<T, kPairs, 1, Layout<T, kPairs>>(args, stream);
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
      strides&& args.half % (kWidth / 2) == 0
          ? LaunchHeads<T, kWidth / 2, Interleaved>(args, stream)
          : LaunchHeads<T, 1, Interleaved>(args, stream);
    } else {
      strides&& args.half % kWidth == 0 ? LaunchHeads<T, kWidth, HalfSplit>(args, stream)
                                        : LaunchHeads<T, 1, HalfSplit>(args, stream);
    }
  });
}

}  // namespace baleen
