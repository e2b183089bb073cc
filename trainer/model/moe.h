// DeepSeekMoE (DeepSeek-V3 report 2.1.2): every token meets the shared expert and its A best routed
// ones.
//
//   y = shared(x) + sum_a weight_a expert_{id_a}(x);   ids and weights from the gate
//   (kernels/ops/moe/router.h)
// The weight is applied inside the expert, before its down-projection
// (kernels/ops/moe/weighted_swiglu.h): what the experts give out is only summed, and not kept.
// The work is cut in the phases that a pipeline can interleave with another microbatch: Dispatch
// (gate, rows to experts), Experts (the shared expert, grouped GEMMs), Combine (rows back, summed).
// What a phase sends arrives in the next one, so it travels beside whatever is computed between:
// the other microbatch, and the shared expert, which comes first where rows travel. Experts lie on
// the ranks of ep; rows come and go by parallel/expert_exchange.h. Where the rows to be held at
// once are bounded and exceed the bound, the exchange comes in several rounds: then Experts and
// BackwardExperts run all of them, whole; nothing of a round is kept for the backward, which sends
// the rows again, and the experts' weight gradients are formed there and not in BackwardWeight.
// Legend: R own tokens, E experts of all ranks, A experts per token, N rows at the rank's experts,
// D hidden, F expert hidden, B sequences.
#pragma once

#include <optional>

#include "kernels/ops/moe/router.h"
#include "parallel/expert_exchange.h"
#include "trainer/model/mlp.h"
#include "trainer/model/model_context.h"

namespace baleen {

class Moe {
 public:
  // Declares `prefix`.mlp.{gate, experts.*, shared_experts}: of the experts those of this rank.
  Moe(const ModelConfig& config, const std::string& prefix, const Placement& placement,
      ParameterStore& store);

  // What the experts of this rank make of the rows of one round.
  struct ExpertRows {
    Tensor rows_ND;              // x, sorted by expert
    Tensor weights_N;            // of the rows
    Tensor gate, up, hidden;     // [N, F]; hidden: weighted
    Tensor dout_ND, dgate, dup;  // for the weights' gradients
  };
  struct Saved {
    Tensor x_RD;  // normalised input
    RouterResult route;
    ExpertPlan plan;
    ExpertRows experts;  // of the only round; empty with several
    // From one phase to the next, with one round.
    WeightedMessage sent;     // to experts; back: their gradients
    ExpertMessage sent_home;  // experts' results; back: dy
    Tensor y_RD;  // with several rounds: the routed experts' sum, from Experts to Combine
    Mlp::Saved shared;
    BalanceStats balance;  // of whole sequences; empty when the balance loss is off
    Tensor dy_RD, dweights_RA;
    Tensor dx_RD;       // with several rounds, from BackwardExperts to BackwardDispatch
    Tensor dshared_RD;  // where rows travel: of the shared expert's input
    Tensor dlogits_RE;  // for BackwardWeight
  };

  void Dispatch(const ModelContext& model, const Batch& batch, const Tensor& x_RD,
                bool balance_loss, Saved& saved) const;
  // Returns the shared expert's output (empty without shared experts).
  Tensor Experts(const ModelContext& model, Saved& saved) const;
  Tensor Combine(const ModelContext& model, const Tensor& shared_out, Saved& saved) const;

  // The mirror: gradients of Combine, Experts and Dispatch; the last returns dx. `balance_scale` is
  // the weight of one sequence's balance loss in the step's loss.
  void BackwardCombine(const ModelContext& model, const Tensor& dy_RD, Saved& saved) const;
  void BackwardExperts(const ModelContext& model, Saved& saved) const;
  Tensor BackwardDispatch(const ModelContext& model, const Batch& batch, double balance_scale,
                          Saved& saved) const;
  void BackwardWeight(const ModelContext& model, Saved& saved) const;
  void DropExpanded(Saved& saved) const;

  // Adds to sum_1 (kF64) the sum over the microbatch's sequences of sum_i f_i P_i (without alpha),
  // on the first of the ranks that share the sequences: a sum over all ranks counts it once.
  void AddBalanceLoss(const ModelContext& model, const Batch& batch, const Saved& saved,
                      const Tensor& sum_1) const;
  int correction_bias() const { return correction_bias_; }

 private:
  RouterParams Params(const ModelConfig& config) const;
  Tensor BalanceCoefficient(const ModelContext& model, const Batch& batch, double balance_scale,
                            const Saved& saved) const;
  void Expand(const ModelContext& model, const ExpertRound& round, WeightedRows arrived,
              ExpertRows& rows) const;
  Tensor ProjectDown(const ModelContext& model, const ExpertRound& round,
                     const ExpertRows& rows) const;
  WeightedRows ExpertsBackwardInput(const ModelContext& model, const ExpertRound& round,
                                    ExpertRows& rows) const;
  void ExpertsBackwardWeight(const ModelContext& model, const ExpertRound& round,
                             const ExpertRows& rows) const;
  Tensor ForwardRounds(const ModelContext& model, const Saved& saved) const;
  Tensor BackwardRounds(const ModelContext& model, Saved& saved) const;

  std::string label_;
  int num_experts_;    // of all ranks
  int local_experts_;  // of this one
  int gate_, correction_bias_;
  // Of local_experts_ stacked parameters each.
  int first_gate_proj_, first_up_proj_, first_down_proj_;
  std::optional<Mlp> shared_;
};

}  // namespace baleen
