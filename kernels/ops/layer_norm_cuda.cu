// LayerNorm: a row stays in registers between mean, variance and scaling (two passes over
// registers, so that a large mean costs no bits).
//
// Bytes for rows of D elements of s bytes: forward 2 D s, input gradient 3 D s, parameter gradients
// 2 D s (and 8 D for each of their row ranges, twice).
#include "kernels/cuda/row.cuh"
#include "kernels/ops/column_sums.cuh"
#include "kernels/ops/layer_norm_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxRowThreads) LayerNormKernel(LayerNormCudaArgs args) {
  __shared__ float shared[kMaxRowWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool active = row < args.rows;
  const int num_vectors = active ? static_cast<int>(args.D / kWidth) : 0;
  const float inverse_D = 1.0f / static_cast<float>(args.D);
  const T* const x = static_cast<const T*>(args.x) + row * args.D;
  CachedRow<T, kWidth> cached;
  cached.Load(x, num_vectors);
  float sum[1] = {0};
  ForEachVector(cached, x, num_vectors, [&](int, const Word<T, kWidth>& word) {
    float v[kWidth];
    Unpack<T, kWidth>(word, v);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum[0] += v[k];
  });
  RowSum(sum, shared);
  const float mean = sum[0] * inverse_D;
  float squares[1] = {0};
  ForEachVector(cached, x, num_vectors, [&](int, const Word<T, kWidth>& word) {
    float v[kWidth];
    Unpack<T, kWidth>(word, v);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) squares[0] += (v[k] - mean) * (v[k] - mean);
  });
  RowSum(squares, shared);
  const float rstd = 1.0f / sqrtf(squares[0] * inverse_D + args.eps);
  if (active && threadIdx.x == 0) {
    args.mean[row] = mean;
    args.rstd[row] = rstd;
  }
  const T* const weight = static_cast<const T*>(args.weight);
  const T* const bias = static_cast<const T*>(args.bias);
  T* const y = static_cast<T*>(args.y) + row * args.D;
  ForEachVector(cached, x, num_vectors, [&](int i, const Word<T, kWidth>& word) {
    float v[kWidth], w[kWidth], b[kWidth];
    Unpack<T, kWidth>(word, v);
    Load<T, kWidth>(weight + i * kWidth, w);
    Load<T, kWidth>(bias + i * kWidth, b);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) v[k] = (v[k] - mean) * rstd * w[k] + b[k];
    Store<T, kWidth>(y + int64_t{kWidth} * i, v);
  });
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxRowThreads)
    LayerNormBackwardInputKernel(LayerNormBackwardInputCudaArgs args) {
  __shared__ float shared[2 * kMaxRowWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool active = row < args.rows;
  const int num_vectors = active ? static_cast<int>(args.D / kWidth) : 0;
  const float inverse_D = 1.0f / static_cast<float>(args.D);
  const float mean = active ? args.mean[row] : 0, rstd = active ? args.rstd[row] : 0;
  const T* const x = static_cast<const T*>(args.x) + row * args.D;
  const T* const dy = static_cast<const T*>(args.dy) + row * args.D;
  const T* const weight = static_cast<const T*>(args.weight);
  CachedRow<T, kWidth> cached_x, cached_dy;
  cached_x.Load(x, num_vectors);
  cached_dy.Load(dy, num_vectors);
  // g = dy * weight: sums of g and of g * xhat.
  float sums[2] = {0, 0};
  ForEachVector(cached_x, x, cached_dy, dy, num_vectors,
                [&](int i, const Word<T, kWidth>& x_word, const Word<T, kWidth>& dy_word) {
                  float v[kWidth], g[kWidth], w[kWidth];
                  Unpack<T, kWidth>(x_word, v);
                  Unpack<T, kWidth>(dy_word, g);
                  Load<T, kWidth>(weight + i * kWidth, w);
#pragma unroll
                  for (int k = 0; k < kWidth; ++k) {
                    sums[0] += g[k] * w[k];
                    sums[1] += g[k] * w[k] * ((v[k] - mean) * rstd);
                  }
                });
  RowSum(sums, shared);
  const float mean_g = sums[0] * inverse_D, mean_g_xhat = sums[1] * inverse_D;
  T* const dx = static_cast<T*>(args.dx) + row * args.D;
  ForEachVector(cached_x, x, cached_dy, dy, num_vectors,
                [&](int i, const Word<T, kWidth>& x_word, const Word<T, kWidth>& dy_word) {
                  float v[kWidth], g[kWidth], w[kWidth];
                  Unpack<T, kWidth>(x_word, v);
                  Unpack<T, kWidth>(dy_word, g);
                  Load<T, kWidth>(weight + i * kWidth, w);
#pragma unroll
                  for (int k = 0; k < kWidth; ++k) {
                    const float xhat = (v[k] - mean) * rstd;
                    v[k] = rstd * (g[k] * w[k] - mean_g - xhat * mean_g_xhat);
                  }
                  Store<T, kWidth>(dx + int64_t{kWidth} * i, v);
                });
}

template <typename T, int W>
struct ParameterTerm {
  static constexpr int kWidth = W, kOutputs = 2;
  int64_t D;
  const T* dy;
  const T* x;
  const float* mean;
  const float* rstd;

  __device__ __forceinline__ void Add(int64_t row, int64_t col, float (&sums)[2][W]) const {
    float g[W], v[W];
    Load<T, W>(dy + row * D + col, g);
    Load<T, W>(x + row * D + col, v);
    const float center = mean[row], scale = rstd[row];
#pragma unroll
    for (int k = 0; k < W; ++k) {
      sums[0][k] += g[k] * ((v[k] - center) * scale);
      sums[1][k] += g[k];
    }
  }
};

}  // namespace

void LayerNormCuda(const LayerNormCudaArgs& args, void* stream) {
  if (args.rows == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors =
        args.D % kLanes<T> == 0 && Aligned16({args.x, args.y, args.weight, args.bias});
    ForWidth<T>(vectors, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const RowPlan plan = PlanRows(args.rows, args.D / kWidth);
      LayerNormKernel<T, kWidth><<<plan.blocks, plan.block, 0, AsStream(stream)>>>(args);
    });
    CheckLaunch("layer norm");
  });
}

void LayerNormBackwardInputCuda(const LayerNormBackwardInputCudaArgs& args, void* stream) {
  if (args.rows == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors =
        args.D % kLanes<T> == 0 && Aligned16({args.x, args.dy, args.dx, args.weight});
    ForWidth<T>(vectors, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const RowPlan plan = PlanRows(args.rows, args.D / kWidth);
      LayerNormBackwardInputKernel<T, kWidth>
          <<<plan.blocks, plan.block, 0, AsStream(stream)>>>(args);
    });
    CheckLaunch("layer norm backward input");
  });
}

int64_t LayerNormWorkspaceFloats(int64_t rows, int64_t D) { return 2 * NumRowRanges(rows, D) * D; }

void LayerNormBackwardWeightCuda(const LayerNormBackwardWeightCudaArgs& args, void* stream) {
  if (args.rows == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    ForWidth<T>(args.D % kLanes<T> == 0 && Aligned16({args.x, args.dy}), [&](auto width) {
      const ParameterTerm<T, decltype(width)::value> term{args.D, static_cast<const T*>(args.dy),
                                                          static_cast<const T*>(args.x), args.mean,
                                                          args.rstd};
      LaunchColumnSums(args.rows, args.D, term, args.workspace, args.dweight, args.dbias, stream);
    });
  });
}

}  // namespace baleen
