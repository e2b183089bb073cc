// RMSNorm: a row stays in registers between the sum and the scaling.
//
// Bytes for rows of D elements of s bytes: forward 2 D s, input gradient 3 D s, weight gradient
// 2 D s (and 4 D for each of its row ranges, twice); the weight comes from L2.
#include "kernels/cuda/row.cuh"
#include "kernels/ops/column_sums.cuh"
#include "kernels/ops/rms_norm_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxRowThreads) RmsNormKernel(RmsNormCudaArgs args) {
  __shared__ float shared[kMaxRowWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool active = row < args.rows;
  const int num_vectors = active ? static_cast<int>(args.D / kWidth) : 0;
  const T* const x = static_cast<const T*>(args.x) + row * args.D;
  CachedRow<T, kWidth> cached;
  cached.Load(x, num_vectors);
  float sum[1] = {0};
  ForEachVector(cached, x, num_vectors, [&](int, const Word<T, kWidth>& word) {
    float v[kWidth];
    Unpack<T, kWidth>(word, v);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) sum[0] += v[k] * v[k];
  });
  RowSum(sum, shared);
  const float rstd = 1.0f / sqrtf(sum[0] / static_cast<float>(args.D) + args.eps);
  if (active && threadIdx.x == 0) args.rstd[row] = rstd;
  const T* const weight = static_cast<const T*>(args.weight);
  T* const y = static_cast<T*>(args.y) + row * args.D;
  ForEachVector(cached, x, num_vectors, [&](int i, const Word<T, kWidth>& word) {
    float v[kWidth], w[kWidth];
    Unpack<T, kWidth>(word, v);
    Load<T, kWidth>(weight + i * kWidth, w);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) v[k] = v[k] * rstd * w[k];
    Store<T, kWidth>(y + int64_t{kWidth} * i, v);
  });
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMaxRowThreads)
    RmsNormBackwardInputKernel(RmsNormBackwardInputCudaArgs args) {
  __shared__ float shared[kMaxRowWarps];
  const int64_t row = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const bool active = row < args.rows;
  const int num_vectors = active ? static_cast<int>(args.D / kWidth) : 0;
  const T* const x = static_cast<const T*>(args.x) + row * args.D;
  const T* const dy = static_cast<const T*>(args.dy) + row * args.D;
  const T* const weight = static_cast<const T*>(args.weight);
  CachedRow<T, kWidth> cached_x, cached_dy;
  cached_x.Load(x, num_vectors);
  cached_dy.Load(dy, num_vectors);
  // g = dy * weight; the row's g . x.
  float dot[1] = {0};
  ForEachVector(cached_x, x, cached_dy, dy, num_vectors,
                [&](int i, const Word<T, kWidth>& x_word, const Word<T, kWidth>& dy_word) {
                  float v[kWidth], g[kWidth], w[kWidth];
                  Unpack<T, kWidth>(x_word, v);
                  Unpack<T, kWidth>(dy_word, g);
                  Load<T, kWidth>(weight + i * kWidth, w);
#pragma unroll
                  for (int k = 0; k < kWidth; ++k) dot[0] += g[k] * w[k] * v[k];
                });
  RowSum(dot, shared);
  const float rstd = active ? args.rstd[row] : 0;
  const float along_x = dot[0] / static_cast<float>(args.D) * rstd * rstd;
  T* const dx = static_cast<T*>(args.dx) + row * args.D;
  ForEachVector(cached_x, x, cached_dy, dy, num_vectors,
                [&](int i, const Word<T, kWidth>& x_word, const Word<T, kWidth>& dy_word) {
                  float v[kWidth], g[kWidth], w[kWidth];
                  Unpack<T, kWidth>(x_word, v);
                  Unpack<T, kWidth>(dy_word, g);
                  Load<T, kWidth>(weight + i * kWidth, w);
#pragma unroll
                  for (int k = 0; k < kWidth; ++k) v[k] = rstd * (g[k] * w[k] - v[k] * along_x);
                  Store<T, kWidth>(dx + int64_t{kWidth} * i, v);
                });
}

template <typename T, int W>
struct WeightTerm {
  static constexpr int kWidth = W, kOutputs = 1;
  int64_t D;
  const T* dy;
  const T* x;
  const float* rstd;

  __device__ __forceinline__ void Add(int64_t row, int64_t col, float (&sums)[1][W]) const {
    float g[W], v[W];
    Load<T, W>(dy + row * D + col, g);
    Load<T, W>(x + row * D + col, v);
    const float scale = rstd[row];
#pragma unroll
    for (int k = 0; k < W; ++k) sums[0][k] += g[k] * v[k] * scale;
  }
};

}  // namespace

void RmsNormCuda(const RmsNormCudaArgs& args, void* stream) {
  if (args.rows == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors = args.D % kLanes<T> == 0 && Aligned16({args.x, args.y, args.weight});
    ForWidth<T>(vectors, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const RowPlan plan = PlanRows(args.rows, args.D / kWidth);
      RmsNormKernel<T, kWidth><<<plan.blocks, plan.block, 0, AsStream(stream)>>>(args);
    });
    CheckLaunch("rms norm");
  });
}

void RmsNormBackwardInputCuda(const RmsNormBackwardInputCudaArgs& args, void* stream) {
  if (args.rows == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    const bool vectors =
        args.D % kLanes<T> == 0 && Aligned16({args.x, args.dy, args.dx, args.weight});
    ForWidth<T>(vectors, [&](auto width) {
      constexpr int kWidth = decltype(width)::value;
      const RowPlan plan = PlanRows(args.rows, args.D / kWidth);
      RmsNormBackwardInputKernel<T, kWidth><<<plan.blocks, plan.block, 0, AsStream(stream)>>>(args);
    });
    CheckLaunch("rms norm backward input");
  });
}

int64_t RmsNormWorkspaceFloats(int64_t rows, int64_t D) { return NumRowRanges(rows, D) * D; }

void RmsNormBackwardWeightCuda(const RmsNormBackwardWeightCudaArgs& args, void* stream) {
  if (args.rows == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    ForWidth<T>(args.D % kLanes<T> == 0 && Aligned16({args.x, args.dy}), [&](auto width) {
      const WeightTerm<T, decltype(width)::value> term{args.D, static_cast<const T*>(args.dy),
                                                       static_cast<const T*>(args.x), args.rstd};
      LaunchColumnSums(args.rows, args.D, term, args.workspace, args.dweight, nullptr, stream);
    });
  });
}

}  // namespace baleen
