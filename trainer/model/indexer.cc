#include "trainer/model/indexer.h"

#include <algorithm>

#include "kernels/ops/elementwise.h"
#include "kernels/ops/hadamard.h"
#include "kernels/ops/indexer/fp8_simulate.h"
#include "kernels/ops/indexer/indexer_scores.h"
#include "kernels/ops/indexer/selection_hash.h"
#include "kernels/ops/layer_norm.h"
#include "kernels/ops/linear/matmul.h"
#include "trainer/model/linear.h"
#include "trainer/model/row_exchange.h"

namespace baleen {
namespace {

constexpr double kLayerNormEps =
    1e-6;  // the checkpoint's, not the frameworks' default 1e-5 (spec gotcha 3)
constexpr int64_t kFp8Group = 128;  // one scale per token and head

}  // namespace

Indexer::Indexer(const ModelConfig& config, const std::string& prefix, ParameterStore& store)
    : label_(prefix + ".self_attn.indexer"),
      heads_(config.index_n_heads),
      width_(config.index_head_dim),
      rope_(config.qk_rope_head_dim) {
  const auto declare = [&](const char* name, Shape shape) {
    return store.Declare(absl::StrCat(label_, ".", name), std::move(shape),
                         ParameterGroup::kIndexer);
  };
  wq_b_ = declare("wq_b.weight", {heads_ * width_, config.q_lora_rank});
  wk_ = declare("wk.weight", {width_, config.hidden_size});
  k_norm_weight_ = declare("k_norm.weight", {width_});
  k_norm_bias_ = declare("k_norm.bias", {width_});
  weights_proj_ = declare("weights_proj.weight", {heads_, config.hidden_size});
}

// Rotation of the first columns, Hadamard and FP8 rounding of [T, n, J], in this order; x is
// rotated in place.
Tensor Indexer::Transform(const ModelContext& model, const Batch& batch, const Tensor& x) const {
  ApplyRope(model.context, PerHead(x).Columns(0, rope_), batch.positions_R, model.rope,
            RopeLayout::kHalfSplit, RopeDirection::kForward);
  Tensor y = x;
  if (model.options.hadamard) y = HadamardTransform(model.context, y);
  if (model.options.indexer_precision == IndexerPrecision::kFp8) {
    y = SimulateFp8(model.context, y, std::min(kFp8Group, width_));
  }
  return y;
}

Tensor Indexer::TransformBackward(const ModelContext& model, const Batch& batch,
                                  const Tensor& dy) const {
  const Tensor dx = model.options.hadamard ? HadamardTransform(model.context, dy) : dy;
  ApplyRope(model.context, PerHead(dx).Columns(0, rope_), batch.positions_R, model.rope,
            RopeLayout::kHalfSplit, RopeDirection::kBackward);
  return dx;
}

void Indexer::Forward(const ModelContext& model, const Batch& batch, const Tensor& x_RD,
                      const Tensor& qr_R, Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  const int64_t rows = x_RD.dim(0);
  saved.x_RD = x_RD;
  saved.qr_R = qr_R;
  saved.q_RIJ = Transform(
      model, batch, Linear(context, qr_R, weights.value(wq_b_)).Reshaped({rows, heads_, width_}));
  saved.k_pre = Linear(context, x_RD, weights.value(wk_));
  const LayerNormResult k_norm = LayerNorm(context, saved.k_pre, weights.value(k_norm_weight_),
                                           weights.value(k_norm_bias_), kLayerNormEps);
  saved.k_mean = k_norm.mean;
  saved.k_rstd = k_norm.rstd;
  saved.k_RJ =
      Transform(model, batch, k_norm.y.Reshaped({rows, 1, width_})).Reshaped({rows, width_});
  saved.w_RI = LinearToStatistics(context, x_RD, weights.value(weights_proj_));
  ScaleInPlace(context, saved.w_RI, model.config.index_scale());
  GatherIndexKeys(model, batch, saved);
}

void Indexer::GatherIndexKeys(const ModelContext& model, const Batch& batch, Saved& saved) const {
  saved.k_TJ = GatherKeys(model, batch, label_ + " keys", saved.k_RJ);
}

// Rows [begin, end) against all keys, whose codes are `keys` where the precision has a kernel of
// its own: the codes of values that Transform has rounded already are exact, so they are made here,
// for as long as they are needed, and of keys that other ranks have rounded.
Tensor Indexer::Scores(const ModelContext& model, const Saved& saved, const Fp8Codes& keys,
                       const KeyWindows& windows, int64_t begin, int64_t end) const {
  const Context& context = model.context;
  const Tensor q = saved.q_RIJ.Rows(begin, end), w = saved.w_RI.Rows(begin, end);
  if (keys.codes.empty()) return IndexerScores(context, q, saved.k_TJ, w, windows);
  return IndexerScoresFp8(context, QuantiseFp8(context, q, width_), keys, w, windows);
}

TopkResult Indexer::Select(const ModelContext& model, const Batch& batch, const Saved& saved,
                           ChosenScores chosen) const {
  const Context& context = model.context;
  const int64_t rows = saved.q_RIJ.dim(0);
  const int64_t topk = model.config.index_topk;
  TopkResult result;
  result.ids_TK = context.Empty(DType::kI32, {rows, topk});
  result.ties_T = context.Empty(DType::kI32, {rows});
  result.nan_row_1 = context.Empty(DType::kI32, {1});
  FillInt(context, result.nan_row_1, -1);
  if (chosen == ChosenScores::kKeep)
    result.scores_TK = context.Empty(saved.w_RI.dtype(), {rows, topk});
  const bool fp8 = model.options.indexer_precision == IndexerPrecision::kFp8 &&
                   HasFp8IndexerScores(saved.q_RIJ.dtype(), heads_, width_);
  const Fp8Codes keys = fp8 ? QuantiseFp8(context, saved.k_TJ, width_) : Fp8Codes();
  for (int64_t begin = 0; begin < rows; begin += model.options.query_chunk) {
    const int64_t end = std::min(rows, begin + model.options.query_chunk);
    const KeyWindows windows = batch.windows_R.Rows(begin, end);
    const Tensor scores = Scores(model, saved, keys, windows, begin, end);
    const TopkResult chunk = TopkSelect(context, scores, windows, topk, chosen);
    Copy(context, chunk.ids_TK, result.ids_TK.Rows(begin, end));
    Copy(context, chunk.ties_T, result.ties_T.Rows(begin, end));
    if (chosen == ChosenScores::kKeep)
      Copy(context, chunk.scores_TK, result.scores_TK.Rows(begin, end));
    KeepFirstNanRow(context, chunk.nan_row_1, begin, result.nan_row_1);
  }
  return result;
}

Tensor Indexer::SparseLossBackward(const ModelContext& model, const Batch& batch,
                                   const Tensor& ids_RK, const Tensor& scores_RK,
                                   const Tensor& target_RK, double grad_scale, Saved& saved) const {
  if (saved.k_TJ.empty()) GatherIndexKeys(model, batch, saved);
  const Tensor dk_TJ = model.context.Zeros(StatisticsOf(saved.k_TJ.dtype()), saved.k_TJ.shape());
  const double target_scale = 1.0 / static_cast<double>(model.config.num_attention_heads);
  const IndexerLossResult loss =
      SparseIndexerLoss(model.context, saved.q_RIJ, saved.k_TJ, saved.w_RI, ids_RK, target_RK,
                        target_scale, grad_scale, dk_TJ, scores_RK);
  BackwardWeight(model, batch, loss, dk_TJ, saved);
  return loss.loss_T;
}

Tensor Indexer::DenseLossBackward(const ModelContext& model, const Batch& batch,
                                  const std::vector<DenseTarget>& targets, double grad_scale,
                                  Saved& saved) const {
  const Context& context = model.context;
  const Tensor dk_TJ = context.Zeros(StatisticsOf(saved.k_TJ.dtype()), saved.k_TJ.shape());
  IndexerLossResult loss{.loss_T = context.Empty(saved.w_RI.dtype(), {saved.w_RI.dim(0)}),
                         .dq_TIJ = context.Empty(saved.q_RIJ.dtype(), saved.q_RIJ.shape()),
                         .dw_TI = context.Empty(saved.w_RI.dtype(), saved.w_RI.shape())};
  int64_t begin = 0;
  for (const DenseTarget& target : targets) {
    const int64_t end = begin + target.q_THQ.dim(0);
    const KeyWindows windows = batch.windows_R.Rows(begin, end);
    const IndexerLossResult chunk = DenseIndexerLoss(
        context, saved.q_RIJ.Rows(begin, end), saved.k_TJ, saved.w_RI.Rows(begin, end), target,
        windows, grad_scale, model.options.key_tile, dk_TJ);
    Copy(context, chunk.loss_T, loss.loss_T.Rows(begin, end));
    Copy(context, chunk.dq_TIJ, loss.dq_TIJ.Rows(begin, end));
    Copy(context, chunk.dw_TI, loss.dw_TI.Rows(begin, end));
    begin = end;
  }
  CHECK_EQ(begin, saved.q_RIJ.dim(0));
  BackwardWeight(model, batch, loss, dk_TJ, saved);
  return loss.loss_T;
}

void Indexer::BackwardWeight(const ModelContext& model, const Batch& batch,
                             const IndexerLossResult& loss, const Tensor& dk_TJ,
                             const Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  const int64_t rows = saved.x_RD.dim(0);
  ScaleInPlace(context, loss.dw_TI, model.config.index_scale());
  const DType dtype = saved.x_RD.dtype();
  LinearBackwardWeight(model, InDtype(context, loss.dw_TI, dtype), saved.x_RD, weights_proj_);
  const Tensor dq = TransformBackward(model, batch, loss.dq_TIJ).Reshaped({rows, heads_ * width_});
  LinearBackwardWeight(model, dq, saved.qr_R, wq_b_);
  const Tensor dk_RJ =
      InDtype(context, ReduceScatterKeys(model, batch, label_ + " key gradient", dk_TJ), dtype);
  const Tensor dk =
      TransformBackward(model, batch, dk_RJ.Reshaped({rows, 1, width_})).Reshaped({rows, width_});
  LayerNormBackwardWeight(context, dk, saved.k_pre, saved.k_mean, saved.k_rstd,
                          weights.grad(k_norm_weight_), weights.grad(k_norm_bias_));
  const Tensor dk_pre = LayerNormBackwardInput(
      context, dk, saved.k_pre, weights.value(k_norm_weight_), saved.k_mean, saved.k_rstd);
  LinearBackwardWeight(model, dk_pre, saved.x_RD, wk_);
}

}  // namespace baleen
