// Indexer backward on the selected keys: bound, softmax, pair, exponent, gradient, scale back.
//
// Roofline of a row (2048 keys, 64 heads): products 33.5 MFLOP for the softmax and 100 for the
// gradients = 0.17 us on the whole chip at 800 TF; gathers 2 x 0.52 MB of bf16 keys, 0.13 us at 8
// TB/s; adds into dk 2048 rows of 512 B = 1.05 MB, 0.32 us at the 3.25 TB/s that atomic adds reach
// inside L2. Gather and adds share L2: 0.39 us for the gradient alone, 0.07 us more for the
// softmax pass, which must come first.
//
// Why integers: floating-point adds in the order of arrival change the result from run to run.
// Integer adds do not, move as many bytes and are as fast. Their scale must be known before the
// first add, so:
//   1. Bound     c[t] = max over d of sum_j |w q|; a row adds at most |delta| c[t] to dk[s].
//   2. Softmax   one block a row, two blocks an SM; two warpgroups take alternate tiles of 64
//                gathered keys, two tiles in flight each. Gives loss and delta, and adds
//                |delta| c[t] to mass[s], 64-bit fixed point. No products if scores are given.
//   3. Pair      in the lists of rows 2 b and 2 b + 1, puts the keys that both have first.
//   4. Exponent  largest power of two that keeps mass[s] below 2^30; zeroes the integer sums.
//   5. Gradient  the kernel that counts, below.
//   6. ScaleBack dk += g * sum * 2^-exponent.
//
// Gradient: persistent blocks of two consumer warpgroups (one row each of a pair) and two producer
// warps for each (gathers, 3 stages). For a tile of 64 keys a consumer computes
//   A   = K q^T                  [64 keys, 64 heads], one tile ahead
//   dK  = (1[A > 0] w) q         [64 keys, 128]; mask times weight stays in registers. Each row
//                                times delta 2^exponent in fp32 is rounded to integers, staged in
//                                shared memory, added by one bulk reduction of 512 B a row.
//   dQ += (delta 1[A > 0])^T K   [64 heads, 128]; the mask goes through shared memory, M-major.
// In tiles of shared keys consumer 0 stages its integers, consumer 1 adds its own and issues the
// reduction: neighbouring rows of a trained indexer share most keys, and sharing a fraction o of
// them saves o / 2 of the adds. Weights and dw need no more products: dq_j = w_j dQ_j, dw_j =
// q_j . dQ_j. q serves as K-major B (A) and N-major B (dK) from one copy, K as K-major A (A) and
// N-major B (dQ).
#include <algorithm>

#include "kernels/ops/indexer_backward_cuda.h"
#include "kernels/ops/indexer_backward_gradient.cuh"
#include "kernels/ops/indexer_backward_params.cuh"
#include "kernels/ops/indexer_backward_softmax.cuh"

