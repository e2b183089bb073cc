#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/attention/attention_cudnn_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kSide = 32;

__global__ void TransposeFloatsKernel(int64_t rows, int64_t cols, const float* in,
                                      int64_t in_stride, float* out, int64_t out_stride) {
  __shared__ float tile[kSide][kSide + 1];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSide,
                col = static_cast<int64_t>(blockIdx.y) * kSide;
  for (int r = threadIdx.y; r < kSide; r += blockDim.y) {
    if (row + r < rows && col + threadIdx.x < cols) {
      tile[r][threadIdx.x] = in[(row + r) * in_stride + col + threadIdx.x];
    }
  }
  __syncthreads();
  for (int c = threadIdx.y; c < kSide; c += blockDim.y) {
    if (col + c < cols && row + threadIdx.x < rows) {
      out[(col + c) * out_stride + row + threadIdx.x] = tile[threadIdx.x][c];
    }
  }
}

// Bytes an element: 2 read, and those of the sums read and written.
template <typename T>
__global__ void AddBf16RowsKernel(int64_t rows, int64_t width, const __nv_bfloat16* values, T* sums,
                                  int64_t stride) {
  constexpr int kWidth = kLanes<__nv_bfloat16>, kPart = kLanes<T>;
  const int64_t row_vectors = width / kWidth, count = rows * row_vectors;
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    T* const to = sums + i / row_vectors * stride + i % row_vectors * kWidth;
    float added[kWidth], sum[kWidth / kPart][kPart];
    Load<__nv_bfloat16, kWidth>(values + i * kWidth, added);
#pragma unroll
    for (int part = 0; part < kWidth / kPart; ++part) {
      Load<T, kPart>(to + part * kPart, sum[part]);
    }
#pragma unroll
    for (int part = 0; part < kWidth / kPart; ++part) {
#pragma unroll
      for (int e = 0; e < kPart; ++e) sum[part][e] += added[part * kPart + e];
      Store<T, kPart>(to + part * kPart, sum[part]);
    }
  }
}

}  // namespace

void TransposeFloatsCuda(int64_t rows, int64_t cols, const float* in, int64_t in_stride, float* out,
                         int64_t out_stride, void* stream) {
  if (rows == 0 || cols == 0) return;
  const dim3 grid(static_cast<unsigned>(CeilDiv(rows, kSide)),
                  static_cast<unsigned>(CeilDiv(cols, kSide)));
  TransposeFloatsKernel<<<grid, dim3(kSide, 8), 0, AsStream(stream)>>>(rows, cols, in, in_stride,
                                                                       out, out_stride);
  CheckLaunch("transposition of lse");
}

void AddBf16RowsCuda(int64_t rows, int64_t width, const void* values, CudaElement element,
                     void* sums, int64_t stride, void* stream) {
  const int64_t vectors = rows * (width / kLanes<__nv_bfloat16>);
  if (vectors == 0) return;
  const int64_t blocks = CeilDiv(vectors, kFlatThreads), most = int64_t{16} * NumMultiprocessors();
  const unsigned grid = static_cast<unsigned>(blocks < most ? blocks : most);
  ForElement(element, [&](auto zero) {
    using T = decltype(zero);
    AddBf16RowsKernel<T><<<grid, kFlatThreads, 0, AsStream(stream)>>>(
        rows, width, static_cast<const __nv_bfloat16*>(values), static_cast<T*>(sums), stride);
  });
  CheckLaunch("sums of attention's gradients");
}

}  // namespace baleen
