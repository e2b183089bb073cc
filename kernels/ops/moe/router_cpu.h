// Internal: the CPU definition behind router.h, for float and double.
#pragma once

#include <cstdint>

#include "kernels/ops/moe/router.h"

namespace baleen {

template <typename T>
void SigmoidCpu(int64_t count, const T* logits, T* scores);

// ids [tokens, A] from scores [tokens, E] and bias [E].
template <typename T>
void ChooseExpertsCpu(const RouterParams& params, int64_t tokens, int64_t E, const T* scores,
                      const T* bias, int32_t* ids);
// weights [tokens, A] of the chosen experts.
template <typename T>
void RouteWeightsCpu(const RouterParams& params, int64_t tokens, int64_t E, const T* scores,
                     const int32_t* ids, T* weights);
// dlogits [tokens, E]; dscores may be null.
template <typename T>
void RouteBackwardCpu(const RouterParams& params, int64_t tokens, int64_t E, const T* scores,
                      const int32_t* ids, const T* dweights, const T* dscores, T* dlogits);

// counts [num_sequences, E] starts at zero, prob_sum [num_sequences, E] is written; sums over
// tokens in fp64.
template <typename T>
void BalanceLocalStatsCpu(int64_t tokens, int64_t E, int64_t num_sequences, int64_t top_k,
                          const T* scores, const int32_t* sequence, T* counts, T* prob_sum);
template <typename T>
void BalanceBackwardCpu(int64_t tokens, int64_t E, const T* scores, const int32_t* sequence,
                        const T* coefficient, T* dscores);

template <typename T>
void UpdateRouterBiasCpu(int64_t E, const int64_t* counts, double speed, T* bias);

}  // namespace baleen
