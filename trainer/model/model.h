// The whole network: embedding, blocks, final norm, head, and the MTP module behind them.
//
// One microbatch goes through Forward, BackwardInput, BackwardWeight; Saved is all it keeps in
// between. The head's loss and gradient are formed together in Forward, a chunk of rows at a time,
// so that no logits outlive their chunk. Legend: T rows of the microbatch, D hidden, W vocabulary.
#pragma once

#include <optional>
#include <vector>

#include "trainer/model/block.h"
#include "trainer/model/mtp.h"

namespace baleen {

class Model {
 public:
  Model(const ModelConfig& config, bool use_indexer, ParameterStore& store);

  struct Saved {
    std::vector<Block::Saved> blocks;
    Tensor out, out_rstd;  // last block's output
    Tensor hidden;         // after the final norm
    Tensor dhidden;        // its gradient from the head (train)
    Tensor lm_loss_T;      // per row, 0 where the target is -1
    Mtp::Saved mtp;
    Tensor dmtp_hidden;  // gradient of the MTP's normalised output from the head
    Tensor mtp_loss_T;
    Tensor dnorm, dembedding, dmtp_embedding;  // for BackwardWeight
  };

  // Losses are added to `stats`. With pass.train, the head's parameter gradients are added here
  // already.
  void Forward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
               StepStats& stats, Saved& saved) const;
  void BackwardInput(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                     Saved& saved) const;
  void BackwardWeight(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                      StepStats& stats, Saved& saved) const;

  // The dense warm-up of all indexers: a forward pass without head; each block makes its indexer's
  // gradients.
  void WarmUp(const ModelContext& model, const Batch& batch, const PassOptions& pass,
              StepStats& stats) const;

  // Whole logits [T, W] of the model and, if `mtp`, of the MTP module (tests and evaluation of
  // small models).
  struct Logits {
    Tensor lm_TW, mtp_TW;
  };
  Logits ForwardLogits(const ModelContext& model, const Batch& batch, bool mtp) const;

  // Correction biases by row of StepStats, -1 where the layer has none.
  std::vector<int> correction_biases() const;
  bool has_mtp() const { return mtp_.has_value(); }

 private:
  Tensor RunBlocks(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                   StepStats& stats, std::vector<Block::Saved>& saved) const;
  // Loss rows and, with pass.train, d(scale * loss)/d hidden; the head's own gradient is added to
  // lm_head.
  struct HeadResult {
    Tensor loss_T, dhidden;
  };
  HeadResult Head(const ModelContext& model, const Tensor& hidden, const Tensor& targets_T,
                  double scale, bool train) const;

  int64_t layers_;
  int embed_tokens_, norm_, lm_head_;
  std::vector<Block> blocks_;
  std::optional<Mtp> mtp_;
};

}  // namespace baleen
