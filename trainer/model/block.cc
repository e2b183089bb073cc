#include "trainer/model/block.h"

#include "kernels/ops/elementwise.h"
#include "kernels/ops/indexer/selection_hash.h"
#include "kernels/ops/reduce.h"
#include "kernels/ops/rms_norm.h"
#include "trainer/model/choice_replay.h"
#include "trainer/model/measure_selection.h"

namespace baleen {

Block::Block(const ModelConfig& config, const std::string& prefix, int64_t layer, bool moe,
             bool use_indexer, const Placement& placement, ParameterStore& store)
    : layer_(layer),
      input_layernorm_(store.Declare(prefix + ".input_layernorm.weight", {config.hidden_size},
                                     ParameterGroup::kMain)),
      post_attention_layernorm_(store.Declare(prefix + ".post_attention_layernorm.weight",
                                              {config.hidden_size}, ParameterGroup::kMain)),
      mla_(config, prefix, placement, store) {
  if (use_indexer) indexer_.emplace(config, prefix, store);
  mlp_begin_ = store.size();
  if (moe) {
    moe_.emplace(config, prefix, placement, store);
  } else {
    mlp_.emplace(config.hidden_size, config.intermediate_size, prefix + ".mlp", placement, store);
  }
  mlp_end_ = store.size();
}

Tensor Block::Forward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                      const Tensor& x, StepStats& stats, Saved& saved) const {
  saved.x = x;
  Tensor y;
  for (int phase = 0; phase < kPhases; ++phase)
    y = ForwardPhase(phase, model, batch, pass, stats, saved);
  return y;
}

Tensor Block::ForwardPhase(int phase, const ModelContext& model, const Batch& batch,
                           const PassOptions& pass, StepStats& stats, Saved& saved) const {
  switch (phase) {
    case 0: {
      Normalise(model, batch, saved);
      if (indexer_ && model.options.attention != AttentionForm::kDense)
        SelectKeys(model, batch, pass, stats, saved);
      Attend(model, batch, saved);
      if (pass.measure_indexer && indexer_) Measure(model, batch, pass, stats, saved);
      const bool warm_up = model.options.indexer_loss == IndexerLossKind::kDense && pass.train;
      if (warm_up) WarmUp(model, batch, pass, stats, saved);
      return Tensor();
    }
    case 1:
      Dispatch(model, batch, pass, saved);
      return Tensor();
    case 2:
      RunExperts(model, saved);
      return Tensor();
    default: {
      Combine(model, saved);
      CountTokens(model, batch, stats, saved);
      const Tensor y = Add(model.context, saved.h, saved.mlp_out);
      saved.complete = true;
      if (pass.train) Drop(model, saved);
      return y;
    }
  }
}

// The norm, the projections that attention and indexer share, and the indexer's q, k, w.
void Block::Normalise(const ModelContext& model, const Batch& batch, Saved& saved) const {
  const RmsNormResult norm = RmsNorm(
      model.context, saved.x, model.parameters.value(input_layernorm_), model.config.rms_norm_eps);
  saved.x_rstd = norm.rstd;
  mla_.Project(model, batch, norm.y, saved.mla);
  const bool needed = model.options.attention != AttentionForm::kDense ||
                      model.options.indexer_loss != IndexerLossKind::kNone;
  if (indexer_ && needed) indexer_->Forward(model, batch, norm.y, saved.mla.qr_R, saved.indexer);
}

