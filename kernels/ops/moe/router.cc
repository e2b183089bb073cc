#include "kernels/ops/moe/router.h"

#include <algorithm>
#include <vector>

#include "kernels/ops/bounds.h"
#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/moe/router_balance_cuda.h"
#include "kernels/ops/moe/router_cpu.h"
#include "kernels/ops/moe/router_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "router";

void CheckParams(const RouterParams& params, int64_t E) {
  CHECK(params.n_group > 0 && E % params.n_group == 0 && params.topk_group > 0 &&
        params.topk_group <= params.n_group && params.num_experts_per_tok > 0 &&
        params.num_experts_per_tok <= E / params.n_group * params.topk_group)
      << kOp << ": " << E << " experts in n_group " << params.n_group << ", topk_group "
      << params.topk_group << ", num_experts_per_tok " << params.num_experts_per_tok;
}

// What the kernels take.
void CheckCudaLimits(const RouterParams& params, int64_t E) {
  CHECK(E <= kRouterCudaMaxExperts && params.n_group <= kRouterCudaMaxGroups &&
        params.num_experts_per_tok <= kRouterCudaMaxChosen)
      << kOp << ": " << E << " experts, n_group " << params.n_group << ", num_experts_per_tok "
      << params.num_experts_per_tok << "; on CUDA at most " << kRouterCudaMaxExperts << ", "
      << kRouterCudaMaxGroups << " and " << kRouterCudaMaxChosen;
}

RouterCudaParams CudaParams(const RouterParams& params, int64_t E) {
  return {.E = static_cast<int>(E),
          .n_group = static_cast<int>(params.n_group),
          .topk_group = static_cast<int>(params.topk_group),
          .A = static_cast<int>(params.num_experts_per_tok),
          .factor = static_cast<float>(params.routed_scaling_factor),
          .norm_topk_prob = params.norm_topk_prob};
}

// bias null: the ids are given.
RouterResult RouteOnCuda(const Context& context, const Tensor& logits_TE, const float* bias,
                         const Tensor& expert_ids_TA, const RouterParams& params) {
  CheckCudaLimits(params, logits_TE.dim(1));
  RouterResult result{context.Empty(DType::kF32, logits_TE.shape()), expert_ids_TA,
                      context.Empty(DType::kF32, expert_ids_TA.shape())};
  RouteCuda({.params = CudaParams(params, logits_TE.dim(1)),
             .logits_element = ElementOf(kOp, "logits", logits_TE),
             .tokens = logits_TE.dim(0),
             .logits_TE = logits_TE.raw(),
             .bias_E = bias,
             .scores_TE = result.scores_TE.data<float>(),
             .expert_ids_TA = expert_ids_TA.data<int32_t>(),
             .weights_TA = result.weights_TA.data<float>()},
            context.stream());
  return result;
}

Tensor Scores(const Context& context, const Tensor& logits_TE) {
  const Tensor scores_TE = context.Empty(StatisticsOf(logits_TE.dtype()), logits_TE.shape());
  ForFloatOrDouble(context, kOp, logits_TE.dtype(), [&](auto element) {
    using T = decltype(element);
    SigmoidCpu(logits_TE.num_elements(), logits_TE.data<T>(), scores_TE.data<T>());
  });
  return scores_TE;
}

RouterResult WithWeights(const Context& context, const Tensor& scores_TE,
                         const Tensor& expert_ids_TA, const RouterParams& params) {
  RouterResult result{scores_TE, expert_ids_TA,
                      context.Empty(scores_TE.dtype(), expert_ids_TA.shape())};
  ForFloatOrDouble(context, kOp, scores_TE.dtype(), [&](auto element) {
    using T = decltype(element);
    RouteWeightsCpu(params, scores_TE.dim(0), scores_TE.dim(1), scores_TE.data<T>(),
                    expert_ids_TA.data<int32_t>(), result.weights_TA.data<T>());
  });
  return result;
}

