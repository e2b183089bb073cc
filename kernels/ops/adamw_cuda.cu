// AdamW over flat ranges: one launch for a buffer of many parameters.
//
// Bytes for n elements: reads param, grad, m, v, writes param, m, v: 28 n (20 n with bf16 moments),
// and 2 n for the bf16 copy. Eight 16-byte loads of a thread are in flight.
#include <cmath>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/adamw_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kUnroll = 2;

// The last segment that begins at or before element i.
__device__ __forceinline__ int SegmentOf(const AdamwCudaArgs& args, int64_t i) {
  int low = 0, high = args.num_segments - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (args.begin_N1[middle] <= i) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

template <int kWidth>
__device__ __forceinline__ void DecayOf(const AdamwCudaArgs& args, int64_t i,
                                        float (&decay)[kWidth]) {
  if (args.num_segments == 0) {
#pragma unroll
    for (int k = 0; k < kWidth; ++k) decay[k] = args.weight_decay;
    return;
  }
  int segment = SegmentOf(args, i);
  int64_t end = args.begin_N1[segment + 1];
#pragma unroll
  for (int k = 0; k < kWidth; ++k) {
    // An empty segment is passed over.
    while (i + k >= end && segment + 1 < args.num_segments) {
      ++segment;
      end = args.begin_N1[segment + 1];
    }
    decay[k] = args.decay_N[segment];
  }
}

template <int kWidth, typename Moment>
__global__ void __launch_bounds__(kFlatThreads)
    AdamwKernel(int64_t begin, int64_t end, AdamwCudaArgs args) {
  const float clip_scale = args.control_2[0];
  if (args.control_2[1] != 0) return;
  const int64_t first =
      begin + (static_cast<int64_t>(blockIdx.x) * kUnroll * kFlatThreads + threadIdx.x) * kWidth;
  Word<float, kWidth> params[kUnroll], grads[kUnroll];
  Word<Moment, kWidth> ms[kUnroll], vs[kUnroll];
  Moment* const m_array = static_cast<Moment*>(args.m);
  Moment* const v_array = static_cast<Moment*>(args.v);
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kFlatThreads * kWidth;
    if (i >= end) break;
    params[u] = LoadWord<float, kWidth>(args.param + i);
    grads[u] = LoadWord<float, kWidth>(args.grad + i);
    ms[u] = LoadWord<Moment, kWidth>(m_array + i);
    vs[u] = LoadWord<Moment, kWidth>(v_array + i);
  }
#pragma unroll
  for (int u = 0; u < kUnroll; ++u) {
    const int64_t i = first + u * kFlatThreads * kWidth;
    if (i >= end) break;
    float param[kWidth], grad[kWidth], m[kWidth], v[kWidth], decay[kWidth];
    Unpack<float, kWidth>(params[u], param);
    Unpack<float, kWidth>(grads[u], grad);
    Unpack<Moment, kWidth>(ms[u], m);
    Unpack<Moment, kWidth>(vs[u], v);
    DecayOf(args, i, decay);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) {
      const float g = grad[k] * clip_scale;
      m[k] = args.beta1 * m[k] + args.rest1 * g;
      v[k] = args.beta2 * v[k] + args.rest2 * (g * g);
      const float update = (m[k] / args.correction1) / (sqrtf(v[k] / args.correction2) + args.eps);
      param[k] -= args.lr * (update + decay[k] * param[k]);
    }
    Store<float, kWidth>(args.param + i, param);
    Store<Moment, kWidth>(m_array + i, m);
    Store<Moment, kWidth>(v_array + i, v);
    if (args.working != nullptr) {
      Store<__nv_bfloat16, kWidth>(static_cast<__nv_bfloat16*>(args.working) + i, param);
    }
  }
}

template <int kWidth, typename Moment>
void Launch(int64_t begin, int64_t end, const AdamwCudaArgs& args, void* stream) {
  if (begin >= end) return;
  const int64_t blocks = CeilDiv(end - begin, int64_t{kWidth} * kUnroll * kFlatThreads);
  AdamwKernel<kWidth, Moment>
      <<<static_cast<unsigned>(blocks), kFlatThreads, 0, AsStream(stream)>>>(begin, end, args);
  CheckLaunch("adamw");
}

__global__ void ClipControlKernel(const double* sum_of_squares, double max_norm, float* control) {
  const bool finite = isfinite(*sum_of_squares);
  double scale = 1;
  // Nothing reads the scale of a skipped step, but it shall be a number.
  if (max_norm > 0) scale = finite ? fmin(1.0, max_norm / (sqrt(*sum_of_squares) + 1e-6)) : 0;
  control[0] = static_cast<float>(scale);
  control[1] = finite ? 0.0f : 1.0f;
}

__global__ void ShareSkipFlagKernel(float* a, float* b) {
  a[1] = b[1] = (a[1] != 0 || b[1] != 0) ? 1.0f : 0.0f;
}

}  // namespace

namespace {

template <typename Moment>
void LaunchAll(const AdamwCudaArgs& args, void* stream) {
  const bool vectors = Aligned16({args.param, args.grad, args.m, args.v, args.working});
  const int64_t whole = vectors ? args.count / 4 * 4 : 0;
  Launch<4, Moment>(0, whole, args, stream);
  Launch<1, Moment>(whole, args.count, args, stream);
}

}  // namespace

void AdamwCuda(const AdamwCudaArgs& args, void* stream) {
  args.bf16_moments ? LaunchAll<__nv_bfloat16>(args, stream) : LaunchAll<float>(args, stream);
}

void ClipControlCuda(const double* sum_of_squares_1, double max_norm, float* control_2,
                     void* stream) {
  ClipControlKernel<<<1, 1, 0, AsStream(stream)>>>(sum_of_squares_1, max_norm, control_2);
  CheckLaunch("clip control");
}

void ShareSkipFlagCuda(float* a_2, float* b_2, void* stream) {
  ShareSkipFlagKernel<<<1, 1, 0, AsStream(stream)>>>(a_2, b_2);
  CheckLaunch("share skip flag");
}

}  // namespace baleen