void Block::SelectKeys(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                       StepStats& stats, Saved& saved) const {
  if (model.options.selection != SelectionKind::kIndexer) {
    saved.ids_RK = SelectWithoutIndexer(model, batch, layer_);
    return;
  }
  // Their scores are at hand here, and the loss's backward would gather the keys again for them. A
  // full recompute keeps as little as can be (they are as large as the ids); ids from elsewhere
  // have other scores.
  const bool keep_scores = pass.train && model.options.indexer_loss == IndexerLossKind::kSparse &&
                           model.options.recompute != RecomputeMode::kFull &&
                           model.replay == nullptr && model.options.replaced_ids_RK.empty();
  const TopkResult selected = indexer_->Select(
      model, batch, saved.indexer, keep_scores ? ChosenScores::kKeep : ChosenScores::kDrop);
  saved.ids_RK = selected.ids_TK;
  saved.scores_RK = selected.scores_TK;
  if (model.replay != nullptr) {
    saved.ids_RK = model.replay->Choose(model.context, ChoiceReplay::Kind::kKeys,
                                        absl::StrCat("layer ", layer_), batch, selected.ids_TK);
  }
  AddIntSum(model.context, selected.ties_T, stats.ties_L.Rows(layer_, layer_ + 1));
  AddSelectionHash(model.context, batch.row_R, saved.ids_RK,
                   stats.selection_hash_L.Rows(layer_, layer_ + 1));
  CountNanRow(model.context, selected.nan_row_1, stats.nan_rows_1);
  if (!model.options.replaced_ids_RK.empty()) saved.ids_RK = model.options.replaced_ids_RK;
}

void Block::Attend(const ModelContext& model, const Batch& batch, Saved& saved) const {
  const Tensor attention = mla_.Attend(model, batch, saved.ids_RK, saved.mla);
  saved.h = Add(model.context, saved.x, attention);
}

void Block::Dispatch(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                     Saved& saved) const {
  const RmsNormResult norm =
      RmsNorm(model.context, saved.h, model.parameters.value(post_attention_layernorm_),
              model.config.rms_norm_eps);
  saved.h_rstd = norm.rstd;
  saved.h_norm = norm.y;
  if (moe_) moe_->Dispatch(model, batch, saved.h_norm, pass.scales.balance != 0, saved.moe);
}

void Block::RunExperts(const ModelContext& model, Saved& saved) const {
  if (moe_) {
    saved.shared_out = moe_->Experts(model, saved.moe);
  } else {
    saved.mlp_out = mlp_->Forward(model, saved.h_norm, saved.mlp);
  }
}

void Block::Combine(const ModelContext& model, Saved& saved) const {
  if (moe_) saved.mlp_out = moe_->Combine(model, saved.shared_out, saved.moe);
  saved.shared_out = Tensor();
}

void Block::CountTokens(const ModelContext& model, const Batch& batch, StepStats& stats,
                        const Saved& saved) const {
  if (!moe_) return;
  CountExperts(
      model.context, saved.moe.route.expert_ids_TA,
      stats.expert_counts_LE.Rows(layer_, layer_ + 1).Reshaped({model.config.n_routed_experts}));
  moe_->AddBalanceLoss(model, batch, saved.moe, stats.balance_1);
}

void Block::Drop(const ModelContext& model, Saved& saved) const {
  switch (model.options.recompute) {
    case RecomputeMode::kNone:
      return;
    case RecomputeMode::kSelective:
      mla_.DropExpanded(saved.mla);
      if (indexer_) indexer_->DropGathered(saved.indexer);
      if (mlp_) mlp_->DropExpanded(saved.mlp);
      if (moe_) moe_->DropExpanded(saved.moe);
      saved.mlp_out = Tensor();
      return;
    case RecomputeMode::kFull: {
      Saved kept;
      kept.x = saved.x;
      kept.ids_RK = saved.ids_RK;  // selecting again would cost the whole score matrix
      // The backward runs the sparse core again, chunk by chunk, for o~; with h it need not run a
      // third time, nor o_proj a second.
      if (model.options.attention == AttentionForm::kSparse) kept.h = saved.h;
      saved = std::move(kept);
      return;
    }
  }
}

void Block::Recompute(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                      Saved& saved) const {
  Normalise(model, batch, saved);
  if (saved.h.empty()) {
    Attend(model, batch, saved);
  } else {
    mla_.Prepare(model, batch, saved.ids_RK, saved.mla);
  }
  Dispatch(model, batch, pass, saved);
  // The backward makes the inner activations of MLP and experts where it finds none; nobody asks
  // for their outputs, which experts on other ranks would have to send once more.
  if (mlp_) saved.mlp.x_RD = saved.h_norm;
  if (moe_) saved.moe.shared.x_RD = saved.h_norm;
  saved.complete = true;
}

