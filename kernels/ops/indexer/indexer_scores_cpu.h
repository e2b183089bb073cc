// The CPU definition behind indexer_scores.h, and the one formula that the indexer's loss shares
// with it.
#pragma once

#include <algorithm>

#include "kernels/ops/indexer/indexer_scores.h"

namespace baleen {

// relu that lets NaN through (it is reported at selection) and gives +0.0 at both zeros.
template <typename T>
T Relu(T a) {
  return a <= 0 ? T{0} : a;
}

// scores[s] = sum_j w[j] * relu(a[j, s]) in ascending j, for one query row; a [I, size].
template <typename T>
void WeightedReluSum(const T* a_IN, const T* w_I, int64_t num_heads, int64_t size, T* scores) {
  std::fill_n(scores, size, T{0});
  for (int64_t j = 0; j < num_heads; ++j) {
    const T w = w_I[j];
    const T* a = a_IN + j * size;
    for (int64_t s = 0; s < size; ++s) scores[s] += w * Relu(a[s]);
  }
}

template <typename T>
Tensor IndexerScoresCpu(const Context& context, const Tensor& q_TIJ, const Tensor& k_SJ,
                        const Tensor& w_TI, const KeyWindows& windows);

template <typename T>
Tensor IndexerScoresFp8Cpu(const Context& context, const Fp8Codes& q_TIJ, const Fp8Codes& k_SJ,
                           const Tensor& w_TI, const KeyWindows& windows);

}  // namespace baleen
