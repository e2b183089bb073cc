// Cross-entropy: one pass over the logits for the statistics, one for the gradient.
//
// Bytes for T rows of W logits of s bytes: statistics T W s, gradient 2 T W s. The statistics are
// online: a thread keeps (maximum, sum of exp(x - maximum)) and rescales the sum when a vector of
// logits raises the maximum; the block joins the threads' pairs in a fixed order.
//
// A logit of -inf is a word that cannot come and adds exactly 0, even where all of a rank's logits
// are -inf; a NaN logit makes row_sum, and with it loss and gradient, NaN.
#include <cmath>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/cross_entropy_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kThreads = 512;
constexpr int kUnroll = 4;  // vectors of a thread in flight
constexpr float kLog2E = 1.44269504088896340736f;

// Sum of exp(x - max), and max. -inf as max: nothing but -inf so far.
struct MaxSum {
  float max = -INFINITY;
  float sum = 0;
};

// exp(x - max), exactly 0 for x = -inf, whatever max is.
__device__ __forceinline__ float ExpBelow(float x, float max) {
  return x == -INFINITY ? 0.0f : Exp2((x - max) * kLog2E);
}

__device__ __forceinline__ MaxSum Join(const MaxSum& a, const MaxSum& b) {
  const float max = fmaxf(a.max, b.max);
  return {max, a.sum * ExpBelow(a.max, max) + b.sum * ExpBelow(b.max, max)};
}

template <int kWidth>
__device__ __forceinline__ void Include(const float (&x)[kWidth], MaxSum& all) {
  float max = all.max;
#pragma unroll
  for (int k = 0; k < kWidth; ++k) max = fmaxf(max, x[k]);
  // A maximum of -inf (or NaN values only) leaves the sum alone but for NaN.
  float sum = all.sum * (all.max == max ? 1.0f : ExpBelow(all.max, max));
#pragma unroll
  for (int k = 0; k < kWidth; ++k) sum += ExpBelow(x[k], max);
  all = {max, sum};
}

// One block a row.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) LocalStatsKernel(CrossEntropyCudaArgs args) {
  __shared__ MaxSum shared[kThreads / 32];
  const int64_t row = blockIdx.x;
  const T* const logits = static_cast<const T*>(args.logits) + row * args.W;
  const int64_t vectors = args.W / kWidth;
  MaxSum all;
  for (int64_t first = threadIdx.x; first < vectors; first += kUnroll * kThreads) {
    Word<T, kWidth> words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = first + u * kThreads;
      if (v < vectors) words[u] = LoadWord<T, kWidth>(logits + v * kWidth);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (first + u * kThreads >= vectors) continue;
      float x[kWidth];
      Unpack<T, kWidth>(words[u], x);
      Include(x, all);
    }
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const MaxSum other = {__shfl_xor_sync(~0u, all.max, offset),
                          __shfl_xor_sync(~0u, all.sum, offset)};
    // The lower lane's pair first, so that both lanes get the same bits.
    all = threadIdx.x & offset ? Join(other, all) : Join(all, other);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = all;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kThreads / 32; ++w) all = Join(all, shared[w]);
  const int32_t target = args.targets_T[row];
  const int64_t column = target - args.vocab_begin;
  const bool here = target >= 0 && column >= 0 && column < args.W;
  args.stats.row_max[row] = all.max;
  args.stats.row_sum[row] = all.sum;
  float logit[1] = {0};
  if (here) Load<T, 1>(logits + column, logit);
  args.stats.target_logit[row] = logit[0];
}

