// How much of the dense target a selection holds, row by row: p of the whole window, then its sum
// over the ids and over as many of its largest elements (equal ones: lower key first).
#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/ops/indexer_loss_cpu.h"

namespace baleen {

template <typename T>
SelectionQualityResult SelectionQualityCpu(const Context& context, const Tensor& rows_R,
                                           const Tensor& ids_TK, const DenseTarget& target,
                                           const KeyWindows& windows) {
  constexpr const char* kOp = "SelectionQuality";
  const int64_t num_keys = target.k_SHQ.dim(0), num_rows = rows_R.dim(0);
  const WindowKeys window_keys(kOp, windows, num_keys);
  const ListedKeys listed_keys(kOp, ids_TK, num_keys);
  const DType dtype = DTypeOf<T>::value;
  SelectionQualityResult result = {context.Zeros(dtype, {num_rows}),
                                   context.Zeros(dtype, {num_rows}),
                                   context.Zeros(dtype, {num_rows})};
  const Tensor logits = context.Empty(dtype, {num_keys}), p = context.Empty(dtype, {num_keys});
  std::vector<int64_t> order;
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t t = rows_R.data<int32_t>()[r];
    CHECK(t >= 0 && t < ids_TK.dim(0)) << kOp << ": row " << t << " of " << ids_TK.dim(0);
    const KeyRange window = window_keys.Row(t);
    DenseTargetTile<T>(context, target, window_keys, t, t + 1, window, logits, p);
    const T* probs = p.data<T>();
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
    result.mass_R.data<T>()[r] = static_cast<T>(mass);
    result.best_mass_R.data<T>()[r] = static_cast<T>(best_mass);
    // Where nothing is chosen nothing was missed.
    result.recall_R.data<T>()[r] =
        num_ids == 0 ? T{1} : static_cast<T>(static_cast<double>(num_common) / num_ids);
  }
  return result;
}

template SelectionQualityResult SelectionQualityCpu<float>(const Context&, const Tensor&,
                                                           const Tensor&, const DenseTarget&,
                                                           const KeyWindows&);
template SelectionQualityResult SelectionQualityCpu<double>(const Context&, const Tensor&,
                                                            const Tensor&, const DenseTarget&,
                                                            const KeyWindows&);

}  // namespace baleen