Tensor Block::BackwardInput(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                            const Tensor& dy, Saved& saved) const {
  saved.dy = dy;
  Tensor dx;
  for (int phase = 0; phase < kPhases; ++phase)
    dx = BackwardPhase(phase, model, batch, pass, saved);
  return dx;
}

Tensor Block::BackwardPhase(int phase, const ModelContext& model, const Batch& batch,
                            const PassOptions& pass, Saved& saved) const {
  const Context& context = model.context;
  switch (phase) {
    case 0:
      if (!saved.complete) Recompute(model, batch, pass, saved);
      if (moe_) moe_->BackwardCombine(model, saved.dy, saved.moe);
      return Tensor();
    case 1:
      if (moe_) moe_->BackwardExperts(model, saved.moe);
      if (mlp_) saved.dh_norm = mlp_->BackwardInput(model, saved.dy, saved.mlp);
      return Tensor();
    case 2: {
      if (moe_) {
        saved.dh_norm = moe_->BackwardDispatch(model, batch, pass.scales.balance, saved.moe);
      }
      saved.dx =
          RmsNormBackwardInput(context, saved.dh_norm, saved.h,
                               model.parameters.value(post_attention_layernorm_), saved.h_rstd);
      AddInPlace(context, saved.dx, saved.dy);
      saved.dy = Tensor();
      return Tensor();
    }
    default: {
      const Tensor dh = std::move(saved.dx);
      saved.dx = Tensor();
      saved.dx_norm = mla_.BackwardInput(model, batch, dh, saved.mla);
      const Tensor dx = RmsNormBackwardInput(
          context, saved.dx_norm, saved.x, model.parameters.value(input_layernorm_), saved.x_rstd);
      AddInPlace(context, dx, dh);
      return dx;
    }
  }
}

void Block::BackwardWeight(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                           StepStats& stats, Saved& saved, const GradientsReady& ready) const {
  const Context& context = model.context;
  if (mlp_) mlp_->BackwardWeight(model, saved.mlp);
  if (moe_) moe_->BackwardWeight(model, saved.moe);
  if (ready) ready(mlp_begin_, mlp_end_);
  RmsNormBackwardWeight(context, saved.dh_norm, saved.h, saved.h_rstd,
                        model.parameters.grad(post_attention_layernorm_));
  mla_.BackwardWeight(model, saved.mla);
  RmsNormBackwardWeight(context, saved.dx_norm, saved.x, saved.x_rstd,
                        model.parameters.grad(input_layernorm_));
  if (model.options.indexer_loss == IndexerLossKind::kSparse) {
    const Tensor loss_T =
        indexer_->SparseLossBackward(model, batch, saved.ids_RK, saved.scores_RK,
                                     saved.mla.target_RK, pass.scales.kl, saved.indexer);
    AddSum(context, loss_T, stats.kl_L.Rows(layer_, layer_ + 1));
  }
  if (ready) ready(input_layernorm_, mlp_begin_);
}

void Block::WarmUp(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                   StepStats& stats, Saved& saved) const {
  std::vector<DenseTarget> targets;
  for (const Mla::Chunk& chunk : saved.mla.chunks) {
    targets.push_back(
        {chunk.q_THQ, saved.mla.k_THQ, chunk.core.lse_TH, model.config.softmax_scale()});
  }
  const Tensor loss_T =
      indexer_->DenseLossBackward(model, batch, targets, pass.scales.kl, saved.indexer);
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
  AddSum(model.context, quality.mass_T, stats.mass_L.Rows(layer_, layer_ + 1));
  AddSum(model.context, quality.best_mass_T, stats.best_mass_L.Rows(layer_, layer_ + 1));
  AddSum(model.context, quality.recall_T, stats.recall_L.Rows(layer_, layer_ + 1));
  stats.sampled_rows_L.data<double>()[layer_] += static_cast<double>(quality.mass_T.num_elements());
}

}  // namespace baleen
