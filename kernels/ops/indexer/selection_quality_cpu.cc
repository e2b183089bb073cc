// How much of the dense target a selection holds, row by row: p of the whole window, then its sum
// over the ids and over as many of its largest elements (equal ones: lower key first).
#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer/indexer_loss_cpu.h"
#include "kernels/ops/linear/matmul_cpu.h"

namespace baleen {

template <typename T>
Tensor DenseTargetProbabilitiesCpu(const Context& context, const DenseTarget& target,
                                   const KeyWindows& windows) {
  const int64_t num_keys = target.k_SHQ.dim(0), num_rows = target.q_THQ.dim(0);
  const DType dtype = target.q_THQ.dtype();
  const Tensor p_TS = context.Zeros(StatisticsOf(dtype), {num_rows, num_keys});
  const Tensor logits = CpuScratch(context, dtype, {num_keys});
  if (context.dry()) {
    ReserveMatmulPanels(context, dtype, num_keys, target.q_THQ.dim(2));
    return p_TS;
  }
  const WindowKeys window_keys("DenseTargetProbabilities", windows, num_keys);
  for (int64_t t = 0; t < num_rows; ++t) {
    const KeyRange window = window_keys.Row(t);
    DenseTargetTile<T>(context, target, window_keys, t, t + 1, window, logits,
                       p_TS.Flat(t * num_keys + window.begin, window.size()));
  }
  return p_TS;
}

template <typename T>
SelectionQualityResult SelectionQualityCpu(const Context& context, const Tensor& p_TS,
                                           const Tensor& ids_TK, const KeyWindows& windows) {
  constexpr const char* kOp = "SelectionQuality";
  const int64_t num_rows = p_TS.dim(0), num_keys = p_TS.dim(1);
  const DType dtype = p_TS.dtype();
  SelectionQualityResult result = {context.Zeros(dtype, {num_rows}),
                                   context.Zeros(dtype, {num_rows}),
                                   context.Zeros(dtype, {num_rows})};
  if (context.dry()) return result;
  const WindowKeys window_keys(kOp, windows, num_keys);
  const ListedKeys listed_keys(kOp, ids_TK, num_keys);
  std::vector<int64_t> order;
  for (int64_t t = 0; t < num_rows; ++t) {
    const KeyRange window = window_keys.Row(t);
    const T* probs = p_TS.data<T>() + t * num_keys + window.begin;
    double mass = 0, best_mass = 0;
    std::vector<bool> chosen(window.size(), false);
    int64_t num_ids = 0, num_common = 0;
    listed_keys.ForEach(t, [&](int64_t, int64_t s) {
      CHECK(s >= window.begin && s < window.end)
          << kOp << ": row " << t << " has chosen key " << s << " outside its window ["
          << window.begin << ", " << window.end << ")";
      chosen[s - window.begin] = true;
      mass += probs[s - window.begin];
      ++num_ids;
    });
    order.resize(window.size());
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(
        order.begin(), order.begin() + num_ids, order.end(),
        [&](int64_t a, int64_t b) { return probs[a] != probs[b] ? probs[a] > probs[b] : a < b; });
    for (int64_t i = 0; i < num_ids; ++i) {
      best_mass += probs[order[i]];
      num_common += chosen[order[i]];
    }
    result.mass_T.data<T>()[t] = static_cast<T>(mass);
    result.best_mass_T.data<T>()[t] = static_cast<T>(best_mass);
    // Where nothing is chosen nothing was missed.
    result.recall_T.data<T>()[t] =
        num_ids == 0 ? T{1} : static_cast<T>(static_cast<double>(num_common) / num_ids);
  }
  return result;
}

template Tensor DenseTargetProbabilitiesCpu<float>(const Context&, const DenseTarget&,
                                                   const KeyWindows&);
template Tensor DenseTargetProbabilitiesCpu<double>(const Context&, const DenseTarget&,
                                                    const KeyWindows&);
template SelectionQualityResult SelectionQualityCpu<float>(const Context&, const Tensor&,
                                                           const Tensor&, const KeyWindows&);
template SelectionQualityResult SelectionQualityCpu<double>(const Context&, const Tensor&,
                                                            const Tensor&, const KeyWindows&);

}  // namespace baleen
