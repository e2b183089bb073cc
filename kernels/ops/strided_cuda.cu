// Strided rows: copies by bytes, and the sum over a batch.
//
// Bytes: copy 2 * batch * rows * row_bytes; batch sum (batch + 2) * rows * cols * s. A copy moves
// the widest word that divides every address and stride. Threads run along a row, then along
// whichever of batch and rows lies closer together in `to`, so that neighbours write neighbours.
#include <utility>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/read_once.cuh"
#include "kernels/ops/strided_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kUnroll = 4;

// Two outer dimensions, the inner one of `inner` rows; strides in words.
struct CopyPlan {
  int64_t total = 0;  // words
  uint32_t row_words = 0, inner = 0;
  int64_t from_inner = 0, from_outer = 0, to_inner = 0, to_outer = 0;
};

// i / divisor for 0 <= i < limit: in 32 bits where the limit allows it, which is ten times cheaper.
// The number of rows always fits 32 bits.
__device__ __forceinline__ uint32_t Quotient(int64_t i, uint32_t divisor, int64_t limit) {
  return limit <= 0xFFFFFFFFll ? static_cast<uint32_t>(i) / divisor
                               : static_cast<uint32_t>(i / divisor);
}

template <typename W>
__global__ void __launch_bounds__(kFlatThreads)
    CopyViewKernel(CopyPlan plan, const W* from, W* to) {
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kUnroll * kFlatThreads + threadIdx.x;
  W words[kUnroll];
  int64_t targets[kUnroll];
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kFlatThreads;
    if (i >= plan.total) break;
    const uint32_t row = Quotient(i, plan.row_words, plan.total);
    const auto word = static_cast<uint32_t>(i - int64_t{row} * plan.row_words);
    const uint32_t outer = row / plan.inner, inner = row - outer * plan.inner;
    words[u] = from[outer * plan.from_outer + inner * plan.from_inner + word];
    targets[u] = outer * plan.to_outer + inner * plan.to_inner + word;
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    if (first + u * kFlatThreads < plan.total) to[targets[u]] = words[u];
  }
}

template <typename W>
void LaunchCopy(const CopyViewCudaArgs& args, void* stream) {
  const int64_t size = sizeof(W);
  CopyPlan plan;
  int64_t inner = args.rows, outer = args.batch;
  plan.row_words = static_cast<uint32_t>(args.row_bytes / size);
  plan.from_inner = args.from_row_bytes / size;
  plan.from_outer = args.from_batch_bytes / size;
  plan.to_inner = args.to_row_bytes / size;
  plan.to_outer = args.to_batch_bytes / size;
  if (outer > 1 && plan.to_outer < plan.to_inner) {
    std::swap(inner, outer);
    std::swap(plan.from_inner, plan.from_outer);
    std::swap(plan.to_inner, plan.to_outer);
  }
  plan.inner = static_cast<uint32_t>(inner);
  plan.total = inner * outer * plan.row_words;
  const int64_t blocks = CeilDiv(plan.total, int64_t{kUnroll} * kFlatThreads);
  CopyViewKernel<W><<<static_cast<unsigned>(blocks), kFlatThreads, 0, AsStream(stream)>>>(
      plan, static_cast<const W*>(args.from), static_cast<W*>(args.to));
  CheckLaunch("copy view");
}

constexpr int kTermsAtOnce = 8;  // in flight
constexpr int kSumThreads = 64;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kSumThreads)
    AddBatchSumKernel(AddBatchSumCudaArgs args, uint32_t row_vectors) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kSumThreads + threadIdx.x;
  const int64_t row = Quotient(i, row_vectors, args.rows * row_vectors);
  const int64_t col = (i - row * row_vectors) * kWidth;
  if (i >= args.rows * row_vectors) return;
  T* const to = static_cast<T*>(args.to) + row * args.to_row_stride + col;
  const T* from = static_cast<const T*>(args.from) + row * args.from_row_stride + col;
  float sum[kWidth];
  Load<T, kWidth>(to, sum);
  for (int64_t first = 0; first < args.batch; first += kTermsAtOnce) {
    Word<T, kWidth> words[kTermsAtOnce];
#pragma unroll
    for (int u = 0; u < kTermsAtOnce; ++u) {
      if (first + u < args.batch) {
        words[u] = LoadWordOnce<T, kWidth>(from + (first + u) * args.from_batch_stride);
      }
    }
#pragma unroll
    for (int u = 0; u < kTermsAtOnce; ++u) {
      if (first + u >= args.batch) break;
      float term[kWidth];
      Unpack<T, kWidth>(words[u], term);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) sum[k] += term[k];
    }
  }
  Store<T, kWidth>(to, sum);
}

}  // namespace

void CopyViewCuda(const CopyViewCudaArgs& args, void* stream) {
  if (args.batch == 0 || args.rows == 0 || args.row_bytes == 0) return;
  const auto bits =
      reinterpret_cast<uintptr_t>(args.from) | reinterpret_cast<uintptr_t>(args.to) |
      static_cast<uintptr_t>(args.row_bytes | args.from_batch_bytes | args.from_row_bytes |
                             args.to_batch_bytes | args.to_row_bytes);
  if (bits % 16 == 0) return LaunchCopy<uint4>(args, stream);
  if (bits % 8 == 0) return LaunchCopy<uint2>(args, stream);
  if (bits % 4 == 0) return LaunchCopy<uint32_t>(args, stream);
  if (bits % 2 == 0) return LaunchCopy<uint16_t>(args, stream);
  LaunchCopy<uint8_t>(args, stream);
}

void AddBatchSumCuda(const AddBatchSumCudaArgs& args, void* stream) {
  if (args.rows == 0 || args.cols == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors =
        Aligned16({args.from, args.to}) &&
        (args.cols | args.from_batch_stride | args.from_row_stride | args.to_row_stride) %
                kLanes<T> ==
            0;
    ForWidth<T>(vectors, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const int64_t row_vectors = args.cols / kWidth;
      const int64_t blocks = CeilDiv(args.rows * row_vectors, kSumThreads);
      AddBatchSumKernel<T, kWidth>
          <<<static_cast<unsigned>(blocks), kSumThreads, 0, AsStream(stream)>>>(
              args, static_cast<uint32_t>(row_vectors));
    });
    CheckLaunch("add batch sum");
  });
}

}  // namespace baleen
