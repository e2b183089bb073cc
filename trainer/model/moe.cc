#include "trainer/model/moe.h"

#include "kernels/ops/elementwise.h"
#include "kernels/ops/grouped_matmul.h"
#include "kernels/ops/matmul.h"
#include "kernels/ops/swiglu.h"

namespace baleen {

Moe::Moe(const ModelConfig& config, const std::string& prefix, ParameterStore& store)
    : num_experts_(static_cast<int>(config.n_routed_experts)) {
  const std::string mlp = prefix + ".mlp.";
  const int64_t hidden = config.hidden_size, inner = config.moe_intermediate_size;
  gate_ = store.Declare(mlp + "gate.weight", {num_experts_, hidden}, ParameterGroup::kMain);
  correction_bias_ =
      store.Declare(mlp + "gate.e_score_correction_bias", {num_experts_}, ParameterGroup::kBuffer);
  // One projection of all experts is one operand: declared one behind the other.
  const auto declare_stack = [&](const char* projection, Shape shape) {
    int first = -1;
    for (int e = 0; e < num_experts_; ++e) {
      const int id = store.Declare(absl::StrCat(mlp, "experts.", e, ".", projection, ".weight"),
                                   shape, ParameterGroup::kExpert, /*stacked=*/e > 0);
      if (e == 0) first = id;
    }
    return first;
  };
  first_gate_proj_ = declare_stack("gate_proj", {inner, hidden});
  first_up_proj_ = declare_stack("up_proj", {inner, hidden});
  first_down_proj_ = declare_stack("down_proj", {hidden, inner});
  if (config.n_shared_experts > 0) {
    shared_.emplace(hidden, inner * config.n_shared_experts, mlp + "shared_experts", store);
  }
}

RouterParams Moe::Params(const ModelConfig& config) const {
  return {.n_group = config.n_group,
          .topk_group = config.topk_group,
          .num_experts_per_tok = config.num_experts_per_tok,
          .routed_scaling_factor = config.routed_scaling_factor,
          .norm_topk_prob = config.norm_topk_prob};
}

void Moe::Dispatch(const ModelContext& model, const Batch& batch, const Tensor& x,
                   bool balance_loss, Saved& saved) const {
  const Context& context = model.context;
  saved.x = x;
  const Tensor logits = Linear(context, x, model.parameters.value(gate_));
  saved.route =
      Route(context, logits, model.parameters.value(correction_bias_), Params(model.config));
  if (balance_loss) {
    saved.balance = BalanceLocalStats(context, saved.route.scores_TE, batch.sequence_T,
                                      batch.num_sequences, model.config.num_experts_per_tok);
  }
  saved.permutation = BuildPermutation(context, saved.route.expert_ids_TA, 0, num_experts_);
  saved.rows_ND = GatherRows(context, x, saved.permutation.source_row_N);
}

void Moe::Expand(const ModelContext& model, Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  if (saved.rows_ND.empty())
    saved.rows_ND = GatherRows(context, saved.x, saved.permutation.source_row_N);
  const Tensor& offsets = saved.permutation.offsets_L1;
  saved.gate = GroupedLinear(context, saved.rows_ND,
                             weights.StackedValue(first_gate_proj_, num_experts_), offsets);
  saved.up = GroupedLinear(context, saved.rows_ND,
                           weights.StackedValue(first_up_proj_, num_experts_), offsets);
  saved.hidden = Swiglu(context, saved.gate, saved.up);
  saved.expert_out_ND = GroupedLinear(
      context, saved.hidden, weights.StackedValue(first_down_proj_, num_experts_), offsets);
}

Tensor Moe::Experts(const ModelContext& model, Saved& saved) const {
  Expand(model, saved);
  return shared_ ? shared_->Forward(model, saved.x, saved.shared) : Tensor();
}

Tensor Moe::Combine(const ModelContext& model, const Tensor& shared_out, Saved& saved) const {
  Tensor y = CombineRows(model.context, saved.expert_out_ND, saved.permutation.row_of_slot_TA,
                         saved.route.weights_TA);
  if (shared_) AddInPlace(model.context, y, shared_out);
  return y;
}

void Moe::DropExpanded(Saved& saved) const {
  saved.rows_ND = saved.gate = saved.up = saved.hidden = saved.expert_out_ND = Tensor();
  if (shared_) shared_->DropExpanded(saved.shared);
}

void Moe::BackwardCombine(const ModelContext& model, const Tensor& dy, Saved& saved) const {
  if (saved.expert_out_ND.empty()) Expand(model, saved);
  saved.dy = dy;
  const CombineGradients gradients =
      CombineRowsBackward(model.context, dy, saved.expert_out_ND, saved.permutation.row_of_slot_TA,
                          saved.route.weights_TA);
  saved.dexpert_out = gradients.dx_ND;
  saved.dlogits = gradients.dweights_TA;  // becomes the logits' gradient in BackwardDispatch
}

Tensor Moe::BackwardExperts(const ModelContext& model, Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  const Tensor& offsets = saved.permutation.offsets_L1;
  const Tensor dhidden = GroupedLinearBackwardInput(
      context, saved.dexpert_out, weights.StackedValue(first_down_proj_, num_experts_), offsets);
  const SwigluGradients gradients = SwigluBackward(context, dhidden, saved.gate, saved.up);
  saved.dgate = gradients.dgate;
  saved.dup = gradients.dup;
  const Tensor drows = GroupedLinearBackwardInput(
      context, saved.dgate, weights.StackedValue(first_gate_proj_, num_experts_), offsets);
  AddInPlace(context, drows,
             GroupedLinearBackwardInput(
                 context, saved.dup, weights.StackedValue(first_up_proj_, num_experts_), offsets));
  return drows;
}

Tensor Moe::BackwardDispatch(const ModelContext& model, const Batch& batch, const Tensor& drows,
                             double balance_scale, Saved& saved) const {
  const Context& context = model.context;
  const Tensor dx = GatherRowsBackward(context, drows, saved.permutation.row_of_slot_TA);
  if (shared_) AddInPlace(context, dx, shared_->BackwardInput(model, saved.dy, saved.shared));
  Tensor dscores;
  if (!saved.balance.counts_BE.empty() && balance_scale != 0) {
    dscores = BalanceBackward(context, saved.route.scores_TE, batch.sequence_T,
                              BalanceCoefficient(model, batch, balance_scale, saved));
  }
  saved.dlogits = RouteBackward(context, saved.dlogits, dscores, saved.route, Params(model.config));
  AddInPlace(context, dx,
             LinearBackwardInput(context, saved.dlogits, model.parameters.value(gate_)));
  return dx;
}

void Moe::BackwardWeight(const ModelContext& model, Saved& saved) const {
  const Context& context = model.context;
  const ParameterStore& weights = model.parameters;
  const Tensor& offsets = saved.permutation.offsets_L1;
  GroupedLinearBackwardWeight(context, saved.dexpert_out, saved.hidden, offsets,
                              weights.StackedGrad(first_down_proj_, num_experts_));
  GroupedLinearBackwardWeight(context, saved.dgate, saved.rows_ND, offsets,
                              weights.StackedGrad(first_gate_proj_, num_experts_));
  GroupedLinearBackwardWeight(context, saved.dup, saved.rows_ND, offsets,
                              weights.StackedGrad(first_up_proj_, num_experts_));
  LinearBackwardWeight(context, saved.dlogits, saved.x, weights.grad(gate_));
  if (shared_) shared_->BackwardWeight(model, saved.shared);
}

namespace {

// f_i = E / (A T) * count, T = tokens of the sequence.
double Frequency(const ModelConfig& config, const Batch& batch, double count) {
  return static_cast<double>(config.n_routed_experts) * count /
         (static_cast<double>(config.num_experts_per_tok) * static_cast<double>(batch.seq_length));
}

double Element(const Tensor& tensor, int64_t i) {
  return tensor.dtype() == DType::kF64 ? tensor.data<double>()[i]
                                       : static_cast<double>(tensor.data<float>()[i]);
}

}  // namespace

double Moe::BalanceLoss(const ModelContext& model, const Batch& batch, const Saved& saved) const {
  if (saved.balance.counts_BE.empty()) return 0;
  double loss = 0;
  for (int64_t i = 0; i < saved.balance.counts_BE.num_elements(); ++i) {
    loss += Frequency(model.config, batch, Element(saved.balance.counts_BE, i)) *
            Element(saved.balance.prob_sum_BE, i) / static_cast<double>(batch.seq_length);
  }
  return loss;
}

Tensor Moe::BalanceCoefficient(const ModelContext& model, const Batch& batch, double balance_scale,
                               const Saved& saved) const {
  const Tensor coefficient = Clone(model.context, saved.balance.counts_BE);
  ScaleInPlace(
      model.context, coefficient,
      balance_scale * Frequency(model.config, batch, 1.0) / static_cast<double>(batch.seq_length));
  return coefficient;
}

}  // namespace baleen
