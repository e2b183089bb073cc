// The gate on the CPU, in T.
#include "kernels/ops/moe/router_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace baleen {
namespace {

constexpr double kTinySum = 1e-20;  // keeps the weights finite where all chosen scores underflow

// The `count` best of `values`, ascending; the lower index wins a tie. Where only NaN is left the
// first of the rest is taken: the ids stay valid and the step is skipped for its loss.
template <typename T>
void ChooseBest(const std::vector<T>& values, int64_t count, std::vector<int32_t>& best) {
  best.clear();
  std::vector<bool> taken(values.size(), false);
  for (int64_t n = 0; n < count; ++n) {
    int32_t winner = -1;
    for (int32_t i = 0; i < static_cast<int32_t>(values.size()); ++i) {
      if (!taken[i] && (winner < 0 || values[i] > values[winner])) winner = i;
    }
    taken[winner] = true;
    best.push_back(winner);
  }
  std::sort(best.begin(), best.end());
}

// Sum of the two best of a group (of the one, where a group has one expert).
template <typename T>
T GroupScore(const T* choice, int64_t group_size) {
  T first = choice[0], second = group_size > 1 ? choice[1] : T{0};
  if (group_size > 1 && second > first) std::swap(first, second);
  for (int64_t i = 2; i < group_size; ++i) {
    if (choice[i] > first) {
      second = first;
      first = choice[i];
    } else if (choice[i] > second) {
      second = choice[i];
    }
  }
  return first + second;
}

template <typename T>
double RowSum(const T* row, int64_t count) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += row[i];
  return sum;
}

}  // namespace

template <typename T>
void SigmoidCpu(int64_t count, const T* __restrict logits, T* __restrict scores) {
  for (int64_t i = 0; i < count; ++i) scores[i] = 1 / (1 + std::exp(-logits[i]));
}

template <typename T>
void ChooseExpertsCpu(const RouterParams& params, int64_t tokens, int64_t E, const T* scores,
                      const T* bias, int32_t* ids) {
  const int64_t group_size = E / params.n_group;
  std::vector<T> choice(E), allowed(E), group_scores(params.n_group);
  std::vector<int32_t> groups, experts;
  for (int64_t t = 0; t < tokens; ++t, scores += E, ids += params.num_experts_per_tok) {
    for (int64_t i = 0; i < E; ++i) choice[i] = scores[i] + bias[i];
    for (int64_t g = 0; g < params.n_group; ++g) {
      group_scores[g] = GroupScore(&choice[g * group_size], group_size);
    }
    ChooseBest(group_scores, params.topk_group, groups);
    // Experts of other groups are -inf, not 0: a biased score may be negative.
    std::fill(allowed.begin(), allowed.end(), -std::numeric_limits<T>::infinity());
    for (const int32_t g : groups) {
      std::copy_n(&choice[g * group_size], group_size, &allowed[g * group_size]);
    }
    ChooseBest(allowed, params.num_experts_per_tok, experts);
    std::copy(experts.begin(), experts.end(), ids);
  }
}

template <typename T>
void RouteWeightsCpu(const RouterParams& params, int64_t tokens, int64_t E, const T* scores,
                     const int32_t* ids, T* weights) {
  const int64_t A = params.num_experts_per_tok;
  const T factor = static_cast<T>(params.routed_scaling_factor);
  for (int64_t t = 0; t < tokens; ++t, scores += E, ids += A, weights += A) {
    T sum = 0;
    for (int64_t a = 0; a < A; ++a) sum += scores[ids[a]];
    const T divisor = params.norm_topk_prob ? sum + static_cast<T>(kTinySum) : T{1};
    for (int64_t a = 0; a < A; ++a) weights[a] = scores[ids[a]] / divisor * factor;
  }
}

template <typename T>
void RouteBackwardCpu(const RouterParams& params, int64_t tokens, int64_t E, const T* scores,
                      const int32_t* ids, const T* dweights, const T* dscores, T* dlogits) {
  const int64_t A = params.num_experts_per_tok;
  const T factor = static_cast<T>(params.routed_scaling_factor);
  for (int64_t t = 0; t < tokens; ++t, scores += E, ids += A, dweights += A, dlogits += E) {
    // With w_a = factor s_a / Z, Z = sum s + tiny:  ds_a = factor / Z (dw_a - sum_b dw_b s_b / Z).
    T sum = 0, dot = 0;
    for (int64_t a = 0; a < A; ++a) {
      sum += scores[ids[a]];
      dot += dweights[a] * scores[ids[a]];
    }
    const T divisor = params.norm_topk_prob ? sum + static_cast<T>(kTinySum) : T{1};
    const T common = params.norm_topk_prob ? dot / divisor : T{0};
    if (dscores != nullptr) {
      std::copy_n(dscores + t * E, E, dlogits);
    } else {
      std::fill_n(dlogits, E, T{0});
    }
    for (int64_t a = 0; a < A; ++a) dlogits[ids[a]] += factor / divisor * (dweights[a] - common);
    for (int64_t i = 0; i < E; ++i) dlogits[i] *= scores[i] * (1 - scores[i]);
  }
}

