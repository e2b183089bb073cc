// The lightning indexer of one block (spec 1.2-1.6): scores every key for every query, keeps the
// best K, and learns from the main attention by KL. Its inputs are constants to it (stop-gradient
// at x and qr): it has no input gradient, and the whole backward belongs to the weight phase.
//
//   q^I = fp8(hadamard(rope(W_qb qr)))   k^I = fp8(hadamard(rope(layernorm(W_k x))))   w = c_I W_w
//   x I[t, s] = sum_j w[t, j] relu(q^I[t, j] . k^I[s]);   ids = top-k of I;   loss = KL(target ||
//   softmax I)
// Legend: T tokens, S keys, I index heads, J index_head_dim = [rope | nope], K selected keys.
#pragma once

#include "kernels/ops/indexer_loss.h"
#include "kernels/ops/topk_select.h"
#include "trainer/model/model_context.h"

namespace baleen {

class Indexer {
 public:
  Indexer(const ModelConfig& config, const std::string& prefix, ParameterStore& store);

  struct Saved {
    Tensor x, qr;                  // detached inputs
    Tensor q_TIJ, k_SJ, w_TI;      // what the scores are made of
    Tensor k_pre, k_mean, k_rstd;  // LayerNorm's input and statistics
  };

  void Forward(const ModelContext& model, const Batch& batch, const Tensor& x, const Tensor& qr,
               Saved& saved) const;
  // The selected keys of every row, in chunks of query rows.
  TopkResult Select(const ModelContext& model, const Batch& batch, const Saved& saved) const;

  // Loss per row [T] and all gradients; grad_scale is the weight of a row's KL in the step's loss.
  Tensor SparseLossBackward(const ModelContext& model, const Batch& batch, const Tensor& ids_TK,
                            const Tensor& target_TK, double grad_scale, const Saved& saved) const;
  Tensor DenseLossBackward(const ModelContext& model, const Batch& batch, const DenseTarget& target,
                           double grad_scale, const Saved& saved) const;

 private:
  // From the gradients of q^I, k^I, w to those of the weights.
  void BackwardWeight(const ModelContext& model, const Batch& batch, IndexerLossResult& loss,
                      Tensor dk_SJ, const Saved& saved) const;
  Tensor Transform(const ModelContext& model, const Batch& batch, const Tensor& x) const;
  Tensor TransformBackward(const ModelContext& model, const Batch& batch, const Tensor& dy) const;

  int64_t heads_, width_, rope_;
  int wq_b_, wk_, k_norm_weight_, k_norm_bias_, weights_proj_;
};

}  // namespace baleen
