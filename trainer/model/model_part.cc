#include "trainer/model/model_part.h"

#include "kernels/ops/elementwise.h"
#include "kernels/ops/reduce.h"
#include "kernels/ops/rms_norm.h"

namespace baleen {

ModelPart::ModelPart(const ModelConfig& config, const PartLayers& layers, bool use_indexer,
                     const Placement& placement, ParameterStore& store)
    : layers_(layers) {
  const bool mtp = layers.last && config.num_nextn_predict_layers > 0;
  if (layers.first || mtp) embedding_.emplace(config, placement, store);
  for (int64_t layer = layers.begin; layer < layers.end; ++layer) {
    first_id_.push_back(store.size());
    blocks_.emplace_back(config, absl::StrCat("model.layers.", layer), layer,
                         config.IsMoeLayer(layer), use_indexer, placement, store);
  }
  first_id_.push_back(store.size());
  end_id_ = store.size();
  if (!layers.last) return;
  norm_ = store.Declare("model.norm.weight", {config.hidden_size}, ParameterGroup::kMain);
  head_.emplace(config, placement, store);
  if (mtp) mtp_.emplace(config, use_indexer, placement, store);
  end_id_ = store.size();
}

// ---- Forward -----------------------------------------------------------------------------------

void ModelPart::Begin(const Tensor& x, Saved& saved) {
  saved.flow = x;
  saved.step = 0;
}

Tensor ModelPart::Forward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                          const Tensor& x, StepStats& stats, Saved& saved) const {
  Begin(x, saved);
  while (ForwardStep(model, batch, pass, stats, saved)) {
  }
  return std::move(saved.flow);
}

bool ModelPart::ForwardStep(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                            StepStats& stats, Saved& saved) const {
  const int step = saved.step++;
  if (step == num_steps()) return false;
  if (step == 0) {
    saved.blocks.resize(blocks_.size());
    if (layers_.first) saved.flow = embedding_->Forward(model, batch.tokens_G);
    return true;
  }
  if (step == num_steps() - 1) {
    if (layers_.last) FinishForward(model, batch, pass, stats, saved);
    return true;
  }
  const int index = (step - 1) / Block::kPhases, phase = (step - 1) % Block::kPhases;
  Block::Saved& kept = saved.blocks[index];
  if (phase == 0) kept.x = std::move(saved.flow);
  saved.flow = blocks_[index].ForwardPhase(phase, model, batch, pass, stats, kept);
  // Nothing goes back through a validation pass.
  if (!pass.train && phase == Block::kPhases - 1) kept = Block::Saved();
  return true;
}

// Final norm, head and MTP module: the losses.
void ModelPart::FinishForward(const ModelContext& model, const Batch& batch,
                              const PassOptions& pass, StepStats& stats, Saved& saved) const {
  const Context& context = model.context;
  saved.out = std::move(saved.flow);
  saved.flow = Tensor();
  const RmsNormResult norm =
      RmsNorm(context, saved.out, model.parameters.value(norm_), model.config.rms_norm_eps);
  saved.out_rstd = norm.rstd;
  saved.hidden = norm.y;
  const Head::Result lm =
      head_->Loss(model, saved.hidden, batch.targets_G, pass.scales.lm, pass.train);
  saved.lm_loss_R = lm.loss_R;
  saved.dhidden = lm.dhidden_RD;
  AddSum(context, saved.lm_loss_R, stats.lm_loss_1);
  if (!mtp_) return;
  const Tensor embedding = embedding_->Forward(model, batch.mtp_tokens_G);
  const Tensor mtp_hidden =
      mtp_->Forward(model, batch, pass, embedding, saved.hidden, stats, saved.mtp);
  const Head::Result mtp =
      head_->Loss(model, mtp_hidden, batch.mtp_targets_G, pass.scales.mtp, pass.train);
  saved.mtp_loss_R = mtp.loss_R;
  saved.dmtp_hidden = mtp.dhidden_RD;
  AddSum(context, saved.mtp_loss_R, stats.mtp_loss_1);
}

// ---- Backward ----------------------------------------------------------------------------------

Tensor ModelPart::BackwardInput(const ModelContext& model, const Batch& batch,
                                const PassOptions& pass, const Tensor& dy, StepStats& stats,
                                Saved& saved, const GradientsReady& ready) const {
  Begin(dy, saved);
  while (BackwardStep(model, batch, pass, saved)) {
    FormBlockWeights(model, batch, pass, stats, saved, ready);
  }
  return std::move(saved.flow);
}

void ModelPart::FormBlockWeights(const ModelContext& model, const Batch& batch,
                                 const PassOptions& pass, StepStats& stats, Saved& saved,
                                 const GradientsReady& ready) const {
  const int done = saved.step - 1;  // steps of blocks that are taken
  if (!model.options.weights_with_input || done == 0 || done % Block::kPhases != 0) return;
  BlockWeight(blocks_.size() - done / Block::kPhases, model, batch, pass, stats, saved, ready);
}

void ModelPart::BlockWeight(size_t index, const ModelContext& model, const Batch& batch,
                            const PassOptions& pass, StepStats& stats, Saved& saved,
                            const GradientsReady& ready) const {
  blocks_[index].BackwardWeight(model, batch, pass, stats, saved.blocks[index], ready);
  saved.blocks[index] = Block::Saved();
}

