// Expert counts, balance statistics and the bias update.
//
// Bytes for T tokens, E experts: counts 4 T A; balance statistics 2 * 4 T E (one pass chooses and
// sums a row, one adds rows up), backward 8 T E. Sums over tokens: ranges of rows in order, then
// the ranges in order.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/row.cuh"
#include "kernels/ops/moe/router_balance_cuda.h"
#include "kernels/ops/moe/router_choice.cuh"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kWarps = 4;  // tokens of a block
constexpr int kThreads = 32 * kWarps;
constexpr int64_t kRangeRows = 64;
constexpr int64_t kMaxRanges = 256;

__global__ void __launch_bounds__(kFlatThreads)
    CountKernel(int64_t count, const int32_t* ids, int num_experts, unsigned long long* counts) {
  extern __shared__ int block_counts[];
  for (int e = threadIdx.x; e < num_experts; e += kFlatThreads) block_counts[e] = 0;
  __syncthreads();
  const int64_t stride = int64_t{gridDim.x} * kFlatThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x; i < count;
       i += stride) {
    const int32_t id = ids[i];
    if (id >= 0 && id < num_experts) atomicAdd(&block_counts[id], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < num_experts; e += kFlatThreads) {
    if (block_counts[e] > 0) {
      atomicAdd(&counts[e], static_cast<unsigned long long>(block_counts[e]));
    }
  }
}

// One warp a token: the top_k best scores are counted (integers), the row's sum inverted.
__global__ void __launch_bounds__(kThreads)
    ChooseKernel(BalanceStatsCudaArgs args, int row_floats, int* counts_BE, float* inverse_sum_T) {
  extern __shared__ float shared[];
  __shared__ int scratch[kWarps][32];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (t >= args.tokens) return;
  float* const scores = shared + warp * row_floats;
  const int E = static_cast<int>(args.E);
  float sum = 0;
  for (int i = lane; i < E; i += 32) {
    const float score = args.scores_TE[t * E + i];
    scores[Padded(i)] = score;
    sum += score;
  }
  sum = WarpSum(sum);
  if (lane == 0) inverse_sum_T[t] = 1.0f / sum;
  __syncwarp();
  const int top_k = static_cast<int>(args.top_k);
  const int id = ChooseBest(scores, E, AllCandidates(E), top_k, scratch[warp]);
  if (lane < top_k) atomicAdd(&counts_BE[int64_t{args.sequence_T[t]} * E + id], 1);
}

// partial[range, b, e] (zeroed before) = sum over the range's rows of sequence b of s / sum s. A
// thread has one expert and adds to its own places only.
__global__ void __launch_bounds__(kFlatThreads)
    ProbRangesKernel(BalanceStatsCudaArgs args, int64_t range_rows, const float* inverse_sum_T,
                     float* partial) {
  const int64_t e = static_cast<int64_t>(blockIdx.y) * kFlatThreads + threadIdx.x;
  if (e >= args.E) return;
  const int64_t begin = blockIdx.x * range_rows, end = min(begin + range_rows, args.tokens);
  float* const mine = partial + blockIdx.x * args.num_sequences * args.E + e;
  float sum = 0;
  for (int64_t t = begin; t < end; ++t) {
    sum += args.scores_TE[t * args.E + e] * inverse_sum_T[t];
    const int32_t sequence = args.sequence_T[t];
    if (t + 1 == end || args.sequence_T[t + 1] != sequence) {
      mine[sequence * args.E] += sum;
      sum = 0;
    }
  }
}

__global__ void __launch_bounds__(kFlatThreads)
    JoinKernel(int64_t places, int ranges, const int* counts, const float* partial,
               float* counts_BE, float* prob_sum_BE) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kFlatThreads + threadIdx.x;
  if (i >= places) return;
  float sum = 0;
#pragma unroll 8
  for (int range = 0; range < ranges; ++range) sum += partial[range * places + i];
  prob_sum_BE[i] = sum;
  counts_BE[i] = static_cast<float>(counts[i]);
}

// d/ds_i of sum_j c_j s_j / Z, Z = sum s:  (c_i - sum_j c_j s_j / Z) / Z. One warp a token.
__global__ void __launch_bounds__(kThreads) BackwardKernel(BalanceBackwardCudaArgs args) {
  const int lane = threadIdx.x % 32;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (t >= args.tokens) return;
  const float* const scores = args.scores_TE + t * args.E;
  const float* const c = args.coefficient_BE + args.sequence_T[t] * args.E;
  float sum = 0, dot = 0;
  for (int64_t i = lane; i < args.E; i += 32) {
    sum += scores[i];
    dot += c[i] * scores[i];
  }
  const float inverse_sum = 1.0f / WarpSum(sum), mean = WarpSum(dot) * inverse_sum;
  for (int64_t i = lane; i < args.E; i += 32) {
    args.dscores_TE[t * args.E + i] = (c[i] - mean) * inverse_sum;
  }
}