// One block a row; scale * (exp(x - max) / sum - [column is the target]).
template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads) BackwardKernel(CrossEntropyCudaArgs args, float scale) {
  const int64_t row = blockIdx.x;
  T* const logits = static_cast<T*>(args.logits) + row * args.W;
  const int64_t vectors = args.W / kWidth;
  const int32_t target = args.targets_T[row];
  const int64_t column = target - args.vocab_begin;
  if (target < 0) {
    const float zeros[kWidth] = {};
    for (int64_t v = threadIdx.x; v < vectors; v += kThreads) {
      Store<T, kWidth>(logits + v * kWidth, zeros);
    }
    return;
  }
  const float max = args.stats.row_max[row], factor = scale / args.stats.row_sum[row];
  for (int64_t first = threadIdx.x; first < vectors; first += kUnroll * kThreads) {
    Word<T, kWidth> words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = first + u * kThreads;
      if (v < vectors) words[u] = LoadWord<T, kWidth>(logits + v * kWidth);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t v = first + u * kThreads;
      if (v >= vectors) continue;
      float x[kWidth];
      Unpack<T, kWidth>(words[u], x);
#pragma unroll
      for (int k = 0; k < kWidth; ++k) {
        x[k] = Exp2((x[k] - max) * kLog2E) * factor;
        if (v * kWidth + k == column) x[k] -= scale;
      }
      Store<T, kWidth>(logits + v * kWidth, x);
    }
  }
}

__global__ void __launch_bounds__(kFlatThreads)
    CombineKernel(int64_t num_parts, int64_t tokens, CrossEntropyCudaRows parts,
                  CrossEntropyCudaRows whole) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (t >= tokens) return;
  float max = -INFINITY;
  for (int64_t part = 0; part < num_parts; ++part) {
    max = fmaxf(max, parts.row_max[part * tokens + t]);
  }
  float sum = 0, target_logit = 0;
  for (int64_t part = 0; part < num_parts; ++part) {
    const int64_t at = part * tokens + t;
    const float part_max = parts.row_max[at];
    sum += parts.row_sum[at] * (part_max == -INFINITY ? 0.0f : expf(part_max - max));
    target_logit += parts.target_logit[at];
  }
  whole.row_max[t] = max;
  whole.row_sum[t] = sum;
  whole.target_logit[t] = target_logit;
}

__global__ void __launch_bounds__(kFlatThreads)
    LossKernel(int64_t tokens, CrossEntropyCudaRows stats, const int32_t* targets, float* loss) {
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (t >= tokens) return;
  loss[t] =
      targets[t] < 0 ? 0.0f : logf(stats.row_sum[t]) + (stats.row_max[t] - stats.target_logit[t]);
}

bool Vectors(const CrossEntropyCudaArgs& args, int lanes) {
  return args.W % lanes == 0 && Aligned16({args.logits});
}

}  // namespace

void CrossEntropyLocalStatsCuda(const CrossEntropyCudaArgs& args, void* stream) {
  if (args.tokens == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    ForWidth<T>(Vectors(args, kLanes<T>), [&](auto width) {
      LocalStatsKernel<T, decltype(width)::value>
          <<<static_cast<unsigned>(args.tokens), kThreads, 0, AsStream(stream)>>>(args);
    });
    CheckLaunch("cross-entropy statistics");
  });
}

void CrossEntropyBackwardCuda(const CrossEntropyCudaArgs& args, float scale, void* stream) {
  if (args.tokens == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    ForWidth<T>(Vectors(args, kLanes<T>), [&](auto width) {
      BackwardKernel<T, decltype(width)::value>
          <<<static_cast<unsigned>(args.tokens), kThreads, 0, AsStream(stream)>>>(args, scale);
    });
    CheckLaunch("cross-entropy backward");
  });
}

void CombineCrossEntropyStatsCuda(int64_t num_parts, int64_t tokens,
                                  const CrossEntropyCudaRows& parts,
                                  const CrossEntropyCudaRows& whole, void* stream) {
  if (tokens == 0) return;
  CombineKernel<<<static_cast<unsigned>(CeilDiv(tokens, kFlatThreads)), kFlatThreads, 0,
                  AsStream(stream)>>>(num_parts, tokens, parts, whole);
  CheckLaunch("combine cross-entropy statistics");
}

void CrossEntropyLossCuda(int64_t tokens, const CrossEntropyCudaRows& stats,
                          const int32_t* targets_T, float* loss_T, void* stream) {
  if (tokens == 0) return;
  LossKernel<<<static_cast<unsigned>(CeilDiv(tokens, kFlatThreads)), kFlatThreads, 0,
               AsStream(stream)>>>(tokens, stats, targets_T, loss_T);
  CheckLaunch("cross-entropy loss");
}

}  // namespace baleen