bool ModelPart::BackwardStep(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                             Saved& saved) const {
  const int step = saved.step++;
  if (step == num_steps()) return false;
  if (step == 0) {
    if (layers_.last) BeginBackward(model, batch, pass, saved);
    return true;
  }
  if (step == num_steps() - 1) {
    if (layers_.first) {
      saved.dembedding = std::move(saved.flow);
      saved.flow = Tensor();
    }
    return true;
  }
  const int phase = (step - 1) % Block::kPhases;
  const size_t index = blocks_.size() - 1 - (step - 1) / Block::kPhases;
  Block::Saved& kept = saved.blocks[index];
  if (phase == 0) kept.dy = std::move(saved.flow);
  saved.flow = blocks_[index].BackwardPhase(phase, model, batch, pass, kept);
  return true;
}

// From the head's gradients to that of the last block's output.
void ModelPart::BeginBackward(const ModelContext& model, const Batch& batch,
                              const PassOptions& pass, Saved& saved) const {
  const Context& context = model.context;
  saved.dnorm = saved.dhidden;
  if (mtp_) {
    const Mtp::Gradients mtp =
        mtp_->BackwardInput(model, batch, pass, saved.dmtp_hidden, saved.mtp);
    saved.dmtp_embedding = mtp.dembedding;
    AddInPlace(context, saved.dnorm, mtp.dhidden);
  }
  saved.flow = RmsNormBackwardInput(context, saved.dnorm, saved.out, model.parameters.value(norm_),
                                    saved.out_rstd);
}

void ModelPart::BackwardWeight(const ModelContext& model, const Batch& batch,
                               const PassOptions& pass, StepStats& stats, Saved& saved,
                               const GradientsReady& ready) const {
  if (mtp_) {
    mtp_->BackwardWeight(model, batch, pass, stats, saved.mtp);
    embedding_->BackwardWeight(model, batch.mtp_tokens_G, saved.dmtp_embedding);
  }
  if (layers_.last) {
    RmsNormBackwardWeight(model.context, saved.dnorm, saved.out, saved.out_rstd,
                          model.parameters.grad(norm_));
  }
  if (ready) ready(first_id_.back(), end_id_);
  if (!model.options.weights_with_input) {
    for (size_t i = blocks_.size(); i-- > 0;)
      BlockWeight(i, model, batch, pass, stats, saved, ready);
  }
  if (layers_.first) embedding_->BackwardWeight(model, batch.tokens_G, saved.dembedding);
}

// ---- Without a backward ------------------------------------------------------------------------

Tensor ModelPart::WarmUp(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                         const Tensor& x_in, StepStats& stats, const GradientsReady& ready) const {
  const Context& context = model.context;
  Tensor x = layers_.first ? embedding_->Forward(model, batch.tokens_G) : x_in;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    Block::Saved saved;  // no activation outlives its block
    x = blocks_[i].Forward(model, batch, pass, x, stats, saved);
    if (ready) ready(first_id_[i], first_id_[i + 1]);
  }
  if (!layers_.last) return x;
  if (!mtp_) return Tensor();
  const Tensor hidden =
      RmsNorm(context, x, model.parameters.value(norm_), model.config.rms_norm_eps).y;
  const Tensor embedding = embedding_->Forward(model, batch.mtp_tokens_G);
  Mtp::Saved saved;
  mtp_->block().WarmIndexer(model, batch, pass, mtp_->Join(model, embedding, hidden, saved), stats);
  if (ready) ready(first_id_.back(), end_id_);
  return Tensor();
}

ModelPart::Logits ModelPart::ForwardLogits(const ModelContext& model, const Batch& batch,
                                           bool mtp) const {
  CHECK(layers_.first && layers_.last) << "logits need the whole network on one rank";
  const Context& context = model.context;
  PassOptions pass;
  pass.train = false;
  StepStats stats = StepStats::Zeros(context, layers_.end + 1, model.config.n_routed_experts);
  Tensor x = embedding_->Forward(model, batch.tokens_G);
  for (const Block& block : blocks_) {
    Block::Saved saved;
    x = block.Forward(model, batch, pass, x, stats, saved);
  }
  const Tensor hidden =
      RmsNorm(context, x, model.parameters.value(norm_), model.config.rms_norm_eps).y;
  Logits logits;
  logits.lm_RW = head_->Logits(model, hidden);
  if (mtp && mtp_) {
    Mtp::Saved saved;
    const Tensor embedding = embedding_->Forward(model, batch.mtp_tokens_G);
    logits.mtp_RW =
        head_->Logits(model, mtp_->Forward(model, batch, pass, embedding, hidden, stats, saved));
  }
  return logits;
}

std::vector<std::pair<int64_t, int>> ModelPart::correction_biases() const {
  std::vector<std::pair<int64_t, int>> biases;
  const auto add = [&](const Block& block) {
    if (block.moe()) biases.emplace_back(block.layer(), block.moe()->correction_bias());
  };
  for (const Block& block : blocks_) add(block);
  if (mtp_) add(mtp_->block());
  return biases;
}

}  // namespace baleen
