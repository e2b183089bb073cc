// The MTP module, "layer N" of the checkpoint (DeepSeek-V3 report 2.2): predicts the token after
// the next.
//
//   h' = eh_proj [ enorm(Emb(t_{i+1})) ; hnorm(h_i) ]     (embedding first; h_i after the model's
//   final norm) then a whole block with its own indexer, shared_head.norm, and the model's head.
//   Embedding and head are shared.
#pragma once

#include "trainer/model/block.h"

namespace baleen {

class Mtp {
 public:
  Mtp(const ModelConfig& config, bool use_indexer, const Placement& placement,
      ParameterStore& store);

  struct Saved {
    Tensor embedding, embedding_rstd;  // rows of the shared table [R, D]
    Tensor hidden, hidden_rstd;        // the model's normalised output
    Tensor joined;                     // [R, 2D], input of eh_proj
    Block::Saved block;
    Tensor out, out_rstd;  // block output
    Tensor dnorm_out, dprojected, djoined;
  };

  // Input of the block.
  Tensor Join(const ModelContext& model, const Tensor& embedding, const Tensor& hidden,
              Saved& saved) const;
  // Normalised output, ready for the head.
  Tensor Forward(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                 const Tensor& embedding, const Tensor& hidden, StepStats& stats,
                 Saved& saved) const;
  struct Gradients {
    Tensor dembedding, dhidden;
  };
  Gradients BackwardInput(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                          const Tensor& dnorm_out, Saved& saved) const;
  void BackwardWeight(const ModelContext& model, const Batch& batch, const PassOptions& pass,
                      StepStats& stats, Saved& saved) const;

  const Block& block() const { return block_; }

 private:
  int enorm_, hnorm_, eh_proj_, shared_head_norm_;
  Block block_;
};

}  // namespace baleen
