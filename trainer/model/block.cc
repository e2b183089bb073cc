#include "trainer/model/block.h"

#include "kernels/ops/elementwise.h"
#include "kernels/ops/reduce.h"
#include "kernels/ops/rms_norm.h"
#include "trainer/model/measure_selection.h"

namespace baleen {

Block::Block(const ModelConfig& config, const std::string& prefix, int64_t layer, bool moe,
             bool use_indexer, ParameterStore& store)
    : layer_(layer),
      input_layernorm_(store.Declare(prefix + ".input_layernorm.weight", {config.hidden_size},
                                     ParameterGroup::kMain)),
      post_attention_layernorm_(store.Declare(prefix + ".post_attention_layernorm.weight",
                                              {config.hidden_size}, ParameterGroup::kMain)),
      mla_(config, prefix, store) {
  if (use_indexer) indexer_.emplace(config, prefix, store);
  if (moe) {
    moe_.emplace(config, prefix, store);
  } else {
    mlp_.emplace(config.hidden_size, config.intermediate_size, prefix + ".mlp", store);
  }
}

Tensor Block::Forward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                      const Tensor& x, StepStats& stats, Saved& saved) const {
  saved.x = x;
  Normalise(model, batch, saved);
  if (indexer_ && model.options.attention != AttentionForm::kDense) {
    SelectKeys(model, batch, stats, saved);
  }
  ForwardAttention(model, batch, saved);
  if (pass.measure_indexer && indexer_) Measure(model, batch, pass, stats, saved);
  if (model.options.indexer_loss == IndexerLossKind::kDense && pass.train) {
    WarmUp(model, batch, pass, stats, saved);
  }
  ForwardMlp(model, batch, pass.scales.balance != 0, saved);
  CountTokens(model, batch, stats, saved);
  const Tensor y = Add(model.context, saved.h, saved.mlp_out);
  if (pass.train) Drop(model, saved);
  return y;
}

// The norm, the projections that attention and indexer share, and the indexer's q, k, w.
void Block::Normalise(const ModelContext& model, const Batch& batch, Saved& saved) const {
  const RmsNormResult norm = RmsNorm(
      model.context, saved.x, model.parameters.value(input_layernorm_), model.config.rms_norm_eps);
  saved.x_rstd = norm.rstd;
  mla_.Project(model, batch, norm.y, saved.mla);
  const bool needed = model.options.attention != AttentionForm::kDense ||
                      model.options.indexer_loss != IndexerLossKind::kNone;
  if (indexer_ && needed) indexer_->Forward(model, batch, norm.y, saved.mla.qr, saved.indexer);
}

void Block::SelectKeys(const ModelContext& model, const Batch& batch, StepStats& stats,
                       Saved& saved) const {
  if (model.options.selection != SelectionKind::kIndexer) {
    saved.ids_TK = SelectWithoutIndexer(model, batch, layer_);
    return;
  }
  const TopkResult selected = indexer_->Select(model, batch, saved.indexer);
  saved.ids_TK = selected.ids_TK;
  double ties = 0;
  for (int64_t t = 0; t < selected.ties_T.num_elements(); ++t)
    ties += selected.ties_T.data<int32_t>()[t];
  stats.ties_L.data<double>()[layer_] += ties;
  if (selected.nan_row_1.data<int32_t>()[0] >= 0) stats.nan_rows_1.data<int64_t>()[0] += 1;
}

void Block::ForwardAttention(const ModelContext& model, const Batch& batch, Saved& saved) const {
  const Tensor attention = mla_.Attend(model, batch, saved.ids_TK, saved.mla);
  saved.h = Add(model.context, saved.x, attention);
}

void Block::ForwardMlp(const ModelContext& model, const Batch& batch, bool balance,
                       Saved& saved) const {
  const RmsNormResult norm =
      RmsNorm(model.context, saved.h, model.parameters.value(post_attention_layernorm_),
              model.config.rms_norm_eps);
  saved.h_rstd = norm.rstd;
  saved.h_norm = norm.y;
  if (mlp_) {
    saved.mlp_out = mlp_->Forward(model, saved.h_norm, saved.mlp);
  } else {
    moe_->Dispatch(model, batch, saved.h_norm, balance, saved.moe);
    const Tensor shared = moe_->Experts(model, saved.moe);
    saved.mlp_out = moe_->Combine(model, shared, saved.moe);
  }
  saved.complete = true;
}

void Block::CountTokens(const ModelContext& model, const Batch& batch, StepStats& stats,
                        const Saved& saved) const {
  if (!moe_) return;
  CountExperts(
      model.context, saved.moe.route.expert_ids_TA,
      stats.expert_counts_LE.Rows(layer_, layer_ + 1).Reshaped({model.config.n_routed_experts}));
  stats.balance_1.data<double>()[0] += moe_->BalanceLoss(model, batch, saved.moe);
}

