// Weighted SwiGLU: some warps a row, so that the weight is read once and its gradient is one sum of
// the row, always in the same order.
//
// Bytes for n elements of s bytes: forward 3 n s, backward 5 n s. bf16 uses the special function
// unit's exponential and division (their error is 2^-20, bf16 rounds at 2^-8), fp32 the exact ones.
#include "kernels/cuda/row.cuh"
#include "kernels/ops/moe/weighted_swiglu_cuda.h"
#include "kernels/ops/sigmoid.cuh"

namespace baleen {
namespace {

using namespace cuda;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxRowThreads)
    ForwardKernel(WeightedSwigluCudaArgs args, T* __restrict__ y) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (row >= args.rows) return;
  const int num_vectors = static_cast<int>(args.F / kWidth);
  const T* const gate = static_cast<const T*>(args.gate) + row * args.F;
  const T* const up = static_cast<const T*>(args.up) + row * args.F;
  CachedRow<T, kWidth> cached_gate, cached_up;
  cached_gate.Load(gate, num_vectors);
  cached_up.Load(up, num_vectors);
  const float weight = args.weight_N[row];
  ForEachVector(cached_gate, gate, cached_up, up, num_vectors,
                [&](int i, const Word<T, kWidth>& gate_word, const Word<T, kWidth>& up_word) {
                  float g[kWidth], u[kWidth];
                  Unpack<T, kWidth>(gate_word, g);
                  Unpack<T, kWidth>(up_word, u);
#pragma unroll
                  for (int k = 0; k < kWidth; ++k) u[k] *= weight * g[k] * Sigmoid<T>(g[k]);
                  Store<T, kWidth>(y + row * args.F + int64_t{kWidth} * i, u);
                });
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxRowThreads)
    BackwardKernel(WeightedSwigluCudaArgs args, WeightedSwigluCudaGradients gradients) {
  __shared__ float shared[kMaxRowWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool active = row < args.rows;
  const int num_vectors = active ? static_cast<int>(args.F / kWidth) : 0;
  const T* const gate = static_cast<const T*>(args.gate) + row * args.F;
  const T* const up = static_cast<const T*>(args.up) + row * args.F;
  const T* const dy = static_cast<const T*>(gradients.dy) + row * args.F;
  T* const dgate = static_cast<T*>(gradients.dgate) + row * args.F;
  T* const dup = static_cast<T*>(gradients.dup) + row * args.F;
  CachedRow<T, kWidth> cached_gate, cached_up, cached_dy;
  cached_gate.Load(gate, num_vectors);
  cached_up.Load(up, num_vectors);
  cached_dy.Load(dy, num_vectors);
  const float weight = active ? args.weight_N[row] : 0;
  float sum[1] = {0};
  const auto take = [&](int i, const Word<T, kWidth>& gate_word, const Word<T, kWidth>& up_word,
                        const Word<T, kWidth>& dy_word) {
    float g[kWidth], u[kWidth], d[kWidth];
    Unpack<T, kWidth>(gate_word, g);
    Unpack<T, kWidth>(up_word, u);
    Unpack<T, kWidth>(dy_word, d);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float sigmoid = Sigmoid<T>(g[k]);
      const float along = d[k] * u[k] * sigmoid;  // dy up sigmoid(g)
      sum[0] += along * g[k];
      u[k] = weight * d[k] * sigmoid * g[k];
      d[k] = weight * along * (1.0f + g[k] * (1.0f - sigmoid));
    }
    Store<T, kWidth>(dgate + int64_t{kWidth} * i, d);
    Store<T, kWidth>(dup + int64_t{kWidth} * i, u);
  };
#pragma unroll
  for (int j = 0; j < kCachedVectors; ++j) {
    const int v = threadIdx.x + j * blockDim.x;
    if (v < num_vectors) take(v, cached_gate.words[j], cached_up.words[j], cached_dy.words[j]);
  }
  for (int v = threadIdx.x + kCachedVectors * blockDim.x; v < num_vectors; v += blockDim.x) {
    const int64_t at = int64_t{kWidth} * v;
    take(v, LoadWord<T, kWidth>(gate + at), LoadWord<T, kWidth>(up + at),
         LoadWord<T, kWidth>(dy + at));
  }
  RowSum(sum, shared);
  if (active && threadIdx.x == 0) gradients.dweight_N[row] = sum[0];
}

}  // namespace

void WeightedSwigluCuda(const WeightedSwigluCudaArgs& args, void* y, void* stream) {
  if (args.rows == 0 || args.F == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    ForWidth<T>(args.F % kLanes<T> == 0 && Aligned16({args.gate, args.up, y}), [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const RowPlan plan = PlanRows(args.rows, args.F / kWidth);
      ForwardKernel<T, kWidth>
          <<<plan.blocks, plan.block, 0, AsStream(stream)>>>(args, static_cast<T*>(y));
    });
    CheckLaunch("weighted swiglu");
  });
}

void WeightedSwigluBackwardCuda(const WeightedSwigluCudaArgs& args,
                                const WeightedSwigluCudaGradients& gradients, void* stream) {
  if (args.rows == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = args.F % kLanes<T> == 0 && Aligned16({args.gate, args.up, gradients.dy,
                                                               gradients.dgate, gradients.dup});
    ForWidth<T>(vectors, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const RowPlan plan = PlanRows(args.rows, args.F / kWidth);
      BackwardKernel<T, kWidth><<<plan.blocks, plan.block, 0, AsStream(stream)>>>(args, gradients);
    });
    CheckLaunch("weighted swiglu backward");
  });
}

}  // namespace baleen
