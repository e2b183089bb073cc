// Deterministic sums in two passes: blocks write partial sums of fixed ranges, one block adds them
// in order.
//
// Bytes: each element read once (products: both arrays), plus 16 a partial sum. fp64 adds keep up:
// 3 TB/s are 3.4 fp32 elements a cycle and multiprocessor, against 64 fp64 adds.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/read_once.cuh"
#include "kernels/ops/reduce_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 4096;
constexpr int64_t kBlockElements = 16 * 1024;  // at least, where there are that many

__device__ __forceinline__ double WarpSum(double value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(~0u, value, offset);
  return value;
}

// The sum over the block, in thread 0.
template <int kBlockThreads>
__device__ double BlockSum(double value) {
  __shared__ double sums[kBlockThreads / 32];
  value = WarpSum(value);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = value;
  __syncthreads();
  double sum = 0;
  if (threadIdx.x == 0) {
    for (const double s : sums) sum += s;
  }
  return sum;
}

template <typename T>
struct Reader;  // kWidth elements as doubles
template <>
struct Reader<double> {
  static constexpr int kWidth = 1;
  __device__ static void Read(const double* x, double (&v)[1]) { v[0] = *x; }
};
template <>
struct Reader<int32_t> {
  static constexpr int kWidth = 1;
  __device__ static void Read(const int32_t* x, double (&v)[1]) { v[0] = *x; }
};
template <typename T, int W>
struct FloatReader {
  static constexpr int kWidth = W;
  __device__ static void Read(const T* x, double (&v)[W]) {
    float f[W];
    LoadOnce<T, W>(x, f);
#pragma unroll
    for (int k = 0; k < W; ++k) v[k] = f[k];
  }
};

// partial[block] = sum of term over the block's range. The last count % kWidth elements are added
// by the first threads of the last block.
template <typename T, typename R, ReduceTerm kTerm>
__global__ void __launch_bounds__(kThreads)
    PartialSums(const T* x, const T* y, int64_t count, int64_t vectors_per_block, double* partial) {
  constexpr int kWidth = R::kWidth;
  const int64_t vectors = count / kWidth;
  const int64_t begin = blockIdx.x * vectors_per_block;
  const int64_t end = min(begin + vectors_per_block, vectors);
  double sum = 0;
  const auto term = [&](double a, double b) {
    sum += kTerm == ReduceTerm::kValue ? a : kTerm == ReduceTerm::kSquare ? a * a : a * b;
  };
#pragma unroll 4
  for (int64_t i = begin + threadIdx.x; i < end; i += kThreads) {
    double a[kWidth], b[kWidth] = {};
    R::Read(x + i * kWidth, a);
    if constexpr (kTerm == ReduceTerm::kProduct) R::Read(y + i * kWidth, b);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) term(a[k], b[k]);
  }
  const int64_t rest = vectors * kWidth + threadIdx.x;
  if (blockIdx.x == gridDim.x - 1 && rest < count) {
    term(static_cast<double>(x[rest]),
         kTerm == ReduceTerm::kProduct ? static_cast<double>(y[rest]) : 0.0);
  }
  sum = BlockSum<kThreads>(sum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    AddPartialSums(const double* partial, int count, double factor, double* result) {
  double sum = 0;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += partial[i];
  sum = BlockSum<kThreads>(sum);
  if (threadIdx.x == 0) *result += factor * sum;
}

__global__ void AddConstantKernel(double value, double* result) { *result += value; }

template <typename T, typename R>
void Launch(const ReduceCudaArgs& args, int64_t blocks, cudaStream_t stream) {
  const auto* x = static_cast<const T*>(args.x);
  const auto* y = static_cast<const T*>(args.y);
  const int64_t per_block = CeilDiv(args.count / R::kWidth, blocks);
  const auto grid = static_cast<unsigned>(blocks);
  switch (args.term) {
    case ReduceTerm::kValue:
      PartialSums<T, R, ReduceTerm::kValue>
          <<<grid, kThreads, 0, stream>>>(x, y, args.count, per_block, args.workspace);
      return;
    case ReduceTerm::kSquare:
      PartialSums<T, R, ReduceTerm::kSquare>
          <<<grid, kThreads, 0, stream>>>(x, y, args.count, per_block, args.workspace);
      return;
    case ReduceTerm::kProduct:
      PartialSums<T, R, ReduceTerm::kProduct>
          <<<grid, kThreads, 0, stream>>>(x, y, args.count, per_block, args.workspace);
      return;
  }
}

template <typename T>
void LaunchFloats(const ReduceCudaArgs& args, int64_t blocks, cudaStream_t stream) {
  if (Aligned16({args.x, args.y})) {
    Launch<T, FloatReader<T, kLanes<T>>>(args, blocks, stream);
  } else {
    Launch<T, FloatReader<T, 1>>(args, blocks, stream);
  }
}

}  // namespace

int64_t ReduceWorkspaceDoubles(int64_t count) {
  return std::clamp<int64_t>(CeilDiv(count, kBlockElements), 1, kMaxBlocks);
}

void ReduceCuda(const ReduceCudaArgs& args, void* stream) {
  if (args.count == 0) return;
  const int64_t blocks = ReduceWorkspaceDoubles(args.count);
  switch (args.element) {
    case ReduceElement::kF32:
      LaunchFloats<float>(args, blocks, AsStream(stream));
      break;
    case ReduceElement::kBF16:
      LaunchFloats<__nv_bfloat16>(args, blocks, AsStream(stream));
      break;
    case ReduceElement::kF64:
      Launch<double, Reader<double>>(args, blocks, AsStream(stream));
      break;
    case ReduceElement::kI32:
      Launch<int32_t, Reader<int32_t>>(args, blocks, AsStream(stream));
      break;
  }
  CheckLaunch("partial sums");
  AddPartialSums<<<1, kThreads, 0, AsStream(stream)>>>(args.workspace, static_cast<int>(blocks),
                                                       args.factor, args.result);
  CheckLaunch("add partial sums");
}

void AddConstantCuda(double value, double* result, void* stream) {
  AddConstantKernel<<<1, 1, 0, AsStream(stream)>>>(value, result);
  CheckLaunch("add constant");
}

}  // namespace baleen
