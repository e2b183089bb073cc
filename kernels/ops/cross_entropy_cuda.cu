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
#include "kernels/ops/read_once.cuh"

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

constexpr int kStatsThreads = 256, kStatsWarps = kStatsThreads / 32;
constexpr int kStatsUnroll = 8;

// A word that adds nothing: logits of -inf.
template <typename T, int kWidth>
__device__ __forceinline__ Word<T, kWidth> NoWord() {
  float x[kWidth];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) x[k] = -INFINITY;
  return Pack<T, kWidth>(x);
}

template <typename T, int kWidth, int kWords>
__device__ __forceinline__ void Include(const Word<T, kWidth> (&words)[kWords], MaxSum& all) {
  float max = all.max;
#pragma unroll
  for (int u = 0; u < kWords; ++u) {
    float x[kWidth];
    Unpack<T, kWidth>(words[u], x);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) max = fmaxf(max, x[k]);  // passes over NaN
  }
  // So that -inf less the maximum is -inf where all are.
  const float below = max == -INFINITY ? 0.0f : max;
  float sum = all.sum * (all.max == max ? 1.0f : Exp2((all.max - below) * kLog2E));
#pragma unroll
  for (int u = 0; u < kWords; ++u) {
    float x[kWidth];
    Unpack<T, kWidth>(words[u], x);
    float part = 0;
#pragma unroll
    for (int k = 0; k < kWidth; ++k) part += Exp2((x[k] - below) * kLog2E);
    sum += part;
  }
  all = {max, sum};
}

// Joins the pairs of kNeighbours neighbouring lanes; each of them gets the same bits.
template <int kNeighbours>
__device__ __forceinline__ MaxSum JoinLanes(MaxSum all) {
#pragma unroll
  for (int offset = kNeighbours / 2; offset > 0; offset /= 2) {
    const MaxSum other = {__shfl_xor_sync(~0u, all.max, offset),
                          __shfl_xor_sync(~0u, all.sum, offset)};
    // The lower lane's pair first.
    all = threadIdx.x & offset ? Join(other, all) : Join(all, other);
  }
  return all;
}

// One block a row.
template <typename T, int kWidth>
__global__ void __launch_bounds__(kStatsThreads) LocalStatsKernel(CrossEntropyCudaArgs args) {
  __shared__ MaxSum of_warps[kStatsWarps];
  const int64_t row = blockIdx.x;
  const T* const logits = static_cast<const T*>(args.logits) + row * args.W;
  const int64_t vectors = args.W / kWidth;
  // Asked for before the logits, so that at the end the target's logit is one access away.
  const int32_t target = args.targets_T[row];
  MaxSum all;
  for (int64_t first = threadIdx.x; first < vectors; first += kStatsUnroll * kStatsThreads) {
    Word<T, kWidth> words[kStatsUnroll];
#pragma unroll
    for (int u = 0; u < kStatsUnroll; ++u) {
      const int64_t v = first + u * kStatsThreads;
      words[u] = v < vectors ? LoadWordOnce<T, kWidth>(logits + v * kWidth) : NoWord<T, kWidth>();
    }
    Include<T, kWidth>(words, all);
  }
  const int64_t column = target - args.vocab_begin;
  float logit[1] = {0};
  if (threadIdx.x == 0 && target >= 0 && column >= 0 && column < args.W) {
    Load<T, 1>(logits + column, logit);
  }
  all = JoinLanes<32>(all);
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = all;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  all = JoinLanes<kStatsWarps>(of_warps[threadIdx.x % kStatsWarps]);
  if (threadIdx.x != 0) return;
  args.stats.row_max[row] = all.max;
  args.stats.row_sum[row] = all.sum;
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
          <<<static_cast<unsigned>(args.tokens), kStatsThreads, 0, AsStream(stream)>>>(args);
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
