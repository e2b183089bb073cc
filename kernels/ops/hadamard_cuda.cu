// Walsh-Hadamard transform of rows, with all rounds in registers where a row fits a part of a warp.
//
// Bytes: 2 * rows * dim * s. A lane holds kLanes neighbouring elements: the first log2(kLanes)
// rounds stay in the lane, the others are shuffles (4 an element at dim 128 in bf16: 13 of the 32
// that a multiprocessor does a cycle at 3 TB/s). Longer rows go through shared memory.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/hadamard_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

// dim = kLanes<T> * row_lanes, row_lanes a power of two up to 32.
template <typename T>
__global__ void __launch_bounds__(kFlatThreads)
    WarpKernel(int64_t vectors, int row_lanes, float factor, const T* x, T* y) {
  constexpr int kWidth = kLanes<T>;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  float v[kWidth] = {};
  if (i < vectors) Load<T, kWidth>(x + i * kWidth, v);
#pragma unroll
  for (int half = 1; half < kWidth; half *= 2) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      if (k & half) continue;
      const float a = v[k], b = v[k + half];
      v[k] = a + b;
      v[k + half] = a - b;
    }
  }
  for (int half = 1; half < row_lanes; half *= 2) {
    const bool upper = threadIdx.x & half;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float other = __shfl_xor_sync(~0u, v[k], half);
      v[k] = upper ? other - v[k] : v[k] + other;
    }
  }
#pragma unroll
  for (int k = 0; k < kWidth; ++k) v[k] *= factor;
  if (i < vectors) Store<T, kWidth>(y + i * kWidth, v);
}

// One row a block, in dim floats of shared memory.
template <typename T>
__global__ void __launch_bounds__(kFlatThreads)
    BlockKernel(int dim, float factor, const T* x, T* y) {
  extern __shared__ float row[];
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * dim;
  for (int i = threadIdx.x; i < dim; i += kFlatThreads) {
    float v[1];
    Load<T, 1>(x + begin + i, v);
    row[i] = v[0];
  }
  for (int half = 1; half < dim; half *= 2) {
    __syncthreads();
    for (int pair = threadIdx.x; pair < dim / 2; pair += kFlatThreads) {
      const int low = (pair / half) * 2 * half + pair % half;
      const float a = row[low], b = row[low + half];
      row[low] = a + b;
      row[low + half] = a - b;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < dim; i += kFlatThreads) {
    const float v[1] = {row[i] * factor};
    Store<T, 1>(y + begin + i, v);
  }
}

}  // namespace

void HadamardCuda(CudaElement element, int64_t rows, int64_t dim, const void* x, void* y,
                  void* stream) {
  if (rows == 0) return;
  const auto factor = static_cast<float>(1 / sqrt(static_cast<double>(dim)));
  ForElement(element, [&](auto zero) {
    using T = decltype(zero);
    const auto* from = static_cast<const T*>(x);
    auto* to = static_cast<T*>(y);
    const int64_t row_lanes = dim / kLanes<T>;
    if (row_lanes >= 1 && row_lanes <= 32 && Aligned16({x, y})) {
      const int64_t vectors = rows * row_lanes;
      const auto blocks = static_cast<unsigned>(CeilDiv(vectors, kFlatThreads));
      WarpKernel<T><<<blocks, kFlatThreads, 0, AsStream(stream)>>>(
          vectors, static_cast<int>(row_lanes), factor, from, to);
    } else {
      BlockKernel<T>
          <<<static_cast<unsigned>(rows), kFlatThreads, static_cast<size_t>(dim) * sizeof(float),
             AsStream(stream)>>>(static_cast<int>(dim), factor, from, to);
    }
    CheckLaunch("hadamard");
  });
}

}  // namespace baleen
