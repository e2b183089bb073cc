// The gate: one warp a token does sigmoid, group limit, choice and weights in one kernel.
//
// Bytes for T tokens, E experts, A chosen: forward T E (s + 4) + 8 T A, backward T E 8 (12 with
// dscores) + 8 T A.
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/moe/router_choice.cuh"
#include "kernels/ops/moe/router_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kWarps = 4;  // tokens of a block
constexpr int kThreads = 32 * kWarps;
constexpr float kTinySum = 1e-20f;  // keeps the weights finite where all chosen scores underflow

// Shared floats of one token: scores and biased scores, padded.
int RowFloats(int E) { return Padded(E) + 1; }

// Sum of the two best of a group (of the one, where a group has one expert).
__device__ float GroupScore(const float* choice, int begin, int size) {
  float first = choice[Padded(begin)], second = size > 1 ? choice[Padded(begin + 1)] : 0.0f;
  if (size > 1 && second > first) {
    const float higher = second;
    second = first;
    first = higher;
  }
  for (int i = begin + 2; i < begin + size; ++i) {
    const float c = choice[Padded(i)];
    if (c > first) {
      second = first;
      first = c;
    } else if (c > second) {
      second = c;
    }
  }
  return first + second;
}

// The lane's experts (bit j: expert 32 j + lane) in the topk_group best groups. Lane g has group g.
__device__ uint32_t AllowedExperts(const RouterCudaParams& params, const float* choice) {
  const int lane = threadIdx.x % 32, group_size = params.E / params.n_group;
  if (params.topk_group == params.n_group) return AllCandidates(params.E);
  uint32_t key =
      lane < params.n_group ? ChoiceKey(GroupScore(choice, lane * group_size, group_size)) : 0;
  uint32_t groups = 0;
  for (int n = 0; n < params.topk_group; ++n) {
    const uint32_t best = __reduce_max_sync(~0u, key);
    const int winner = __ffs(static_cast<int>(__ballot_sync(~0u, key == best))) - 1;
    groups |= 1u << winner;
    if (lane == winner) key = 0;
  }
  uint32_t allowed = 0;
  for (int j = 0; 32 * j + lane < params.E; ++j) {
    allowed |= (groups >> ((32 * j + lane) / group_size) & 1u) << j;
  }
  return allowed;
}

template <typename T>
__global__ void __launch_bounds__(kThreads) RouteKernel(RouteCudaArgs args, int row_floats) {
  extern __shared__ float shared[];
  __shared__ int scratch[kWarps][32];
  const RouterCudaParams& params = args.params;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (t >= args.tokens) return;
  float* const scores = shared + 2 * warp * row_floats;
  float* const choice = scores + row_floats;
  const T* const logits = static_cast<const T*>(args.logits_TE) + t * params.E;
  for (int i = lane; i < params.E; i += 32) {
    float logit[1];
    Load<T, 1>(logits + i, logit);
    const float score = 1.0f / (1.0f + expf(-logit[0]));
    scores[Padded(i)] = score;
    args.scores_TE[t * params.E + i] = score;
    if (args.bias_E != nullptr) choice[Padded(i)] = score + args.bias_E[i];
  }
  __syncwarp();
  int32_t* const ids = args.expert_ids_TA + t * params.A;
  int id = 0;
  if (args.bias_E != nullptr) {
    id = ChooseBest(choice, params.E, AllowedExperts(params, choice), params.A, scratch[warp]);
    if (lane < params.A) ids[lane] = id;
  } else if (lane < params.A) {
    id = ids[lane];
  }
  const float score = lane < params.A ? scores[Padded(id)] : 0.0f;
  float sum = 0;
  for (int a = 0; a < params.A; ++a) sum += __shfl_sync(~0u, score, a);
  const float divisor = params.norm_topk_prob ? sum + kTinySum : 1.0f;
  if (lane < params.A) args.weights_TA[t * params.A + lane] = score / divisor * params.factor;
}

__global__ void __launch_bounds__(kThreads)
    RouteBackwardKernel(RouteBackwardCudaArgs args, int row_floats) {
  extern __shared__ float shared[];
  const RouterCudaParams& params = args.params;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t t = static_cast<int64_t>(blockIdx.x) * kWarps + warp;
  if (t >= args.tokens) return;
  float* const dscores = shared + warp * row_floats;
  const float* const scores = args.scores_TE + t * params.E;
  for (int i = lane; i < params.E; i += 32) {
    dscores[i] = args.dscores_TE == nullptr ? 0.0f : args.dscores_TE[t * params.E + i];
  }
  __syncwarp();
  // With w_a = factor s_a / Z, Z = sum s + tiny:  ds_a = factor / Z (dw_a - sum_b dw_b s_b / Z).
  int id = 0;
  float score = 0, dweight = 0;
  if (lane < params.A) {
    id = args.expert_ids_TA[t * params.A + lane];
    score = scores[id];
    dweight = args.dweights_TA[t * params.A + lane];
  }
  float sum = 0, dot = 0;
  for (int a = 0; a < params.A; ++a) {
    sum += __shfl_sync(~0u, score, a);
    dot += __shfl_sync(~0u, dweight * score, a);
  }
  const float divisor = params.norm_topk_prob ? sum + kTinySum : 1.0f;
  const float common = params.norm_topk_prob ? dot / divisor : 0.0f;
  if (lane < params.A) dscores[id] += params.factor / divisor * (dweight - common);
  __syncwarp();
  for (int i = lane; i < params.E; i += 32) {
    const float s = scores[i];
    args.dlogits_TE[t * params.E + i] = dscores[i] * (s * (1.0f - s));
  }
}

}  // namespace

void RouteCuda(const RouteCudaArgs& args, void* stream) {
  if (args.tokens == 0) return;
  const int row_floats = RowFloats(args.params.E);
  ForElement(args.logits_element, [&](auto zero) {
    using T = decltype(zero);
    const auto shared_bytes = static_cast<size_t>(2 * kWarps * row_floats) * sizeof(float);
    RouteKernel<T><<<static_cast<unsigned>(CeilDiv(args.tokens, kWarps)), kThreads, shared_bytes,
                     AsStream(stream)>>>(args, row_floats);
    CheckLaunch("route");
  });
}

void RouteBackwardCuda(const RouteBackwardCudaArgs& args, void* stream) {
  if (args.tokens == 0) return;
  const int row_floats = RowFloats(args.params.E);
  const auto shared_bytes = static_cast<size_t>(kWarps * row_floats) * sizeof(float);
  RouteBackwardKernel<<<static_cast<unsigned>(CeilDiv(args.tokens, kWarps)), kThreads, shared_bytes,
                        AsStream(stream)>>>(args, row_floats);
  CheckLaunch("route backward");
}

}  // namespace baleen
