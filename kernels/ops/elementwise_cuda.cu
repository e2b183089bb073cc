// Flat elementwise passes: every element is read and written once.
//
// Bytes for n elements of s bytes: add 3 n s, scale 2 n s, cast n (s_from + s_to), fill n s, copy
// 2 n s. Four (add: three) 16-byte accesses of a thread are in flight.
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/elementwise_cuda.h"
#include "kernels/ops/flat.cuh"

namespace baleen {
namespace {

using namespace cuda;

template <typename T, int kWidth>
struct AddOp {
  const T* a;
  const T* b;
  T* sum;
  struct Value {
    Word<T, kWidth> a, b;
  };
  __device__ Value Load(int64_t i) const {
    return {LoadWord<T, kWidth>(a + i), LoadWord<T, kWidth>(b + i)};
  }
  __device__ void Store(int64_t i, const Value& value) const {
    float x[kWidth], y[kWidth];
    Unpack<T, kWidth>(value.a, x);
    Unpack<T, kWidth>(value.b, y);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) x[k] += y[k];
    cuda::Store<T, kWidth>(sum + i, x);
  }
};

template <typename T, int kWidth>
struct ScaleOp {
  float factor;
  T* a;
  using Value = Word<T, kWidth>;
  __device__ Value Load(int64_t i) const { return LoadWord<T, kWidth>(a + i); }
  __device__ void Store(int64_t i, const Value& value) const {
    float x[kWidth];
    Unpack<T, kWidth>(value, x);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) x[k] *= factor;
    cuda::Store<T, kWidth>(a + i, x);
  }
};

template <typename From, typename To, int kWidth>
struct CastOp {
  const From* from;
  To* to;
  using Value = Word<From, kWidth>;
  __device__ Value Load(int64_t i) const { return LoadWord<From, kWidth>(from + i); }
  __device__ void Store(int64_t i, const Value& value) const {
    float x[kWidth];
    Unpack<From, kWidth>(value, x);
    cuda::Store<To, kWidth>(to + i, x);
  }
};

struct FillOp {
  int32_t value;
  int32_t* a;
  using Value = int32_t;
  __device__ Value Load(int64_t) const { return value; }
  __device__ void Store(int64_t i, const Value& filled) const { a[i] = filled; }
};

}  // namespace

void AddCuda(CudaElement element, int64_t count, const void* a, const void* b, void* sum,
             void* stream) {
  ForElement(element, [&](auto zero) {
    using T = decltype(zero);
    const auto* x = static_cast<const T*>(a);
    const auto* y = static_cast<const T*>(b);
    auto* z = static_cast<T*>(sum);
    LaunchFlat<kLanes<T>, 3>("add", count, Aligned16({a, b, sum}), AddOp<T, kLanes<T>>{x, y, z},
                             AddOp<T, 1>{x, y, z}, stream);
  });
}

void ScaleCuda(CudaElement element, int64_t count, double factor, void* a, void* stream) {
  ForElement(element, [&](auto zero) {
    using T = decltype(zero);
    const auto f = static_cast<float>(factor);
    auto* x = static_cast<T*>(a);
    LaunchFlat<kLanes<T>, 4>("scale", count, Aligned16({a}), ScaleOp<T, kLanes<T>>{f, x},
                             ScaleOp<T, 1>{f, x}, stream);
  });
}

void CastCuda(CudaElement from_element, CudaElement to_element, int64_t count, const void* from,
              void* to, void* stream) {
  ForElement(from_element, [&](auto from_zero) {
    ForElement(to_element, [&](auto to_zero) {
      using From = decltype(from_zero);
      using To = decltype(to_zero);
      // Four elements: 16 bytes of fp32 beside 8 of bf16.
      const CastOp<From, To, 4> vector{static_cast<const From*>(from), static_cast<To*>(to)};
      const CastOp<From, To, 1> scalar{vector.from, vector.to};
      LaunchFlat<4, 4>("cast", count, Aligned16({from, to}), vector, scalar, stream);
    });
  });
}

void FillZeroCuda(int64_t bytes, void* a, void* stream) {
  if (bytes == 0) return;
  CheckCuda(cudaMemsetAsync(a, 0, static_cast<size_t>(bytes), AsStream(stream)), "fill zero");
}

void FillIntCuda(int64_t count, int32_t value, int32_t* a, void* stream) {
  LaunchFlat<1, 4>("fill int", count, false, FillOp{value, a}, FillOp{value, a}, stream);
}

void CopyCuda(int64_t bytes, const void* from, void* to, void* stream) {
  if (bytes == 0) return;
  CheckCuda(cudaMemcpyAsync(to, from, static_cast<size_t>(bytes), cudaMemcpyDeviceToDevice,
                            AsStream(stream)),
            "copy");
}

}  // namespace baleen
