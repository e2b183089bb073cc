// Cross-entropy on the CPU: exponentials in T, sums over the vocabulary in fp64.
//
// A logit of -inf is a word that cannot come and adds exactly 0, even where all of a rank's logits
// are -inf; a NaN logit makes row_sum, and with it loss and gradient, NaN.
#include "kernels/ops/cross_entropy_cpu.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace baleen {
namespace {

template <typename T>
constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

}  // namespace

template <typename T>
void CrossEntropyLocalStatsCpu(int64_t tokens, int64_t W, int64_t vocab_begin,
                               const T* __restrict logits, const int32_t* targets,
                               const CrossEntropyRows<T>& stats) {
  for (int64_t t = 0; t < tokens; ++t, logits += W) {
    T row_max = kMinusInfinity<T>;
    for (int64_t w = 0; w < W; ++w) row_max = std::max(row_max, logits[w]);
    double row_sum = 0;
    for (int64_t w = 0; w < W; ++w) {
      row_sum += logits[w] == kMinusInfinity<T> ? T{0} : std::exp(logits[w] - row_max);
    }
    const int64_t column = targets[t] - vocab_begin;
    stats.row_max[t] = row_max;
    stats.row_sum[t] = static_cast<T>(row_sum);
    stats.target_logit[t] = targets[t] >= 0 && column >= 0 && column < W ? logits[column] : T{0};
  }
}

template <typename T>
void CombineCrossEntropyStatsCpu(int64_t num_parts, int64_t tokens,
                                 const CrossEntropyRows<const T>& parts,
                                 const CrossEntropyRows<T>& whole) {
  for (int64_t t = 0; t < tokens; ++t) {
    T row_max = kMinusInfinity<T>;
    for (int64_t part = 0; part < num_parts; ++part) {
      row_max = std::max(row_max, parts.row_max[part * tokens + t]);
    }
    double row_sum = 0;
    T target_logit = 0;
    for (int64_t part = 0; part < num_parts; ++part) {
      const int64_t at = part * tokens + t;
      const T part_max = parts.row_max[at];
      const T factor = part_max == kMinusInfinity<T> ? T{0} : std::exp(part_max - row_max);
      row_sum += static_cast<double>(parts.row_sum[at]) * factor;
      target_logit += parts.target_logit[at];
    }
    whole.row_max[t] = row_max;
    whole.row_sum[t] = static_cast<T>(row_sum);
    whole.target_logit[t] = target_logit;
  }
}

template <typename T>
void CrossEntropyLossCpu(int64_t tokens, const CrossEntropyRows<const T>& stats,
                         const int32_t* targets, T* loss) {
  for (int64_t t = 0; t < tokens; ++t) {
    loss[t] = targets[t] < 0
                  ? T{0}
                  : std::log(stats.row_sum[t]) + (stats.row_max[t] - stats.target_logit[t]);
  }
}

template <typename T>
void CrossEntropyBackwardCpu(int64_t tokens, int64_t W, int64_t vocab_begin,
                             const CrossEntropyRows<const T>& stats, const int32_t* targets,
                             T scale, T* __restrict logits) {
  for (int64_t t = 0; t < tokens; ++t, logits += W) {
    if (targets[t] < 0) {
      std::fill_n(logits, W, T{0});
      continue;
    }
    const T row_max = stats.row_max[t], factor = scale / stats.row_sum[t];
    for (int64_t w = 0; w < W; ++w) logits[w] = std::exp(logits[w] - row_max) * factor;
    const int64_t column = targets[t] - vocab_begin;
    if (column >= 0 && column < W) logits[column] -= scale;
  }
}

template void CrossEntropyLocalStatsCpu(int64_t, int64_t, int64_t, const float*, const int32_t*,
                                        const CrossEntropyRows<float>&);
template void CrossEntropyLocalStatsCpu(int64_t, int64_t, int64_t, const double*, const int32_t*,
                                        const CrossEntropyRows<double>&);
template void CombineCrossEntropyStatsCpu(int64_t, int64_t, const CrossEntropyRows<const float>&,
                                          const CrossEntropyRows<float>&);
template void CombineCrossEntropyStatsCpu(int64_t, int64_t, const CrossEntropyRows<const double>&,
                                          const CrossEntropyRows<double>&);
template void CrossEntropyLossCpu(int64_t, const CrossEntropyRows<const float>&, const int32_t*,
                                  float*);
template void CrossEntropyLossCpu(int64_t, const CrossEntropyRows<const double>&, const int32_t*,
                                  double*);
template void CrossEntropyBackwardCpu(int64_t, int64_t, int64_t,
                                      const CrossEntropyRows<const float>&, const int32_t*, float,
                                      float*);
template void CrossEntropyBackwardCpu(int64_t, int64_t, int64_t,
                                      const CrossEntropyRows<const double>&, const int32_t*, double,
                                      double*);

}  // namespace baleen
