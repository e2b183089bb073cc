// One transformer block: pre-norm residual attention, then pre-norm residual MLP or MoE.
//
//   h = x + attention(norm(x));   y = h + mlp(norm(h))
// Cut in four phases (attention, dispatch, experts, combine), each with forward, input gradient and
// weight gradient, so that one host thread can interleave two microbatches. The indexer's loss
// lives here: in the dense warm-up it is formed right in the forward pass, in the sparse stage in
// the weight phase of the backward.
#pragma once

#include <optional>

#include "trainer/model/indexer.h"
#include "trainer/model/mla.h"
#include "trainer/model/moe.h"
#include "trainer/model/step_stats.h"

namespace baleen {

class Block {
 public:
  // `layer` is the row of this block in StepStats; `prefix` e.g. "model.layers.3".
  Block(const ModelConfig& config, const std::string& prefix, int64_t layer, bool moe,
        bool use_indexer, ParameterStore& store);

  struct Saved {
    Tensor x, x_rstd;  // block input
    Mla::Saved mla;
    Indexer::Saved indexer;
    Tensor ids_TK;
    Tensor h, h_rstd, h_norm;  // after attention
    Mlp::Saved mlp;
    Moe::Saved moe;
    Tensor mlp_out;           // dense MLP or shared expert
    Tensor dx_norm, dh_norm;  // gradients of the norms' outputs
    bool complete = false;    // false after a full recompute dropped everything but x and ids
  };

  Tensor Forward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                 const Tensor& x, StepStats& stats, Saved& saved) const;
  Tensor BackwardInput(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                       const Tensor& dy, Saved& saved) const;
  void BackwardWeight(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                      StepStats& stats, Saved& saved) const;

  // The dense warm-up of this block's indexer and nothing behind it (the MTP module has no reader
  // of its output).
  void WarmIndexer(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                   const Tensor& x, StepStats& stats) const;

  const std::optional<Moe>& moe() const { return moe_; }
  int64_t layer() const { return layer_; }

 private:
  void ForwardAttention(const ModelContext& model, const Batch& batch, Saved& saved) const;
  void ForwardMlp(const ModelContext& model, const Batch& batch, bool balance, Saved& saved) const;
  void Normalise(const ModelContext& model, const Batch& batch, Saved& saved) const;
  void SelectKeys(const ModelContext& model, const Batch& batch, StepStats& stats,
                  Saved& saved) const;
  void WarmUp(const ModelContext& model, const Batch& batch, const PassOptions& pass,
              StepStats& stats, Saved& saved) const;
  void Measure(const ModelContext& model, const Batch& batch, const PassOptions& pass,
               StepStats& stats, const Saved& saved) const;
  void CountTokens(const ModelContext& model, const Batch& batch, StepStats& stats,
                   const Saved& saved) const;
  void Drop(const ModelContext& model, Saved& saved) const;

  int64_t layer_;
  int input_layernorm_, post_attention_layernorm_;
  Mla mla_;
  std::optional<Indexer> indexer_;
  std::optional<Mlp> mlp_;
  std::optional<Moe> moe_;
};

}  // namespace baleen