// One block.
__global__ void __launch_bounds__(kFlatThreads)
    UpdateBiasKernel(int64_t experts, const long long* counts, float speed, float* bias) {
  __shared__ unsigned long long total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  for (int64_t e = threadIdx.x; e < experts; e += kFlatThreads) {
    atomicAdd(&total, static_cast<unsigned long long>(counts[e]));
  }
  __syncthreads();
  for (int64_t e = threadIdx.x; e < experts; e += kFlatThreads) {
    // Compares with the mean without rounding.
    const long long excess = counts[e] * experts - static_cast<long long>(total);
    if (excess != 0) bias[e] += excess > 0 ? -speed : speed;
  }
}

int64_t NumRanges(int64_t tokens) {
  return std::clamp<int64_t>(CeilDiv(tokens, kRangeRows), 1, kMaxRanges);
}

}  // namespace

void CountExpertsCuda(int64_t count, const int32_t* ids, int64_t num_experts, int64_t* counts_E,
                      void* stream) {
  if (count == 0) return;
  const int64_t blocks = std::min<int64_t>(CeilDiv(count, 8 * kFlatThreads), 256);
  const auto shared_bytes = static_cast<size_t>(num_experts) * sizeof(int);
  CountKernel<<<static_cast<unsigned>(blocks), kFlatThreads, shared_bytes, AsStream(stream)>>>(
      count, ids, static_cast<int>(num_experts), reinterpret_cast<unsigned long long*>(counts_E));
  CheckLaunch("count experts");
}

int64_t BalanceWorkspaceFloats(int64_t tokens, int64_t E, int64_t num_sequences) {
  return tokens + (NumRanges(tokens) + 1) * num_sequences * E;
}

void BalanceStatsCuda(const BalanceStatsCudaArgs& args, void* stream) {
  const int64_t places = args.num_sequences * args.E, ranges = NumRanges(args.tokens);
  // Workspace: counts [B, E] as integers, partial sums [ranges, B, E], then a float a token.
  int* const counts = reinterpret_cast<int*>(args.workspace);
  float* const partial = args.workspace + places;
  float* const inverse_sum = partial + ranges * places;
  if (places == 0) return;
  CheckCuda(cudaMemsetAsync(counts, 0, static_cast<size_t>((ranges + 1) * places) * sizeof(float),
                            AsStream(stream)),
            "balance statistics");
  if (args.tokens > 0) {
    const int row_floats = Padded(static_cast<int>(args.E)) + 1;
    const auto shared_bytes = static_cast<size_t>(kWarps * row_floats) * sizeof(float);
    ChooseKernel<<<static_cast<unsigned>(CeilDiv(args.tokens, kWarps)), kThreads, shared_bytes,
                   AsStream(stream)>>>(args, row_floats, counts, inverse_sum);
    CheckLaunch("balance choice");
    const dim3 grid(static_cast<unsigned>(ranges),
                    static_cast<unsigned>(CeilDiv(args.E, kFlatThreads)));
    ProbRangesKernel<<<grid, kFlatThreads, 0, AsStream(stream)>>>(
        args, CeilDiv(args.tokens, ranges), inverse_sum, partial);
    CheckLaunch("balance sums");
  }
  JoinKernel<<<static_cast<unsigned>(CeilDiv(places, kFlatThreads)), kFlatThreads, 0,
               AsStream(stream)>>>(places, static_cast<int>(ranges), counts, partial,
                                   args.counts_BE, args.prob_sum_BE);
  CheckLaunch("balance statistics");
}

void BalanceBackwardCuda(const BalanceBackwardCudaArgs& args, void* stream) {
  if (args.tokens == 0) return;
  BackwardKernel<<<static_cast<unsigned>(CeilDiv(args.tokens, kWarps)), kThreads, 0,
                   AsStream(stream)>>>(args);
  CheckLaunch("balance backward");
}

void UpdateRouterBiasCuda(int64_t num_experts, const int64_t* counts_E, double speed, float* bias_E,
                          void* stream) {
  if (num_experts == 0) return;
  UpdateBiasKernel<<<1, kFlatThreads, 0, AsStream(stream)>>>(
      num_experts, reinterpret_cast<const long long*>(counts_E), static_cast<float>(speed), bias_E);
  CheckLaunch("update router bias");
}

}  // namespace baleen