template <typename T>
void BalanceLocalStatsCpu(int64_t tokens, int64_t E, int64_t num_sequences, int64_t top_k,
                          const T* scores, const int32_t* sequence, T* counts, T* prob_sum) {
  std::vector<int32_t> best;
  std::vector<double> sums(num_sequences * E, 0.0);
  for (int64_t t = 0; t < tokens; ++t, scores += E) {
    ChooseBest(std::vector<T>(scores, scores + E), top_k, best);
    T* const count_row = counts + sequence[t] * E;
    double* const prob_row = &sums[sequence[t] * E];
    for (const int32_t i : best) count_row[i] += 1;
    const double inverse_sum = 1 / RowSum(scores, E);
    for (int64_t i = 0; i < E; ++i) prob_row[i] += scores[i] * inverse_sum;
  }
  for (size_t i = 0; i < sums.size(); ++i) prob_sum[i] = static_cast<T>(sums[i]);
}

template <typename T>
void BalanceBackwardCpu(int64_t tokens, int64_t E, const T* scores, const int32_t* sequence,
                        const T* coefficient, T* dscores) {
  for (int64_t t = 0; t < tokens; ++t, scores += E, dscores += E) {
    // d/ds_i of sum_j c_j s_j / Z, Z = sum s:  (c_i - sum_j c_j s_j / Z) / Z.
    const T* const c = coefficient + sequence[t] * E;
    const double inverse_sum = 1 / RowSum(scores, E);
    double mean = 0;
    for (int64_t i = 0; i < E; ++i) mean += static_cast<double>(c[i]) * scores[i];
    mean *= inverse_sum;
    for (int64_t i = 0; i < E; ++i) dscores[i] = static_cast<T>((c[i] - mean) * inverse_sum);
  }
}

template <typename T>
void UpdateRouterBiasCpu(int64_t E, const int64_t* counts, double speed, T* bias) {
  int64_t total = 0;
  for (int64_t e = 0; e < E; ++e) total += counts[e];
  for (int64_t e = 0; e < E; ++e) {
    const int64_t excess = counts[e] * E - total;  // compares with the mean without rounding
    bias[e] += static_cast<T>(excess > 0 ? -speed : excess < 0 ? speed : 0);
  }
}

template void SigmoidCpu(int64_t, const float*, float*);
template void SigmoidCpu(int64_t, const double*, double*);
template void ChooseExpertsCpu(const RouterParams&, int64_t, int64_t, const float*, const float*,
                               int32_t*);
template void ChooseExpertsCpu(const RouterParams&, int64_t, int64_t, const double*, const double*,
                               int32_t*);
template void RouteWeightsCpu(const RouterParams&, int64_t, int64_t, const float*, const int32_t*,
                              float*);
template void RouteWeightsCpu(const RouterParams&, int64_t, int64_t, const double*, const int32_t*,
                              double*);
template void RouteBackwardCpu(const RouterParams&, int64_t, int64_t, const float*, const int32_t*,
                               const float*, const float*, float*);
template void RouteBackwardCpu(const RouterParams&, int64_t, int64_t, const double*, const int32_t*,
                               const double*, const double*, double*);
template void BalanceLocalStatsCpu(int64_t, int64_t, int64_t, int64_t, const float*, const int32_t*,
                                   float*, float*);
template void BalanceLocalStatsCpu(int64_t, int64_t, int64_t, int64_t, const double*,
                                   const int32_t*, double*, double*);
template void BalanceBackwardCpu(int64_t, int64_t, const float*, const int32_t*, const float*,
                                 float*);
template void BalanceBackwardCpu(int64_t, int64_t, const double*, const int32_t*, const double*,
                                 double*);

template void UpdateRouterBiasCpu(int64_t, const int64_t*, double, float*);
template void UpdateRouterBiasCpu(int64_t, const int64_t*, double, double*);

}  // namespace baleen