// Stands for the choice where there are no scores: row t takes the groups t, t + 1, ..., topk_group
// of them (modulo their number), and in each the experts whose turn it is.
void ChooseInTurn(const RouterParams& params, int64_t E, const Tensor& expert_ids_TA) {
  const int64_t A = expert_ids_TA.dim(1), group_size = E / params.n_group;
  std::vector<int64_t> taken(params.n_group, 0);
  for (int64_t t = 0; t < expert_ids_TA.dim(0); ++t) {
    int32_t* const ids = expert_ids_TA.data<int32_t>() + t * A;
    for (int64_t a = 0; a < A; ++a) {
      const int64_t group = (t + a % params.topk_group) % params.n_group;
      ids[a] = static_cast<int32_t>(group * group_size + taken[group]++ % group_size);
    }
    std::sort(ids, ids + A);
  }
}

}  // namespace

RouterResult Route(const Context& context, const Tensor& logits_TE, const Tensor& bias_E,
                   const RouterParams& params) {
  CheckRank(kOp, "logits", logits_TE, 2);
  const int64_t tokens = logits_TE.dim(0), E = logits_TE.dim(1);
  CheckParams(params, E);
  CheckTensor(context, kOp, "logits", logits_TE, logits_TE.dtype(), logits_TE.shape());
  CheckStatistics(context, kOp, "bias", bias_E, logits_TE.dtype(), {E});
  const Tensor expert_ids_TA = context.Empty(DType::kI32, {tokens, params.num_experts_per_tok});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return RouteOnCuda(context, logits_TE, bias_E.data<float>(), expert_ids_TA, params);
    }
    NoCudaKernel(kOp);
  }
  const Tensor scores_TE = Scores(context, logits_TE);
  CountBytes(context, kOp, 2 * logits_TE.bytes());
  if (context.dry()) ChooseInTurn(params, E, expert_ids_TA);
  ForFloatOrDouble(context, kOp, logits_TE.dtype(), [&](auto element) {
    using T = decltype(element);
    ChooseExpertsCpu(params, tokens, E, scores_TE.data<T>(), bias_E.data<T>(),
                     expert_ids_TA.data<int32_t>());
  });
  return WithWeights(context, scores_TE, expert_ids_TA, params);
}

RouterResult RouteWithIds(const Context& context, const Tensor& logits_TE,
                          const Tensor& expert_ids_TA, const RouterParams& params) {
  CheckRank(kOp, "logits", logits_TE, 2);
  CheckTensor(context, kOp, "expert_ids", expert_ids_TA, DType::kI32,
              {logits_TE.dim(0), params.num_experts_per_tok});
  CheckTensor(context, kOp, "logits", logits_TE, logits_TE.dtype(), logits_TE.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return RouteOnCuda(context, logits_TE, nullptr, expert_ids_TA, params);
    NoCudaKernel(kOp);
  }
  CheckIndices(context, kOp, "expert_ids", expert_ids_TA, 0, logits_TE.dim(1));
  return WithWeights(context, Scores(context, logits_TE), expert_ids_TA, params);
}

