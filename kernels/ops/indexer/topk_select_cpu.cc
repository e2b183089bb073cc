// Top-k on the CPU: find the k-th largest score of the window, keep everything above it and, of
// what equals it, the lowest indices. One pass over the window in index order writes the ids
// ascending.
#include "kernels/ops/indexer/topk_select_cpu.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <vector>

#include "kernels/ops/indexer/key_sets_cpu.h"

namespace baleen {
namespace {

// Writes the k best of scores[begin, end), which has more than k keys and no NaN; returns the ties
// left out. Comparisons of floating-point numbers hold -0.0 and +0.0 equal.
template <typename T>
int32_t SelectRow(const T* scores, KeyRange window, int64_t k, std::vector<T>& scratch,
                  int32_t* ids) {
  scratch.assign(scores + window.begin, scores + window.end);
  std::nth_element(scratch.begin(), scratch.begin() + (k - 1), scratch.end(), std::greater<T>());
  const T threshold = scratch[k - 1];
  const int64_t above = std::count_if(scores + window.begin, scores + window.end,
                                      [&](T score) { return score > threshold; });
  int64_t ties_to_take = k - above;
  int32_t ties_left_out = 0;
  for (int64_t s = window.begin; s < window.end; ++s) {
    if (scores[s] < threshold) continue;
    if (scores[s] == threshold && ties_to_take-- <= 0) {
      ++ties_left_out;
      continue;
    }
    *ids++ = static_cast<int32_t>(s);
  }
  return ties_left_out;
}

}  // namespace

template <typename T>
TopkResult TopkSelectCpu(const Context& context, const Tensor& scores_TS, const KeyWindows& windows,
                         int64_t k, ChosenScores chosen) {
  const int64_t num_rows = scores_TS.dim(0), num_keys = scores_TS.dim(1);
  TopkResult result = {context.Empty(DType::kI32, {num_rows, k}),
                       context.Zeros(DType::kI32, {num_rows}), context.Empty(DType::kI32, {1}),
                       Tensor()};
  if (chosen == ChosenScores::kKeep)
    result.scores_TK = context.Zeros(scores_TS.dtype(), {num_rows, k});
  int32_t& nan_row = *result.nan_row_1.data<int32_t>();
  nan_row = -1;
  if (context.dry()) return result;
  const WindowKeys keys("TopkSelect", windows, num_keys);
  std::fill_n(result.ids_TK.data<int32_t>(), num_rows * k, -1);
  std::vector<T> scratch;
  for (int64_t t = 0; t < num_rows; ++t) {
    const T* scores = scores_TS.data<T>() + t * num_keys;
    const KeyRange window = keys.Row(t);
    int32_t* ids = result.ids_TK.data<int32_t>() + t * k;
    if (std::any_of(scores + window.begin, scores + window.end,
                    [](T score) { return std::isnan(score); })) {
      if (nan_row < 0) nan_row = static_cast<int32_t>(t);
    } else if (window.size() <= k) {
      for (int64_t s = window.begin; s < window.end; ++s) *ids++ = static_cast<int32_t>(s);
    } else {
      result.ties_T.data<int32_t>()[t] = SelectRow(scores, window, k, scratch, ids);
    }
    if (chosen == ChosenScores::kKeep) {
      const int32_t* row = result.ids_TK.data<int32_t>() + t * k;
      for (int64_t i = 0; i < k && row[i] >= 0; ++i) {
        result.scores_TK.data<T>()[t * k + i] = scores[row[i]];
      }
    }
  }
  return result;
}

template TopkResult TopkSelectCpu<float>(const Context&, const Tensor&, const KeyWindows&, int64_t,
                                         ChosenScores);
template TopkResult TopkSelectCpu<double>(const Context&, const Tensor&, const KeyWindows&, int64_t,
                                          ChosenScores);

}  // namespace baleen
