#include "trainer/model/measure_selection.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "kernels/core/random.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/indexer/indexer_scores.h"
#include "kernels/ops/moe/permute.h"

namespace baleen {
namespace {

// Rows of a [T, ...] tensor as [R, ...].
Tensor PickRows(const Context& context, const Tensor& x, const Tensor& rows_R) {
  Shape shape = x.shape();
  const int64_t width = x.num_elements() / x.dim(0);
  shape[0] = rows_R.num_elements();
  return GatherRows(context, x.Reshaped({x.dim(0), width}), rows_R).Reshaped(shape);
}

// The sampled ones among the group's rows, on the host.
struct SampledRows {
  std::vector<int32_t> place_S;  // which of the group's rows G, ascending
  std::vector<int32_t> position_S, key_begin_S, key_end_S;
  std::vector<int32_t> own_row;  // which of the own rows R; they stand one behind the other in S
  int64_t first_own = 0;         // where they begin in S
};

SampledRows FindSampledRows(const Batch& batch, int64_t count) {
  const std::vector<int32_t> sampled = SampleRows(batch.num_keys(), count);
  const Batch::Host& host = batch.host;
  SampledRows found;
  for (int64_t place = 0; place < batch.num_group_rows(); ++place) {
    const int32_t row = host.row_G[place];
    if (!std::binary_search(sampled.begin(), sampled.end(), row)) continue;
    const int64_t own = place - host.own_begin;
    if (own < 0) ++found.first_own;
    if (own >= 0 && own < batch.num_rows()) found.own_row.push_back(static_cast<int32_t>(own));
    found.place_S.push_back(static_cast<int32_t>(place));
    found.position_S.push_back(host.position_G[place]);
    found.key_begin_S.push_back(host.key_begin_G[place]);
    found.key_end_S.push_back(row + 1);
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
  const SampledRows sampled = FindSampledRows(batch, count);
  const KeyWindows windows_S{IntTensor(context, sampled.key_begin_S),
                             IntTensor(context, sampled.key_end_S)};
  // The target of the group's sampled rows, its heads spread over the group.
  const Mla::DenseRows dense =
      mla.MakeDenseRows(model, batch, IntTensor(context, sampled.place_S),
                        IntTensor(context, sampled.position_S), windows_S, latents);
  const Tensor p_ST = DenseTargetProbabilities(
      context, {dense.q_SHQ, dense.k_THQ, dense.lse_SH, model.config.softmax_scale()}, windows_S);
  model.axes.tp->AllReduce("measured target", p_ST);
  ScaleInPlace(context, p_ST, 1.0 / model.axes.tp->size());

  const Tensor own = IntTensor(context, sampled.own_row);
  const int64_t begin = sampled.first_own, end = begin + own.num_elements();
  const KeyWindows windows = windows_S.Rows(begin, end);
  const Tensor scores = IndexerScores(context, PickRows(context, index.q_RIJ, own), index.k_TJ,
                                      PickRows(context, index.w_RI, own), windows);
  const TopkResult selected = TopkSelect(context, scores, windows, model.config.index_topk);
  return SelectionQuality(context, p_ST.Rows(begin, end), selected.ids_TK, windows);
}

Tensor SelectWithoutIndexer(const ModelContext& model, const Batch& batch, int64_t layer) {
  const int64_t rows = batch.num_rows(), topk = model.config.index_topk;
  const RandomStream random(static_cast<uint64_t>(layer), NameStream("selection control"));
  std::vector<int32_t> ids(rows * topk, -1), keys;
  for (int64_t r = 0; r < rows; ++r) {
    const int32_t row = batch.host.row_G[batch.host.own_begin + r];
    const int32_t begin = batch.host.key_begin_G[batch.host.own_begin + r], end = row + 1;
    keys.resize(end - begin);
    std::iota(keys.begin(), keys.end(), begin);
    const int64_t count = std::min<int64_t>(topk, end - begin);
    if (model.options.selection == SelectionKind::kRandom) {
      for (int64_t i = 0; i < count; ++i) {  // the first `count` of a Fisher-Yates shuffle
        const auto left = static_cast<uint64_t>(end - begin - i);
        std::swap(keys[i], keys[i + random.Integer(row * topk + i) % left]);
      }
    } else {
      std::rotate(keys.begin(), keys.end() - count, keys.end());
    }
    std::sort(keys.begin(), keys.begin() + count);
    std::copy_n(keys.begin(), count, ids.begin() + r * topk);
  }
  return IntTensor(model.context, ids).Reshaped({rows, topk});
}

}  // namespace baleen
