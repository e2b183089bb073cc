// DeepSeekMoE (spec 4.2): every token meets the shared expert and its A best routed ones.
//
//   y = shared(x) + sum_a weight_a expert_{id_a}(x);   ids and weights from the gate
//   (kernels/ops/router.h)
// The work is cut in the phases that a pipeline can interleave with another microbatch: Dispatch
// (gate, rows to experts), Experts (grouped GEMMs and the shared expert), Combine (rows back,
// weighted). Legend: T tokens, E experts, A experts per token, N = T * A rows at the experts, D
// hidden, F expert hidden.
#pragma once

#include <optional>

#include "kernels/ops/permute.h"
#include "kernels/ops/router.h"
#include "trainer/model/mlp.h"
#include "trainer/model/model_context.h"

namespace baleen {

class Moe {
 public:
  // Declares `prefix`.mlp.{gate, experts.*, shared_experts}.
  Moe(const ModelConfig& config, const std::string& prefix, ParameterStore& store);

  struct Saved {
    Tensor x;  // normalised input [T, D]
    RouterResult route;
    Permutation permutation;
    Tensor rows_ND;           // x in expert order
    Tensor gate, up, hidden;  // [N, F]
    Tensor expert_out_ND;
    Mlp::Saved shared;
    BalanceStats balance;  // empty when the balance loss is off
    // for BackwardWeight
    Tensor dy, dexpert_out, dgate, dup, dlogits;
  };

  void Dispatch(const ModelContext& model, const Batch& batch, const Tensor& x, bool balance_loss,
                Saved& saved) const;
  // Returns the shared expert's output (zeros-free: empty without shared experts).
  Tensor Experts(const ModelContext& model, Saved& saved) const;
  Tensor Combine(const ModelContext& model, const Tensor& shared_out, Saved& saved) const;

  // The mirror: gradients of Combine, Experts and Dispatch; the last returns dx. `balance_scale` is
  // the weight of one sequence's balance loss in the step's loss.
  void BackwardCombine(const ModelContext& model, const Tensor& dy, Saved& saved) const;
  Tensor BackwardExperts(const ModelContext& model, Saved& saved) const;
  Tensor BackwardDispatch(const ModelContext& model, const Batch& batch,
                          const Tensor& drows_and_shared, double balance_scale, Saved& saved) const;
  void BackwardWeight(const ModelContext& model, Saved& saved) const;
  void DropExpanded(Saved& saved) const;

  // Sum over the microbatch's sequences of sum_i f_i P_i (without alpha).
  double BalanceLoss(const ModelContext& model, const Batch& batch, const Saved& saved) const;
  int correction_bias() const { return correction_bias_; }

 private:
  RouterParams Params(const ModelConfig& config) const;
  Tensor BalanceCoefficient(const ModelContext& model, const Batch& batch, double balance_scale,
                            const Saved& saved) const;
  void Expand(const ModelContext& model, Saved& saved) const;

  int num_experts_;
  int gate_, correction_bias_;
  int first_gate_proj_, first_up_proj_,
      first_down_proj_;  // of num_experts_ stacked parameters each
  std::optional<Mlp> shared_;
};

}  // namespace baleen