void Block::Drop(const ModelContext& model, Saved& saved) const {
  switch (model.options.recompute) {
    case RecomputeMode::kNone:
      return;
    case RecomputeMode::kSelective:
      mla_.DropExpanded(saved.mla);
      if (mlp_) mlp_->DropExpanded(saved.mlp);
      if (moe_) moe_->DropExpanded(saved.moe);
      saved.mlp_out = Tensor();
      return;
    case RecomputeMode::kFull: {
      Saved kept;
      kept.x = saved.x;
      kept.ids_TK = saved.ids_TK;  // selecting again would cost the whole score matrix
      saved = std::move(kept);
      return;
    }
  }
}

Tensor Block::BackwardInput(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                            const Tensor& dy, Saved& saved) const {
  const Context& context = model.context;
  if (!saved.complete) {
    Normalise(model, batch, saved);
    ForwardAttention(model, batch, saved);
    ForwardMlp(model, batch, pass.scales.balance != 0, saved);
  }
  if (mlp_) {
    saved.dh_norm = mlp_->BackwardInput(model, dy, saved.mlp);
  } else {
    moe_->BackwardCombine(model, dy, saved.moe);
    const Tensor drows = moe_->BackwardExperts(model, saved.moe);
    saved.dh_norm = moe_->BackwardDispatch(model, batch, drows, pass.scales.balance, saved.moe);
  }
  const Tensor dh =
      RmsNormBackwardInput(context, saved.dh_norm, saved.h,
                           model.parameters.value(post_attention_layernorm_), saved.h_rstd);
  AddInPlace(context, dh, dy);
  saved.dx_norm = mla_.BackwardInput(model, batch, dh, saved.mla);
  const Tensor dx = RmsNormBackwardInput(context, saved.dx_norm, saved.x,
                                         model.parameters.value(input_layernorm_), saved.x_rstd);
  AddInPlace(context, dx, dh);
  return dx;
}

void Block::BackwardWeight(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                           StepStats& stats, Saved& saved) const {
  const Context& context = model.context;
  if (mlp_) mlp_->BackwardWeight(model, saved.mlp);
  if (moe_) moe_->BackwardWeight(model, saved.moe);
  RmsNormBackwardWeight(context, saved.dh_norm, saved.h, saved.h_rstd,
                        model.parameters.grad(post_attention_layernorm_));
  mla_.BackwardWeight(model, saved.mla);
  RmsNormBackwardWeight(context, saved.dx_norm, saved.x, saved.x_rstd,
                        model.parameters.grad(input_layernorm_));
  if (model.options.indexer_loss == IndexerLossKind::kSparse) {
    const Tensor loss_T = indexer_->SparseLossBackward(
        model, batch, saved.ids_TK, saved.mla.target_TK, pass.scales.kl, saved.indexer);
    AddSum(context, loss_T, stats.kl_L.Rows(layer_, layer_ + 1));
  }
}

void Block::WarmUp(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                   StepStats& stats, Saved& saved) const {
  const DenseTarget target{saved.mla.q_THQ, saved.mla.k_SHQ, saved.mla.core.lse_TH,
                           model.config.softmax_scale()};
  const Tensor loss_T =
      indexer_->DenseLossBackward(model, batch, target, pass.scales.kl, saved.indexer);
  AddSum(model.context, loss_T, stats.kl_L.Rows(layer_, layer_ + 1));
}

void Block::WarmIndexer(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                        const Tensor& x, StepStats& stats) const {
  Saved saved;
  saved.x = x;
  Normalise(model, batch, saved);
  mla_.AttendForTarget(model, batch, saved.mla);
  if (pass.measure_indexer) Measure(model, batch, pass, stats, saved);
  WarmUp(model, batch, pass, stats, saved);
}

void Block::Measure(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                    StepStats& stats, const Saved& saved) const {
  const SelectionQualityResult quality =
      MeasureSelection(model, batch, pass.sampled_rows, mla_, saved.mla, saved.indexer);
  AddSum(model.context, quality.mass_R, stats.mass_L.Rows(layer_, layer_ + 1));
  AddSum(model.context, quality.best_mass_R, stats.best_mass_L.Rows(layer_, layer_ + 1));
  AddSum(model.context, quality.recall_R, stats.recall_L.Rows(layer_, layer_ + 1));
  stats.sampled_rows_L.data<double>()[layer_] += static_cast<double>(quality.mass_R.num_elements());
}

}  // namespace baleen
