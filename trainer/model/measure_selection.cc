#include "trainer/model/measure_selection.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/core/random.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/indexer_scores.h"
#include "kernels/ops/permute.h"

namespace baleen {
namespace {

Tensor PickInts(const Context& context, const Tensor& values_T, const Tensor& rows_R) {
  const Tensor picked = context.Empty(DType::kI32, rows_R.shape());
  for (int64_t r = 0; r < rows_R.num_elements(); ++r) {
    picked.data<int32_t>()[r] = values_T.data<int32_t>()[rows_R.data<int32_t>()[r]];
  }
  return picked;
}

// Rows of a [T, ...] tensor as [R, ...].
Tensor PickRows(const Context& context, const Tensor& x, const Tensor& rows_R) {
  Shape shape = x.shape();
  const int64_t width = x.num_elements() / x.dim(0);
  shape[0] = rows_R.num_elements();
  return GatherRows(context, x.Reshaped({x.dim(0), width}), rows_R).Reshaped(shape);
}

KeyWindows PickWindows(const Context& context, const KeyWindows& windows, const Tensor& rows) {
  return {PickInts(context, windows.begin_T, rows), PickInts(context, windows.end_T, rows)};
}

struct SampledRows {
  std::vector<int32_t> places_in_group;  // of the group's rows G, ascending
  std::vector<int32_t> own_rows;         // of the own rows R: the same order
  int64_t first_own = 0;                 // where the own ones begin in places_in_group
};

SampledRows FindSampledRows(const ModelContext& model, const Batch& batch, int64_t count) {
  const std::vector<int32_t> sampled = SampleRows(batch.num_keys(), count);
  SampledRows found;
  const int64_t own_begin = model.axes.tp->rank() * batch.num_rows();
  for (int64_t place = 0; place < batch.num_group_rows(); ++place) {
    // A row sees the keys up to itself: the end of its window names it.
    const int32_t row = batch.windows_G.end_T.data<int32_t>()[place] - 1;
    if (!std::binary_search(sampled.begin(), sampled.end(), row)) continue;
    const bool own = place >= own_begin && place < own_begin + batch.num_rows();
    if (place < own_begin) ++found.first_own;
    if (own) found.own_rows.push_back(static_cast<int32_t>(place - own_begin));
    found.places_in_group.push_back(static_cast<int32_t>(place));
  }
  return found;
}

}  // namespace

std::vector<int32_t> SampleRows(int64_t num_rows, int64_t count) {
  count = std::min(count, num_rows);
  std::vector<int32_t> rows;
  for (int64_t n = 0; n < count; ++n)
    rows.push_back(static_cast<int32_t>((n + 1) * num_rows / count - 1));
  return rows;
}

SelectionQualityResult MeasureSelection(const ModelContext& model, const Batch& batch,
                                        int64_t count, const Mla& mla, const Mla::Saved& latents,
                                        const Indexer::Saved& index) {
  const Context& context = model.context;
  const SampledRows sampled = FindSampledRows(model, batch, count);
  // The target of the group's sampled rows, its heads spread over the group.
  const Tensor places = IntTensor(context, sampled.places_in_group);
  const KeyWindows group_windows = PickWindows(context, batch.windows_G, places);
  const Mla::DenseRows dense = mla.MakeDenseRows(model, batch, places, group_windows, latents);
  const Tensor p_ST = DenseTargetProbabilities(
      context, {dense.q_SHQ, dense.k_THQ, dense.lse_SH, model.config.softmax_scale()},
      group_windows);
  model.axes.tp->AllReduce("measured target", p_ST);
  ScaleInPlace(context, p_ST, 1.0 / model.axes.tp->size());

  const Tensor own = IntTensor(context, sampled.own_rows);
  const KeyWindows windows = PickWindows(context, batch.windows_R, own);
  const Tensor scores = IndexerScores(context, PickRows(context, index.q_RIJ, own), index.k_TJ,
                                      PickRows(context, index.w_RI, own), windows);
  const TopkResult selected = TopkSelect(context, scores, windows, model.config.index_topk);
  const int64_t first = sampled.first_own;
  return SelectionQuality(context, p_ST.Rows(first, first + own.num_elements()), selected.ids_TK,
                          windows);
}

Tensor SelectWithoutIndexer(const ModelContext& model, const Batch& batch, int64_t layer) {
  const int64_t rows = batch.num_rows(), topk = model.config.index_topk;
  const Tensor ids_TK = model.context.Empty(DType::kI32, {rows, topk});
  const RandomStream random(static_cast<uint64_t>(layer), NameStream("selection control"));
  std::vector<int32_t> keys;
  for (int64_t t = 0; t < rows; ++t) {
    const int32_t begin = batch.windows_R.begin_T.data<int32_t>()[t];
    const int32_t end = batch.windows_R.end_T.data<int32_t>()[t];
    keys.resize(end - begin);
    std::iota(keys.begin(), keys.end(), begin);
    const int64_t count = std::min<int64_t>(topk, end - begin);
    if (model.options.selection == SelectionKind::kRandom) {
      for (int64_t i = 0; i < count; ++i) {  // the first `count` of a Fisher-Yates shuffle
        const auto left = static_cast<uint64_t>(end - begin - i);
        std::swap(keys[i],
                  keys[i + random.Integer(batch.row_R.data<int32_t>()[t] * topk + i) % left]);
      }
    } else {
      std::rotate(keys.begin(), keys.end() - count, keys.end());
    }
    std::sort(keys.begin(), keys.begin() + count);
    int32_t* row = ids_TK.data<int32_t>() + t * topk;
    std::copy_n(keys.begin(), count, row);
    std::fill(row + count, row + topk, -1);
  }
  return ids_TK;
}

}  // namespace baleen