Tensor RouteBackward(const Context& context, const Tensor& dweights_TA, const Tensor& dscores_TE,
                     const RouterResult& forward, const RouterParams& params) {
  const Tensor& scores_TE = forward.scores_TE;
  CheckRank(kOp, "scores", scores_TE, 2);
  const int64_t tokens = scores_TE.dim(0), E = scores_TE.dim(1);
  const Shape chosen = {tokens, params.num_experts_per_tok};
  CheckTensor(context, kOp, "expert_ids", forward.expert_ids_TA, DType::kI32, chosen);
  CheckTensor(context, kOp, "dweights", dweights_TA, scores_TE.dtype(), chosen);
  if (!dscores_TE.empty()) {
    CheckTensor(context, kOp, "dscores", dscores_TE, scores_TE.dtype(), scores_TE.shape());
  }
  CheckTensor(context, kOp, "scores", scores_TE, scores_TE.dtype(), scores_TE.shape());
  const Tensor dlogits_TE = context.Empty(scores_TE.dtype(), scores_TE.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      CheckCudaLimits(params, E);
      RouteBackwardCuda({.params = CudaParams(params, E),
                         .tokens = tokens,
                         .scores_TE = scores_TE.data<float>(),
                         .expert_ids_TA = forward.expert_ids_TA.data<int32_t>(),
                         .dweights_TA = dweights_TA.data<float>(),
                         .dscores_TE = dscores_TE.empty() ? nullptr : dscores_TE.data<float>(),
                         .dlogits_TE = dlogits_TE.data<float>()},
                        context.stream());
      return dlogits_TE;
    }
    NoCudaKernel(kOp);
  }
  ForFloatOrDouble(context, kOp, scores_TE.dtype(), [&](auto element) {
    using T = decltype(element);
    RouteBackwardCpu(params, tokens, E, scores_TE.data<T>(), forward.expert_ids_TA.data<int32_t>(),
                     dweights_TA.data<T>(), dscores_TE.empty() ? nullptr : dscores_TE.data<T>(),
                     dlogits_TE.data<T>());
  });
  return dlogits_TE;
}

void CountExperts(const Context& context, const Tensor& expert_ids_TA, const Tensor& counts_E) {
  CheckRank(kOp, "counts", counts_E, 1);
  CheckTensor(context, kOp, "counts", counts_E, DType::kI64, counts_E.shape());
  CheckTensor(context, kOp, "expert_ids", expert_ids_TA, DType::kI32, expert_ids_TA.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      CHECK_LE(counts_E.dim(0), kCountExpertsCudaMax) << kOp << ": experts to count";
      return CountExpertsCuda(expert_ids_TA.num_elements(), expert_ids_TA.data<int32_t>(),
                              counts_E.dim(0), counts_E.data<int64_t>(), context.stream());
    }
    NoCudaKernel(kOp);
  }
  CheckIndices(context, kOp, "expert_ids", expert_ids_TA, -1, counts_E.dim(0));
  const int32_t* const ids = expert_ids_TA.data<int32_t>();
  int64_t* const counts = counts_E.data<int64_t>();
  for (int64_t i = 0; i < expert_ids_TA.num_elements(); ++i) {
    if (ids[i] >= 0) ++counts[ids[i]];
  }
}

namespace {

BalanceStats BalanceOnCuda(const Context& context, const Tensor& scores_TE,
                           const Tensor& sequence_T, int64_t num_sequences, int64_t top_k) {
  const int64_t tokens = scores_TE.dim(0), E = scores_TE.dim(1);
  CHECK(E <= kRouterCudaMaxExperts && top_k <= kRouterCudaMaxChosen)
      << kOp << ": the best " << top_k << " of " << E << "; on CUDA at most "
      << kRouterCudaMaxChosen << " of " << kRouterCudaMaxExperts;
  const BalanceStats stats{context.Empty(DType::kF32, {num_sequences, E}),
                           context.Empty(DType::kF32, {num_sequences, E})};
  const Tensor workspace = CudaScratch(context, BalanceWorkspaceFloats(tokens, E, num_sequences));
  BalanceStatsCuda({.tokens = tokens,
                    .E = E,
                    .num_sequences = num_sequences,
                    .top_k = top_k,
                    .scores_TE = scores_TE.data<float>(),
                    .sequence_T = sequence_T.data<int32_t>(),
                    .workspace = workspace.data<float>(),
                    .counts_BE = stats.counts_BE.data<float>(),
                    .prob_sum_BE = stats.prob_sum_BE.data<float>()},
                   context.stream());
  return stats;
}

}  // namespace