namespace baleen {
namespace indexer_backward {
namespace {

// Four integers a thread: 32 threads a key.
__global__ void ExponentKernel(const Params params) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const int64_t key = i / 32;
  if (key >= params.args.num_keys) return;
  reinterpret_cast<int4*>(params.sum_SJ)[i] = make_int4(0, 0, 0, 0);
  if (i % 32 == 0) {
    const unsigned long long mass = params.mass_S[key];
    // mass < 2^bits units of 2^(bound exponent - 32).
    const int bits = 64 - __clzll(mass);
    params.exponent_S[key] =
        mass == 0 ? 0 : min(126, max(-126, 30 - bits + 32 - BoundExponent(params)));
  }
}

__global__ void ScaleBackKernel(const Params params) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const int64_t key = i / 32;
  if (key >= params.args.num_keys) return;
  const int4 sum = __ldcs(reinterpret_cast<const int4*>(params.sum_SJ) + i);
  const float scale = PowerOfTwo(-params.exponent_S[key]) * params.args.grad_scale;
  float4* dk = reinterpret_cast<float4*>(params.args.dk_SJ) + i;
  float4 x = *dk;
  x.x += sum.x * scale;
  x.y += sum.y * scale;
  x.z += sum.z * scale;
  x.w += sum.w * scale;
  *dk = x;
}

size_t RoundUp(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace
}  // namespace indexer_backward

using namespace indexer_backward;  // NOLINT: the kernels of this operation, in files of their own

size_t IndexerBackwardWorkspaceBytes(int num_rows, int num_keys, int topk) {
  const size_t rows = num_rows, keys = num_keys;
  return 256 + RoundUp(keys * sizeof(unsigned long long)) + RoundUp(rows * sizeof(float)) +
         2 * RoundUp(rows * topk * sizeof(float)) + RoundUp((rows + 1) / 2 * sizeof(int)) +
         RoundUp(keys * sizeof(int)) + RoundUp(keys * kDim * sizeof(int));
}

IndexerBackwardPlan PlanIndexerBackward(int num_rows, int num_sms) {
  return {std::min(num_sms, (num_rows + 1) / 2), static_cast<int>(sizeof(GradientShared))};
}

cudaError_t LaunchIndexerBackward(const IndexerBackwardArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  if (args.num_rows < 0 || args.num_keys < 1 || (args.num_heads != 64 && args.num_heads != 32) ||
      args.topk < 1 || args.topk > kIndexerBackwardMaxK || args.workspace == nullptr) {
    return cudaErrorInvalidValue;
  }
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const IndexerBackwardPlan plan = PlanIndexerBackward(args.num_rows, num_sms);

  // The workspace: what must start at zero comes first.
  const size_t rows = args.num_rows, keys = args.num_keys;
  uint8_t* next = static_cast<uint8_t*>(args.workspace);
  const auto take = [&](size_t bytes) {
    uint8_t* taken = next;
    next += RoundUp(bytes);
    return taken;
  };
  Params params;
  params.args = args;
  params.num_tiles = (args.topk + kTileKeys - 1) / kTileKeys;
  params.largest_bound = reinterpret_cast<unsigned*>(take(256));
  params.mass_S = reinterpret_cast<unsigned long long*>(take(keys * sizeof(unsigned long long)));
  const size_t zeroed = next - static_cast<uint8_t*>(args.workspace);
  params.bound_T = reinterpret_cast<float*>(take(rows * sizeof(float)));
  params.delta_TK = reinterpret_cast<float*>(take(rows * args.topk * sizeof(float)));
  params.ids_TK = reinterpret_cast<int*>(take(rows * args.topk * sizeof(int)));
  params.joint_tiles = reinterpret_cast<int*>(take((rows + 1) / 2 * sizeof(int)));
  params.exponent_S = reinterpret_cast<int*>(take(keys * sizeof(int)));
  params.sum_SJ = reinterpret_cast<int*>(take(keys * kDim * sizeof(int)));

  error = cudaMemsetAsync(args.workspace, 0, zeroed, stream);
  if (error != cudaSuccess) return error;
  BoundKernel<<<args.num_rows, kBoundThreads, 0, stream>>>(params);
  if (args.scores_TK != nullptr) {
    GivenSoftmaxKernel<<<args.num_rows, kSoftmaxThreads, 0, stream>>>(params);
  } else {
    error = cudaFuncSetAttribute(SoftmaxKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 sizeof(SoftmaxShared));
    if (error != cudaSuccess) return error;
    SoftmaxKernel<<<args.num_rows, kSoftmaxThreads, sizeof(SoftmaxShared), stream>>>(params);
  }
  PairKernel<<<(args.num_rows + 1) / 2, kPairThreads, 0, stream>>>(params);
  const unsigned key_blocks = static_cast<unsigned>((keys * 32 + 255) / 256);
  ExponentKernel<<<key_blocks, 256, 0, stream>>>(params);
  error = cudaFuncSetAttribute(GradientKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               plan.gradient_shared_bytes);
  if (error != cudaSuccess) return error;
  GradientKernel<<<plan.gradient_blocks, kGradientThreads, plan.gradient_shared_bytes, stream>>>(
      params);
  ScaleBackKernel<<<key_blocks, 256, 0, stream>>>(params);
  return cudaGetLastError();
}

}  // namespace baleen
