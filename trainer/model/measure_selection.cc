#include "trainer/model/measure_selection.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/core/random.h"
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

}  // namespace

Tensor SampleRows(const Context& context, int64_t num_rows, int64_t count) {
  count = std::min(count, num_rows);
  const Tensor rows = context.Empty(DType::kI32, {count});
  for (int64_t i = 0; i < count; ++i) {
    rows.data<int32_t>()[i] = static_cast<int32_t>((i + 1) * num_rows / count - 1);
  }
  return rows;
}

SelectionQualityResult MeasureSelection(const ModelContext& model, const Batch& batch,
                                        int64_t count, const Mla& mla, const Mla::Saved& latents,
                                        const Indexer::Saved& index) {
  const Context& context = model.context;
  const Tensor rows = SampleRows(context, batch.num_rows(), count);
  const KeyWindows windows{PickInts(context, batch.windows.begin_T, rows),
                           PickInts(context, batch.windows.end_T, rows)};
  const Tensor scores = IndexerScores(context, PickRows(context, index.q_TIJ, rows), index.k_SJ,
                                      PickRows(context, index.w_TI, rows), windows);
  const TopkResult selected = TopkSelect(context, scores, windows, model.config.index_topk);
  const Mla::DenseRows dense = mla.MakeDenseRows(model, batch, rows, windows, latents);
  const DenseTarget target{dense.q_RHQ, dense.k_SHQ, dense.lse_RH, model.config.softmax_scale()};
  // Rows of the picked tensors: 0 .. R-1.
  const Tensor all = context.Empty(DType::kI32, rows.shape());
  for (int64_t r = 0; r < rows.num_elements(); ++r)
    all.data<int32_t>()[r] = static_cast<int32_t>(r);
  return SelectionQuality(context, all, selected.ids_TK, target, windows);
}

Tensor SelectWithoutIndexer(const ModelContext& model, const Batch& batch, int64_t layer) {
  const int64_t rows = batch.num_rows(), topk = model.config.index_topk;
  const Tensor ids_TK = model.context.Empty(DType::kI32, {rows, topk});
  const RandomStream random(static_cast<uint64_t>(layer), NameStream("selection control"));
  std::vector<int32_t> keys;
  for (int64_t t = 0; t < rows; ++t) {
    const int32_t begin = batch.windows.begin_T.data<int32_t>()[t];
    const int32_t end = batch.windows.end_T.data<int32_t>()[t];
    keys.resize(end - begin);
    std::iota(keys.begin(), keys.end(), begin);
    const int64_t count = std::min<int64_t>(topk, end - begin);
    if (model.options.selection == SelectionKind::kRandom) {
      for (int64_t i = 0; i < count; ++i) {  // the first `count` of a Fisher-Yates shuffle
        const auto left = static_cast<uint64_t>(end - begin - i);
        std::swap(keys[i], keys[i + random.Integer(t * topk + i) % left]);
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
