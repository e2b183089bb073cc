// DeepSeekMoE gate (DeepSeek-V3 report 2.1.2): sigmoid scores, choice by biased score under a group
// limit, weights from unbiased scores.
//
//   s = sigmoid(logits);  c = s + bias;  group score = sum of the two best c of the group
//   keep the topk_group best of n_group groups (others -inf)
//   choose the num_experts_per_tok best c of the rest
//   weight_a = s_a / (sum of chosen s + 1e-20) * routed_scaling_factor
//              (norm_topk_prob; else s_a * factor)
// Ties: the lower index wins, for groups and for experts. Chosen ids are given in ascending order.
// With NaN scores the ids are valid and different, but not defined.
//
// Balance (eq. 17-20 there), per sequence of T tokens:  loss = alpha * sum_i f_i P_i,
//   f_i = E / (A T) * #{t : i in the A best unbiased scores of t}
//   P_i = 1/T sum_t s_{t,i} / sum_j s_{t,j}
//
// Scores, weights, bias, statistics and their gradients are kF32 (kF64 for kF64 logits). Logits are
// kF32 or kF64 on the CPU, kF32 or kBF16 on CUDA; dlogits has the dtype of the scores. On CUDA at
// most 1024 experts, 32 groups, 32 chosen.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

struct RouterParams {
  int64_t n_group = 1;
  int64_t topk_group = 1;
  int64_t num_experts_per_tok = 1;  // A
  double routed_scaling_factor = 1;
  bool norm_topk_prob = true;
};

struct RouterResult {
  Tensor scores_TE;      // sigmoid(logits); saved for the backward
  Tensor expert_ids_TA;  // kI32, ascending in each row (unless given)
  Tensor weights_TA;
};

// logits_TE [T, E]; bias_E [E] (e_score_correction_bias). In a dry context the choice is balanced:
// all experts get equally many of the rows, each row's from topk_group groups.
RouterResult Route(const Context& context, const Tensor& logits_TE, const Tensor& bias_E,
                   const RouterParams& params);
// dlogits from the gradient of the weights and, where the balance loss is on, of the scores
// (dscores_TE may be empty).
Tensor RouteBackward(const Context& context, const Tensor& dweights_TA, const Tensor& dscores_TE,
                     const RouterResult& forward, const RouterParams& params);
// The same with ids given instead of chosen (replaying a route): weights from these experts.
RouterResult RouteWithIds(const Context& context, const Tensor& logits_TE,
                          const Tensor& expert_ids_TA, const RouterParams& params);

// How many tokens chose each expert: kI64 [E], added to `counts_E`. Ids of -1 count for none.
void CountExperts(const Context& context, const Tensor& expert_ids_TA, const Tensor& counts_E);

struct BalanceStats {
  Tensor counts_BE;    // tokens of each sequence whose A best unbiased scores hold the expert
  Tensor prob_sum_BE;  // sum over tokens of s_i / sum_j s_j
};
// sequence_T kI32: which of num_sequences the row belongs to. Counts and sums are of the rank's
// rows only: they are what ranks that share a sequence add up before the loss is formed.
BalanceStats BalanceLocalStats(const Context& context, const Tensor& scores_TE,
                               const Tensor& sequence_T, int64_t num_sequences, int64_t top_k);
// dscores_TE = d/ds of sum_B coefficient_BE[b, i] * (s_{t,i} / sum_j s_{t,j}): the caller folds
// alpha f_i / T and its normalisation into coefficient_BE.
Tensor BalanceBackward(const Context& context, const Tensor& scores_TE, const Tensor& sequence_T,
                       const Tensor& coefficient_BE);

// Auxiliary-loss-free balancing (eq. 16 there), after a step: bias_E[e] -= speed where counts_E[e]
// (kI64) is above the mean of the counts, += speed where it is below.
void UpdateRouterBias(const Context& context, const Tensor& counts_E, double speed,
                      const Tensor& bias_E);

}  // namespace baleen
