// Indexer backward on the selected keys: bound, scores, group, exponent, gradient, scale back.
//
// Roofline of a row (2048 keys, 64 heads): products 33.5 MFLOP for the scores and 100 for the
// gradients = 0.17 us on the whole chip at 800 TF; gathers of bf16 keys, 0.52 MB each, 0.07 us at 8
// TB/s; adds into dk 2048 rows of 512 B = 1.05 MB, 0.32 us at the 3.25 TB/s that atomic adds reach
// inside L2. The adds are the largest term, so four neighbouring rows go together: their lists
// share most keys (rows that share two thirds: 3034 different keys of 8192), and a key is gathered
// and added to once for all of them: 0.12 us of adds.
//
// Why integers: floating-point adds in the order of arrival change the result from run to run.
// Integer adds do not, move as many bytes and are as fast. Their scale must be known before the
// first add, so:
//   1. Bound     c[t] = max over d of sum_j |w q|; a row adds at most |delta| c[t] to dk[s].
//   2. Scores    one block a row, two blocks an SM; two warpgroups take alternate tiles of 64
//                gathered keys, two tiles in flight each. Left out if the caller has the scores.
//   3. Group     one block for four rows: softmax, loss and delta; the union of the lists as slots,
//                sorted by the set of rows that have the key; mass[s] = sum of |delta| c[t], 64-bit
//                fixed point, one atomic add a slot.
//   4. Exponent  largest power of two that keeps mass[s] below 2^30; zeroes the integer sums.
//   5. Gradient  the kernel that counts, below.
//   6. ScaleBack dk += g * sum * 2^-exponent.
//
// Gradient: persistent blocks of two consumer warpgroups and four producer warps (gathers, 3
// stages), a group at a time. For a tile of 64 slots consumer c computes of its two rows
//   A     = K q^T                   [64 keys, 2 x 64 heads], issued a tile ahead
//   marks = delta w 1[A > 0]        [64 keys, 64 heads] of each row, bf16, to shared memory
//   dQ   += marks^T K               [64 heads, 128] of each row
// and of all four rows half of the columns of
//   dK    = sum over rows of marks q   [64 keys, 64]
// times 2^exponent, rounded to integers, staged in shared memory, added by a bulk reduction of 256
// B a key. Rows that have none of a tile's slots are left out: the slots are sorted by set, so most
// tiles of lists that share little are of one row. Weights and dw need no more products: marks hold
// delta w, so dq_j = dQ_j and dw_j is q_j . dQ_j over w_j; a weight of 0 counts as a tiny one. One
// copy of q serves as K-major B (A) and N-major B (dK), K as K-major A (A) and N-major B (dQ),
// marks as K-major A (dK) and M-major A (dQ).
#include <algorithm>

#include "kernels/ops/indexer/indexer_backward_cuda.h"
#include "kernels/ops/indexer/indexer_backward_gradient.cuh"
#include "kernels/ops/indexer/indexer_backward_group.cuh"
#include "kernels/ops/indexer/indexer_backward_params.cuh"
#include "kernels/ops/indexer/indexer_backward_scores.cuh"

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

// Of lists of K keys: the slots of a group.
size_t NumSlots(size_t topk) { return (kGroupRows * topk + kTileKeys - 1) / kTileKeys * kTileKeys; }
size_t NumGroups(size_t rows) { return (rows + kGroupRows - 1) / kGroupRows; }

}  // namespace
}  // namespace indexer_backward

using namespace indexer_backward;  // NOLINT: the kernels of this operation, in files of their own

size_t IndexerBackwardWorkspaceBytes(int num_rows, int num_keys, int topk) {
  const size_t rows = num_rows, keys = num_keys, groups = NumGroups(rows);
  return 256 + RoundUp(keys * sizeof(unsigned long long)) + RoundUp(rows * sizeof(float)) +
         RoundUp(groups * kGroupRows * topk * sizeof(float)) + RoundUp(groups * sizeof(Group)) +
         RoundUp(groups * NumSlots(topk) * sizeof(int)) + RoundUp(keys * sizeof(int)) +
         RoundUp(keys * kDim * sizeof(int));
}

IndexerBackwardPlan PlanIndexerBackward(int num_rows, int num_sms) {
  return {std::min(num_sms, static_cast<int>(NumGroups(num_rows))),
          static_cast<int>(sizeof(GradientShared))};
}

cudaError_t LaunchIndexerBackward(const IndexerBackwardArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  if (args.num_rows < 0 || args.num_keys < 1 || (args.num_heads != 64 && args.num_heads != 32) ||
      args.topk < 1 || args.topk > kIndexerBackwardMaxK || args.workspace == nullptr ||
      args.num_keys > kKeyMask) {
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
  params.num_groups = static_cast<int>(NumGroups(rows));
  params.num_slots = static_cast<int>(NumSlots(args.topk));
  params.largest_bound = reinterpret_cast<unsigned*>(take(256));
  params.mass_S = reinterpret_cast<unsigned long long*>(take(keys * sizeof(unsigned long long)));
  const size_t zeroed = next - static_cast<uint8_t*>(args.workspace);
  params.bound_T = reinterpret_cast<float*>(take(rows * sizeof(float)));
  const size_t groups = params.num_groups;
  params.deltas = reinterpret_cast<float*>(take(groups * kGroupRows * args.topk * sizeof(float)));
  params.scores_TK = params.deltas;  // read before the group's deltas are written
  params.groups = reinterpret_cast<Group*>(take(groups * sizeof(Group)));
  params.slots = reinterpret_cast<int*>(take(groups * params.num_slots * sizeof(int)));
  params.exponent_S = reinterpret_cast<int*>(take(keys * sizeof(int)));
  params.sum_SJ = reinterpret_cast<int*>(take(keys * kDim * sizeof(int)));

  error = cudaMemsetAsync(args.workspace, 0, zeroed, stream);
  if (error != cudaSuccess) return error;
  BoundKernel<<<args.num_rows, kBoundThreads, 0, stream>>>(params);
  if (args.scores_TK == nullptr) {
    error = cudaFuncSetAttribute(ScoreKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 sizeof(ScoreShared));
    if (error != cudaSuccess) return error;
    ScoreKernel<<<args.num_rows, kScoreThreads, sizeof(ScoreShared), stream>>>(params);
  }
  error = cudaFuncSetAttribute(GroupKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                               sizeof(GroupShared));
  if (error != cudaSuccess) return error;
  GroupKernel<<<params.num_groups, kGroupThreads, sizeof(GroupShared), stream>>>(params);
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
