#include "trainer/model/model.h"

#include <algorithm>

#include "kernels/ops/cross_entropy.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/matmul.h"
#include "kernels/ops/reduce.h"
#include "kernels/ops/rms_norm.h"

namespace baleen {

Model::Model(const ModelConfig& config, bool use_indexer, ParameterStore& store)
    : layers_(config.num_hidden_layers),
      embed_tokens_(store.Declare("model.embed_tokens.weight",
                                  {config.vocab_size, config.hidden_size}, ParameterGroup::kMain)) {
  for (int64_t layer = 0; layer < layers_; ++layer) {
    blocks_.emplace_back(config, absl::StrCat("model.layers.", layer), layer,
                         config.IsMoeLayer(layer), use_indexer, store);
  }
  norm_ = store.Declare("model.norm.weight", {config.hidden_size}, ParameterGroup::kMain);
  lm_head_ = store.Declare("lm_head.weight", {config.vocab_size, config.hidden_size},
                           ParameterGroup::kMain);
  if (config.num_nextn_predict_layers > 0) mtp_.emplace(config, use_indexer, store);
}

Tensor Model::RunBlocks(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                        StepStats& stats, std::vector<Block::Saved>& saved) const {
  saved.resize(blocks_.size());
  Tensor x =
      EmbeddingLookup(model.context, batch.tokens_T, model.parameters.value(embed_tokens_), 0);
  for (size_t i = 0; i < blocks_.size(); ++i) {
    x = blocks_[i].Forward(model, batch, pass, x, stats, saved[i]);
    if (!pass.train) saved[i] = Block::Saved();  // nothing goes back through a validation pass
  }
  return x;
}

void Model::Forward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                    StepStats& stats, Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  saved.out = RunBlocks(model, batch, pass, stats, saved.blocks);
  const RmsNormResult norm =
      RmsNorm(context, saved.out, weights.value(norm_), model.config.rms_norm_eps);
  saved.out_rstd = norm.rstd;
  saved.hidden = norm.y;
  const HeadResult lm = Head(model, saved.hidden, batch.targets_T, pass.scales.lm, pass.train);
  saved.lm_loss_T = lm.loss_T;
  saved.dhidden = lm.dhidden;
  AddSum(context, saved.lm_loss_T, stats.lm_loss_1);
  if (!mtp_) return;
  const Tensor embedding =
      EmbeddingLookup(context, batch.mtp_tokens_T, weights.value(embed_tokens_), 0);
  const Tensor mtp_hidden =
      mtp_->Forward(model, batch, pass, embedding, saved.hidden, stats, saved.mtp);
  const HeadResult mtp = Head(model, mtp_hidden, batch.mtp_targets_T, pass.scales.mtp, pass.train);
  saved.mtp_loss_T = mtp.loss_T;
  saved.dmtp_hidden = mtp.dhidden;
  AddSum(context, saved.mtp_loss_T, stats.mtp_loss_1);
}

Model::HeadResult Model::Head(const ModelContext& model, const Tensor& hidden,
                              const Tensor& targets_T, double scale, bool train) const {
  const Context& context = model.context;
  const Tensor& weight = model.parameters.value(lm_head_);
  const int64_t rows = hidden.dim(0);
  HeadResult result;
  result.loss_T = context.Empty(hidden.dtype(), {rows});
  if (train) result.dhidden = context.Empty(hidden.dtype(), hidden.shape());
  for (int64_t begin = 0; begin < rows; begin += model.options.head_chunk) {
    const int64_t end = std::min(rows, begin + model.options.head_chunk);
    const Tensor targets = targets_T.Rows(begin, end);
    const Tensor logits = Linear(context, hidden.Rows(begin, end), weight);
    const CrossEntropyStats stats = CrossEntropyLocalStats(context, logits, targets, 0);
    Copy(context, CrossEntropyLoss(context, stats, targets), result.loss_T.Rows(begin, end));
    if (!train) continue;
    CrossEntropyBackwardInPlace(context, logits, targets, stats, 0, scale);
    Copy(context, LinearBackwardInput(context, logits, weight), result.dhidden.Rows(begin, end));
    LinearBackwardWeight(context, logits, hidden.Rows(begin, end), model.parameters.grad(lm_head_));
  }
  return result;
}