BalanceStats BalanceLocalStats(const Context& context, const Tensor& scores_TE,
                               const Tensor& sequence_T, int64_t num_sequences, int64_t top_k) {
  CheckRank(kOp, "scores", scores_TE, 2);
  const int64_t tokens = scores_TE.dim(0), E = scores_TE.dim(1);
  CHECK(top_k > 0 && top_k <= E) << kOp << ": top_k " << top_k << " of " << E << " experts";
  CheckTensor(context, kOp, "sequence", sequence_T, DType::kI32, {tokens});
  CheckTensor(context, kOp, "scores", scores_TE, scores_TE.dtype(), scores_TE.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return BalanceOnCuda(context, scores_TE, sequence_T, num_sequences, top_k);
    }
    NoCudaKernel(kOp);
  }
  CheckIndices(context, kOp, "sequence", sequence_T, 0, num_sequences);
  const DType statistics = StatisticsOf(scores_TE.dtype());
  const BalanceStats stats{context.Zeros(statistics, {num_sequences, E}),
                           context.Empty(statistics, {num_sequences, E})};
  ForFloatOrDouble(context, kOp, scores_TE.dtype(), [&](auto element) {
    using T = decltype(element);
    BalanceLocalStatsCpu(tokens, E, num_sequences, top_k, scores_TE.data<T>(),
                         sequence_T.data<int32_t>(), stats.counts_BE.data<T>(),
                         stats.prob_sum_BE.data<T>());
  });
  return stats;
}

Tensor BalanceBackward(const Context& context, const Tensor& scores_TE, const Tensor& sequence_T,
                       const Tensor& coefficient_BE) {
  CheckRank(kOp, "scores", scores_TE, 2);
  CheckRank(kOp, "coefficient", coefficient_BE, 2);
  const int64_t tokens = scores_TE.dim(0), E = scores_TE.dim(1);
  CheckTensor(context, kOp, "sequence", sequence_T, DType::kI32, {tokens});
  CheckTensor(context, kOp, "coefficient", coefficient_BE, scores_TE.dtype(),
              {coefficient_BE.dim(0), E});
  const Tensor dscores_TE = context.Empty(scores_TE.dtype(), scores_TE.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      BalanceBackwardCuda({.tokens = tokens,
                           .E = E,
                           .scores_TE = scores_TE.data<float>(),
                           .sequence_T = sequence_T.data<int32_t>(),
                           .coefficient_BE = coefficient_BE.data<float>(),
                           .dscores_TE = dscores_TE.data<float>()},
                          context.stream());
      return dscores_TE;
    }
    NoCudaKernel(kOp);
  }
  CheckIndices(context, kOp, "sequence", sequence_T, 0, coefficient_BE.dim(0));
  ForFloatOrDouble(context, kOp, scores_TE.dtype(), [&](auto element) {
    using T = decltype(element);
    BalanceBackwardCpu(tokens, E, scores_TE.data<T>(), sequence_T.data<int32_t>(),
                       coefficient_BE.data<T>(), dscores_TE.data<T>());
  });
  return dscores_TE;
}

void UpdateRouterBias(const Context& context, const Tensor& counts_E, double speed,
                      const Tensor& bias_E) {
  CheckRank(kOp, "counts", counts_E, 1);
  CheckTensor(context, kOp, "counts", counts_E, DType::kI64, counts_E.shape());
  CheckTensor(context, kOp, "bias", bias_E, bias_E.dtype(), counts_E.shape());
  const int64_t E = counts_E.dim(0);
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return UpdateRouterBiasCuda(E, counts_E.data<int64_t>(), speed, bias_E.data<float>(),
                                  context.stream());
    }
    NoCudaKernel(kOp);
  }
  ForFloatOrDouble(context, kOp, bias_E.dtype(), [&](auto element) {
    using T = decltype(element);
    UpdateRouterBiasCpu(E, counts_E.data<int64_t>(), speed, bias_E.data<T>());
  });
}

}  // namespace baleen
