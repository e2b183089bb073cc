// The two ends of the network, cut over the vocabulary: the embedding table, and the head with its
// cross-entropy.
//
//   Embedding   each rank of tp looks the group's tokens up in its part of the table; the rows,
//   zero
//               where another rank has the token, are summed and scattered to their owners
//   Head        each rank forms the logits of the group's rows for its part of the vocabulary, a
//               chunk of rows at a time; ranks exchange three numbers a row (cross_entropy.h); loss
//               and gradient are formed together, so that no logits outlive their chunk
// Legend: R own rows, G rows of the tp group (batch.h), W vocabulary, D hidden.
#pragma once

#include "trainer/model/model_context.h"

namespace baleen {

class Embedding {
 public:
  // Declares model.embed_tokens, unless another part of this rank has done so: copies on one rank
  // are stored once.
  Embedding(const ModelConfig& config, const Placement& placement, ParameterStore& store);

  Tensor Forward(const ModelContext& model, const Tensor& tokens_G) const;  // [R, D]
  void BackwardWeight(const ModelContext& model, const Tensor& tokens_G, const Tensor& dy_RD) const;

 private:
  int table_;
  int64_t vocab_begin_;
};

class Head {
 public:
  Head(const ModelConfig& config, const Placement& placement, ParameterStore& store);

  struct Result {
    Tensor loss_R;      // 0 where the target is -1
    Tensor dhidden_RD;  // d (scale * sum of losses) / d hidden; empty unless `train`
  };
  // With `train` the gradient of lm_head is added here already.
  Result Loss(const ModelContext& model, const Tensor& hidden_RD, const Tensor& targets_G,
              double scale, bool train) const;
  // Whole logits [R, W] where the vocabulary is not cut (tests, evaluation of small models).
  Tensor Logits(const ModelContext& model, const Tensor& hidden_RD) const;

 private:
  int lm_head_;
  int64_t vocab_begin_;
};

}  // namespace baleen
