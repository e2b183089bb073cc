// One transformer block: pre-norm residual attention, then pre-norm residual MLP or MoE.
//
//   h = x + attention(norm(x));   y = h + mlp(norm(h))
// Cut in four phases (attention, dispatch, experts, combine), each with forward, input gradient and
// weight gradient, so that one host thread can interleave two microbatches. The indexer's loss
// lives here: in the dense warm-up it is formed right in the forward pass, in the sparse stage in
// the weight phase of the backward. All tensors are of the rank's own rows R (batch.h).
#pragma once

#include <functional>
#include <optional>

#include "trainer/model/indexer.h"
#include "trainer/model/mla.h"
#include "trainer/model/moe.h"
#include "trainer/model/step_stats.h"

namespace baleen {

// Parameters first .. end - 1 (ids) have got their last gradient of the step.
using GradientsReady = std::function<void(int first, int end)>;

class Block {
 public:
  // `layer` is the row of this block in StepStats; `prefix` e.g. "model.layers.3".
  Block(const ModelConfig& config, const std::string& prefix, int64_t layer, bool moe,
        bool use_indexer, const Placement& placement, ParameterStore& store);

  struct Saved {
    Tensor x, x_rstd;  // block input
    Mla::Saved mla;
    Indexer::Saved indexer;
    Tensor ids_RK;
    Tensor scores_RK;          // of the ids, by the indexer; empty where they are not kept
    Tensor h, h_rstd, h_norm;  // after attention
    Mlp::Saved mlp;
    Moe::Saved moe;
    Tensor mlp_out;           // dense MLP, or the experts' combined output
    Tensor shared_out;        // between experts and combine
    Tensor dx_norm, dh_norm;  // gradients of the norms' outputs
    Tensor dy, dx;            // between the backward's phases
    bool complete = false;    // false after a full recompute dropped all but x, ids and, sparse, h
  };

  Tensor Forward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                 const Tensor& x, StepStats& stats, Saved& saved) const;
  Tensor BackwardInput(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                       const Tensor& dy, Saved& saved) const;
  // The MLP's or experts' gradients are formed first, and told: they travel to their owners while
  // the attention's are formed.
  void BackwardWeight(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                      StepStats& stats, Saved& saved, const GradientsReady& ready = nullptr) const;

  // The same in steps 0 .. kPhases - 1 that leave room for another microbatch's between them.
  // Forward: x is put into saved.x before, the last returns y. Backward: dy is put into saved.dy,
  // the last returns dx; its steps are the mirror (combine first).
  static constexpr int kPhases = 4;
  Tensor ForwardPhase(int phase, const ModelContext& model, const Batch& batch,
                      const PassOptions& pass, StepStats& stats, Saved& saved) const;
  Tensor BackwardPhase(int phase, const ModelContext& model, const Batch& batch,
                       const PassOptions& pass, Saved& saved) const;

  // The dense warm-up of this block's indexer and nothing behind it (the MTP module has no reader
  // of its output).
  void WarmIndexer(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                   const Tensor& x, StepStats& stats) const;

  const std::optional<Moe>& moe() const { return moe_; }
  int64_t layer() const { return layer_; }

 private:
  // Attention, dispatch, experts, combine: what forward and recomputation share.
  void Attend(const ModelContext& model, const Batch& batch, Saved& saved) const;
  void Dispatch(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                Saved& saved) const;
  void RunExperts(const ModelContext& model, Saved& saved) const;
  void Combine(const ModelContext& model, Saved& saved) const;
  void Recompute(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                 Saved& saved) const;
  void Normalise(const ModelContext& model, const Batch& batch, Saved& saved) const;
  void SelectKeys(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                  StepStats& stats, Saved& saved) const;
  void WarmUp(const ModelContext& model, const Batch& batch, const PassOptions& pass,
              StepStats& stats, Saved& saved) const;
  void Measure(const ModelContext& model, const Batch& batch, const PassOptions& pass,
               StepStats& stats, const Saved& saved) const;
  void CountTokens(const ModelContext& model, const Batch& batch, StepStats& stats,
                   const Saved& saved) const;
  void Drop(const ModelContext& model, Saved& saved) const;

  int64_t layer_;
  // Ids: norms, attention and indexer from input_layernorm_ on, then MLP or experts.
  int input_layernorm_, post_attention_layernorm_;
  int mlp_begin_ = 0, mlp_end_ = 0;
  Mla mla_;
  std::optional<Indexer> indexer_;
  std::optional<Mlp> mlp_;
  std::optional<Moe> moe_;
};

}  // namespace baleen
