// One pipeline part of the network: consecutive blocks, with the embedding in the first part and
// final norm, head and MTP module in the last.
//
// One microbatch goes through Forward, BackwardInput, BackwardWeight; Saved is all that is kept in
// between. What goes from part to part is the residual stream of the rank's own rows [R, D].
// Forward and BackwardInput can be taken step by step, so that two microbatches interleave: while
// one exchanges rows with other ranks, the other computes.
#pragma once

#include <optional>
#include <vector>

#include "trainer/model/block.h"
#include "trainer/model/mtp.h"
#include "trainer/model/token_ends.h"

namespace baleen {

// Which layers a part holds: [begin, end), and the ends of the network.
struct PartLayers {
  int part = 0;
  int64_t begin = 0, end = 0;
  bool first = false;
  bool last = false;
};

class ModelPart {
 public:
  ModelPart(const ModelConfig& config, const PartLayers& layers, bool use_indexer,
            const Placement& placement, ParameterStore& store);

  struct Saved {
    std::vector<Block::Saved> blocks;
    // Last part:
    Tensor out, out_rstd;  // last block's output
    Tensor hidden;         // after the final norm
    Tensor dhidden;        // its gradient from the head (train)
    Tensor lm_loss_R;      // 0 where the target is -1
    Mtp::Saved mtp;
    Tensor dmtp_hidden;  // gradient of the MTP's normalised output from the head
    Tensor mtp_loss_R;
    Tensor dnorm, dmtp_embedding;  // for BackwardWeight
    Tensor dembedding;             // first part, for BackwardWeight
    // Between steps: what flows forward, respectively back, and how many steps are done.
    Tensor flow;
    int step = 0;
  };

  // Losses are added to `stats`. `x` is empty in the first part, the result in the last. With
  // pass.train, the head's parameter gradients are added here already.
  Tensor Forward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                 const Tensor& x, StepStats& stats, Saved& saved) const;
  // `dy` is empty in the last part, the result in the first. With options.weights_with_input the
  // blocks' weight gradients too, and `ready` is told of them; the rest is left to BackwardWeight.
  Tensor BackwardInput(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                       const Tensor& dy, StepStats& stats, Saved& saved,
                       const GradientsReady& ready = nullptr) const;
  // `ready` is given with the step's last microbatch of this part; embeddings are not reported.
  void BackwardWeight(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                      StepStats& stats, Saved& saved, const GradientsReady& ready = nullptr) const;

  // The same in steps: Begin, then Step until it returns false, then take saved.flow.
  static void Begin(const Tensor& x, Saved& saved);
  bool ForwardStep(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                   StepStats& stats, Saved& saved) const;
  bool BackwardStep(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                    Saved& saved) const;
  // After a step: with options.weights_with_input, the weight gradients of the block that it ended.
  void FormBlockWeights(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                        StepStats& stats, Saved& saved,
                        const GradientsReady& ready = nullptr) const;

  // The dense warm-up of the part's indexers: a forward pass without head; each block makes its
  // indexer's gradients, and no activation outlives its block.
  Tensor WarmUp(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                const Tensor& x, StepStats& stats, const GradientsReady& ready = nullptr) const;

  // Whole logits [R, W] of the model and, if `mtp`, of the MTP module, where the network is one
  // part (tests and evaluation of small models).
  struct Logits {
    Tensor lm_RW, mtp_RW;
  };
  Logits ForwardLogits(const ModelContext& model, const Batch& batch, bool mtp) const;

  const PartLayers& layers() const { return layers_; }
  // (row of StepStats, parameter id) of every correction bias.
  std::vector<std::pair<int64_t, int>> correction_biases() const;

 private:
  int num_steps() const { return 2 + Block::kPhases * static_cast<int>(blocks_.size()); }
  void BlockWeight(size_t index, const ModelContext& model, const Batch& batch,
                   const PassOptions& pass, StepStats& stats, Saved& saved,
                   const GradientsReady& ready) const;
  void FinishForward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                     StepStats& stats, Saved& saved) const;
  void BeginBackward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                     Saved& saved) const;

  PartLayers layers_;
  std::optional<Embedding> embedding_;  // first part; and the last, for the MTP module
  std::vector<Block> blocks_;
  std::vector<int> first_id_;  // of each block's parameters, then of the final norm, head and MTP
  int end_id_ = 0;
  int norm_ = -1;
  std::optional<Head> head_;
  std::optional<Mtp> mtp_;
};

}  // namespace baleen