void Model::BackwardInput(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                          Saved& saved) const {
  const Context& context = model.context;
  saved.dnorm = saved.dhidden;
  if (mtp_) {
    const Mtp::Gradients mtp =
        mtp_->BackwardInput(model, batch, pass, saved.dmtp_hidden, saved.mtp);
    saved.dmtp_embedding = mtp.dembedding;
    AddInPlace(context, saved.dnorm, mtp.dhidden);
  }
  Tensor dx = RmsNormBackwardInput(context, saved.dnorm, saved.out, model.parameters.value(norm_),
                                   saved.out_rstd);
  for (size_t i = blocks_.size(); i-- > 0;) {
    dx = blocks_[i].BackwardInput(model, batch, pass, dx, saved.blocks[i]);
  }
  saved.dembedding = dx;
}

void Model::BackwardWeight(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                           StepStats& stats, Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  if (mtp_) {
    mtp_->BackwardWeight(model, batch, pass, stats, saved.mtp);
    EmbeddingBackward(context, batch.mtp_tokens_T, saved.dmtp_embedding,
                      weights.grad(embed_tokens_), 0);
  }
  RmsNormBackwardWeight(context, saved.dnorm, saved.out, saved.out_rstd, weights.grad(norm_));
  for (size_t i = blocks_.size(); i-- > 0;) {
    blocks_[i].BackwardWeight(model, batch, pass, stats, saved.blocks[i]);
    saved.blocks[i] = Block::Saved();
  }
  EmbeddingBackward(context, batch.tokens_T, saved.dembedding, weights.grad(embed_tokens_), 0);
}

void Model::WarmUp(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                   StepStats& stats) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  Tensor x = EmbeddingLookup(context, batch.tokens_T, weights.value(embed_tokens_), 0);
  for (const Block& block : blocks_) {
    Block::Saved saved;  // no activation outlives its block
    x = block.Forward(model, batch, pass, x, stats, saved);
  }
  if (!mtp_) return;
  const Tensor hidden = RmsNorm(context, x, weights.value(norm_), model.config.rms_norm_eps).y;
  const Tensor embedding =
      EmbeddingLookup(context, batch.mtp_tokens_T, weights.value(embed_tokens_), 0);
  Mtp::Saved saved;
  mtp_->block().WarmIndexer(model, batch, pass, mtp_->Join(model, embedding, hidden, saved), stats);
}

Model::Logits Model::ForwardLogits(const ModelContext& model, const Batch& batch, bool mtp) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  PassOptions pass;
  pass.train = false;
  StepStats stats = StepStats::Zeros(context, layers_ + 1, model.config.n_routed_experts);
  std::vector<Block::Saved> saved;
  const Tensor out = RunBlocks(model, batch, pass, stats, saved);
  const Tensor hidden = RmsNorm(context, out, weights.value(norm_), model.config.rms_norm_eps).y;
  Logits logits;
  logits.lm_TW = Linear(context, hidden, weights.value(lm_head_));
  if (mtp && mtp_) {
    Mtp::Saved mtp_saved;
    const Tensor embedding =
        EmbeddingLookup(context, batch.mtp_tokens_T, weights.value(embed_tokens_), 0);
    logits.mtp_TW =
        Linear(context, mtp_->Forward(model, batch, pass, embedding, hidden, stats, mtp_saved),
               weights.value(lm_head_));
  }
  return logits;
}

std::vector<int> Model::correction_biases() const {
  std::vector<int> ids;
  for (const Block& block : blocks_)
    ids.push_back(block.moe() ? block.moe()->correction_bias() : -1);
  if (mtp_) {
    const auto& moe = mtp_->block().moe();
    ids.push_back(moe ? moe->correction_bias() : -1);
  }
  return ids;
}

}  // namespace baleen
