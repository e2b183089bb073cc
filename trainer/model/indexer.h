// The lightning indexer of one block (DeepSeek-V3.2 report 2.1): scores every key for every query,
// keeps the best K, and learns from the main attention by KL. Its inputs are constants to it
// (stop-gradient at x and qr): it has no input gradient, and the whole backward belongs to the
// weight phase.
//
//   q^I = fp8(hadamard(rope(W_qb qr)))   k^I = fp8(hadamard(rope(layernorm(W_k x))))   w = c_I W_w
//   x I[t, s] = sum_j w[t, j] relu(q^I[t, j] . k^I[s]);   ids = top-k of I;   loss = KL(target ||
//   softmax I)
// With FP8, scores of shapes that have a kernel are products of the E4M3 codes; the loss and its
// gradients work on the rounded values everywhere.
// Over ranks: q^I, w and the loss are of the own rows, k^I is gathered over cp x tp and its
// gradient, a partial sum over rows, reduce-scattered. Every row is scored once, by one rank.
// Legend: R own rows, T keys (batch.h), I index heads, J index_head_dim = [rope | nope], K selected
// keys.
#pragma once

#include "kernels/ops/indexer/fp8_simulate.h"
#include "kernels/ops/indexer/indexer_loss.h"
#include "kernels/ops/indexer/topk_select.h"
#include "trainer/model/model_context.h"

namespace baleen {

class Indexer {
 public:
  Indexer(const ModelConfig& config, const std::string& prefix, ParameterStore& store);

  struct Saved {
    Tensor x_RD, qr_R;             // detached inputs
    Tensor q_RIJ, k_RJ, w_RI;      // what the scores are made of
    Tensor k_TJ;                   // gathered
    Tensor k_pre, k_mean, k_rstd;  // LayerNorm's input and statistics
  };

  void Forward(const ModelContext& model, const Batch& batch, const Tensor& x_RD,
               const Tensor& qr_R, Saved& saved) const;
  // The selected keys of every row, in chunks of query rows, and if asked for their scores.
  TopkResult Select(const ModelContext& model, const Batch& batch, const Saved& saved,
                    ChosenScores chosen) const;

  // Loss per row [R] and all gradients; grad_scale is the weight of a row's KL in the step's loss.
  // target_RK: probabilities summed over all heads of the model. scores_RK: of the ids, or empty.
  Tensor SparseLossBackward(const ModelContext& model, const Batch& batch, const Tensor& ids_RK,
                            const Tensor& scores_RK, const Tensor& target_RK, double grad_scale,
                            Saved& saved) const;
  // The rows of `targets` in consecutive chunks (all own rows together); each holds all heads.
  Tensor DenseLossBackward(const ModelContext& model, const Batch& batch,
                           const std::vector<DenseTarget>& targets, double grad_scale,
                           Saved& saved) const;
  // Frees what the backward gathers again (selective recompute).
  void DropGathered(Saved& saved) const { saved.k_TJ = Tensor(); }

 private:
  void GatherIndexKeys(const ModelContext& model, const Batch& batch, Saved& saved) const;
  // From the gradients of q^I, k^I (of all keys, a partial sum), w to those of the weights.
  void BackwardWeight(const ModelContext& model, const Batch& batch, const IndexerLossResult& loss,
                      const Tensor& dk_TJ, const Saved& saved) const;
  Tensor Scores(const ModelContext& model, const Saved& saved, const Fp8Codes& keys,
                const KeyWindows& windows, int64_t begin, int64_t end) const;
  Tensor Transform(const ModelContext& model, const Batch& batch, const Tensor& x) const;
  Tensor TransformBackward(const ModelContext& model, const Batch& batch, const Tensor& dy) const;

  std::string label_;
  int64_t heads_, width_, rope_;
  int wq_b_, wk_, k_norm_weight_, k_norm_bias_, weights_proj_;
};

}  // namespace baleen
