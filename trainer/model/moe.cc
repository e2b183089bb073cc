#include "trainer/model/moe.h"

#include "kernels/ops/elementwise.h"
#include "kernels/ops/linear/matmul.h"
#include "kernels/ops/moe/weighted_swiglu.h"
#include "kernels/ops/reduce.h"
#include "trainer/model/choice_replay.h"
#include "trainer/model/linear.h"

namespace baleen {

Moe::Moe(const ModelConfig& config, const std::string& prefix, const Placement& placement,
         ParameterStore& store)
    : label_(prefix + ".mlp"), num_experts_(static_cast<int>(config.n_routed_experts)) {
  CHECK_EQ(num_experts_ % placement.ep_size, 0) << label_ << ": experts over ranks";
  local_experts_ = num_experts_ / placement.ep_size;
  const int first_expert = placement.ep_rank * local_experts_;
  const int64_t hidden = config.hidden_size, inner = config.moe_intermediate_size;
  gate_ = store.Declare(label_ + ".gate.weight", {num_experts_, hidden}, ParameterGroup::kMain);
  correction_bias_ = store.Declare(label_ + ".gate.e_score_correction_bias", {num_experts_},
                                   ParameterGroup::kBuffer);
  // One projection of all experts is one operand: declared one behind the other.
  const auto declare_stack = [&](const char* projection, Shape shape) {
    int first = -1;
    for (int l = 0; l < local_experts_; ++l) {
      const int id = store.Declare(
          absl::StrCat(label_, ".experts.", first_expert + l, ".", projection, ".weight"), shape,
          ParameterGroup::kExpert, /*stacked=*/l > 0);
      if (l == 0) first = id;
    }
    return first;
  };
  first_gate_proj_ = declare_stack("gate_proj", {inner, hidden});
  first_up_proj_ = declare_stack("up_proj", {inner, hidden});
  first_down_proj_ = declare_stack("down_proj", {hidden, inner});
  if (config.n_shared_experts > 0) {
    shared_.emplace(hidden, inner * config.n_shared_experts, label_ + ".shared_experts", placement,
                    store);
  }
}

RouterParams Moe::Params(const ModelConfig& config) const {
  return {.n_group = config.n_group,
          .topk_group = config.topk_group,
          .num_experts_per_tok = config.num_experts_per_tok,
          .routed_scaling_factor = config.routed_scaling_factor,
          .norm_topk_prob = config.norm_topk_prob};
}

namespace {

Tensor Slice(const ExpertRound& round, const Tensor& of_all) {
  return of_all.Rows(round.begin(), round.end());
}

bool OneRound(const ExpertPlan& plan) { return plan.rounds.size() == 1; }

// Whether rows go to other ranks. Where they stay, the shared expert comes last, so that its
// activations do not lie beside the experts'.
bool RowsTravel(const ModelContext& model) { return model.axes.ep->size() > 1; }

}  // namespace

// --- The experts of this rank, on the rows of one round.

// All but the down-projection, whose output no gradient needs.
void Moe::Expand(const ModelContext& model, const ExpertRound& round, WeightedRows arrived,
                 ExpertRows& rows) const {
  rows.rows_ND = std::move(arrived.rows_ND);
  rows.weights_N = std::move(arrived.weights_N);
  const Tensor& offsets = round.offsets_L1();
  const ProjectionRows x(rows.rows_ND);
  rows.gate = ProjectGroupsForward(model, x, {first_gate_proj_, local_experts_}, offsets);
  rows.up = ProjectGroupsForward(model, x, {first_up_proj_, local_experts_}, offsets);
  rows.hidden = WeightedSwiglu(model.context, rows.gate, rows.up, rows.weights_N);
}

Tensor Moe::ProjectDown(const ModelContext& model, const ExpertRound& round,
                        const ExpertRows& rows) const {
  return ProjectGroupsForward(model, rows.hidden, {first_down_proj_, local_experts_},
                              round.offsets_L1());
}

WeightedRows Moe::ExpertsBackwardInput(const ModelContext& model, const ExpertRound& round,
                                       ExpertRows& rows) const {
  const Context& context = model.context;
  const Tensor& offsets = round.offsets_L1();
  const WeightedSwigluGradients gradients = WeightedSwigluBackward(
      context,
      ProjectGroupsBackwardInput(model, rows.dout_ND, {first_down_proj_, local_experts_}, offsets),
      rows.gate, rows.up, rows.weights_N);
  rows.dgate = gradients.dgate;
  rows.dup = gradients.dup;
  const Tensor drows_ND =
      ProjectGroupsBackwardInputOfTwo(model, rows.dgate, {first_gate_proj_, local_experts_},
                                      rows.dup, {first_up_proj_, local_experts_}, offsets);
  return {drows_ND, gradients.dweight_N};
}

void Moe::ExpertsBackwardWeight(const ModelContext& model, const ExpertRound& round,
                                const ExpertRows& rows) const {
  const Tensor& offsets = round.offsets_L1();
  ProjectGroupsBackwardWeight(model, rows.dout_ND, rows.hidden, {first_down_proj_, local_experts_},
                              offsets);
  ProjectGroupsBackwardWeight(model, rows.dgate, rows.rows_ND, {first_gate_proj_, local_experts_},
                              offsets);
  ProjectGroupsBackwardWeight(model, rows.dup, rows.rows_ND, {first_up_proj_, local_experts_},
                              offsets);
}

// --- Several rounds: each is a whole pass, and leaves only what belongs to the own tokens.

Tensor Moe::ForwardRounds(const ModelContext& model, const Saved& saved) const {
  const Context& context = model.context;
  const Tensor y_RD = context.Empty(saved.x_RD.dtype(), saved.x_RD.shape());
  for (const ExpertRound& round : saved.plan.rounds) {
    ExpertRows rows;
    Expand(model, round,
           round.Dispatch(context, Slice(round, saved.x_RD), Slice(round, saved.route.weights_TA)),
           rows);
    Copy(context, round.Combine(context, ProjectDown(model, round, rows)), Slice(round, y_RD));
  }
  return y_RD;
}

Tensor Moe::BackwardRounds(const ModelContext& model, Saved& saved) const {
  const Context& context = model.context;
  const Tensor& weights_RA = saved.route.weights_TA;
  const Tensor dx_RD = context.Empty(saved.x_RD.dtype(), saved.x_RD.shape());
  saved.dweights_RA = context.Empty(weights_RA.dtype(), weights_RA.shape());
  for (const ExpertRound& round : saved.plan.rounds) {
    ExpertRows rows;
    Expand(model, round,
           round.Dispatch(context, Slice(round, saved.x_RD), Slice(round, weights_RA)), rows);
    rows.dout_ND = round.CombineBackward(context, Slice(round, saved.dy_RD));
    const WeightedRows gradients = ExpertsBackwardInput(model, round, rows);
    ExpertsBackwardWeight(model, round, rows);
    const WeightedTokens home = round.DispatchBackward(context, gradients);
    Copy(context, home.tokens_TD, Slice(round, dx_RD));
    Copy(context, home.weights_TA, Slice(round, saved.dweights_RA));
  }
  return dx_RD;
}

// --- Forward phases.

void Moe::Dispatch(const ModelContext& model, const Batch& batch, const Tensor& x_RD,
                   bool balance_loss, Saved& saved) const {
  const Context& context = model.context;
  saved.x_RD = x_RD;
  const Tensor logits_RE = LinearToStatistics(context, x_RD, model.parameters.value(gate_));
  saved.route =
      Route(context, logits_RE, model.parameters.value(correction_bias_), Params(model.config));
  if (model.replay != nullptr) {
    const Tensor ids_RA = model.replay->Choose(context, ChoiceReplay::Kind::kExperts, label_, batch,
                                               saved.route.expert_ids_TA);
    saved.route = RouteWithIds(context, logits_RE, ids_RA, Params(model.config));
  }
  if (balance_loss) {
    saved.balance = BalanceLocalStats(context, saved.route.scores_TE, batch.sequence_R,
                                      batch.num_sequences, model.config.num_experts_per_tok);
    // f and P are those of whole sequences.
    Communicator& sharers = *model.axes.cp_tp;
    sharers.AllReduce(label_ + " balance", saved.balance.counts_BE);
    sharers.AllReduce(label_ + " balance", saved.balance.prob_sum_BE);
  }
  const GridCommunicators& axes = model.axes;
  saved.plan = MakeExpertPlan(
      context, ExpertAxes{*axes.ep, axes.expert_node.get(), axes.expert_across.get()},
      {.num_experts = num_experts_,
       .max_tokens = x_RD.dim(0),  // every rank has as many
       .max_rows = model.options.expert_rows,
       .label = label_},
      saved.route.expert_ids_TA);
  if (OneRound(saved.plan)) {
    saved.sent = saved.plan.rounds[0].BeginDispatch(context, x_RD, saved.route.weights_TA);
  }
}

Tensor Moe::Experts(const ModelContext& model, Saved& saved) const {
  Tensor shared_out;
  const bool shared_first = shared_ && RowsTravel(model);
  if (shared_first) shared_out = shared_->Forward(model, saved.x_RD, saved.shared);
  if (OneRound(saved.plan)) {
    const ExpertRound& round = saved.plan.rounds[0];
    Expand(model, round, round.EndDispatch(model.context, std::exchange(saved.sent, {})),
           saved.experts);
    saved.sent_home = round.BeginCombine(model.context, ProjectDown(model, round, saved.experts));
  } else {
    saved.y_RD = ForwardRounds(model, saved);
  }
  if (shared_ && !shared_first) shared_out = shared_->Forward(model, saved.x_RD, saved.shared);
  return shared_out;
}

Tensor Moe::Combine(const ModelContext& model, const Tensor& shared_out, Saved& saved) const {
  const Tensor y_RD = OneRound(saved.plan) ? saved.plan.rounds[0].EndCombine(
                                                 model.context, std::exchange(saved.sent_home, {}))
                                           : std::exchange(saved.y_RD, {});
  if (shared_) AddInPlace(model.context, y_RD, shared_out);
  return y_RD;
}

void Moe::DropExpanded(Saved& saved) const {
  saved.experts = ExpertRows();
  if (shared_) shared_->DropExpanded(saved.shared);
}

// --- Backward phases.

void Moe::BackwardCombine(const ModelContext& model, const Tensor& dy_RD, Saved& saved) const {
  saved.dy_RD = dy_RD;
  if (!OneRound(saved.plan)) return;
  const ExpertRound& round = saved.plan.rounds[0];
  // What was dropped travels once more; a full recompute's Dispatch has sent it already.
  if (saved.experts.rows_ND.empty() && saved.sent.rows.rows.empty()) {
    saved.sent = round.BeginDispatch(model.context, saved.x_RD, saved.route.weights_TA);
  }
  saved.sent_home = round.BeginCombineBackward(model.context, dy_RD);
}

void Moe::BackwardExperts(const ModelContext& model, Saved& saved) const {
  if (shared_ && RowsTravel(model)) {
    saved.dshared_RD = shared_->BackwardInput(model, saved.dy_RD, saved.shared);
  }
  if (!OneRound(saved.plan)) {
    saved.dx_RD = BackwardRounds(model, saved);
    return;
  }
  const Context& context = model.context;
  const ExpertRound& round = saved.plan.rounds[0];
  ExpertRows& rows = saved.experts;
  if (rows.rows_ND.empty()) {
    Expand(model, round, round.EndDispatch(context, std::exchange(saved.sent, {})), rows);
  }
  rows.dout_ND = round.EndCombineBackward(context, std::exchange(saved.sent_home, {}));
  saved.sent = round.BeginDispatchBackward(context, ExpertsBackwardInput(model, round, rows));
}

Tensor Moe::BackwardDispatch(const ModelContext& model, const Batch& batch, double balance_scale,
                             Saved& saved) const {
  const Context& context = model.context;
  Tensor dx_RD = std::exchange(saved.dx_RD, {});
  if (OneRound(saved.plan)) {
    const WeightedTokens home =
        saved.plan.rounds[0].EndDispatchBackward(context, std::exchange(saved.sent, {}));
    dx_RD = home.tokens_TD;
    saved.dweights_RA = home.weights_TA;
  }
  if (shared_) {
    if (saved.dshared_RD.empty()) {
      saved.dshared_RD = shared_->BackwardInput(model, saved.dy_RD, saved.shared);
    }
    AddInPlace(context, dx_RD, std::exchange(saved.dshared_RD, {}));
  }
  Tensor dscores_RE;
  if (!saved.balance.counts_BE.empty() && balance_scale != 0) {
    dscores_RE = BalanceBackward(context, saved.route.scores_TE, batch.sequence_R,
                                 BalanceCoefficient(model, batch, balance_scale, saved));
  }
  saved.dlogits_RE = InDtype(
      context,
      RouteBackward(context, saved.dweights_RA, dscores_RE, saved.route, Params(model.config)),
      saved.x_RD.dtype());
  Matmul(context, AsMatrix(saved.dlogits_RE), Transpose::kNo,
         AsMatrix(model.parameters.value(gate_)), Transpose::kNo, AsMatrix(dx_RD),
         Accumulate::kAdd);
  return dx_RD;
}

void Moe::BackwardWeight(const ModelContext& model, Saved& saved) const {
  if (OneRound(saved.plan)) ExpertsBackwardWeight(model, saved.plan.rounds[0], saved.experts);
  LinearBackwardWeight(model, saved.dlogits_RE, saved.x_RD, gate_);
  if (shared_) shared_->BackwardWeight(model, saved.shared);
}

// --- Balance.

namespace {

// f_i P_i = factor * count_i * (sum of probabilities)_i: E / (A T) of f and 1 / T of P, T = tokens
// of the sequence.
double BalanceFactor(const ModelConfig& config, const Batch& batch) {
  const auto tokens = static_cast<double>(batch.seq_length);
  return static_cast<double>(config.n_routed_experts) /
         (static_cast<double>(config.num_experts_per_tok) * tokens * tokens);
}

}  // namespace

void Moe::AddBalanceLoss(const ModelContext& model, const Batch& batch, const Saved& saved,
                         const Tensor& sum_1) const {
  if (saved.balance.counts_BE.empty() || model.axes.cp_tp->rank() != 0) return;
  AddDot(model.context, saved.balance.counts_BE, saved.balance.prob_sum_BE,
         BalanceFactor(model.config, batch), sum_1);
}

Tensor Moe::BalanceCoefficient(const ModelContext& model, const Batch& batch, double balance_scale,
                               const Saved& saved) const {
  const Tensor coefficient = Clone(model.context, saved.balance.counts_BE);
  ScaleInPlace(model.context, coefficient, balance_scale * BalanceFactor(model.config, batch));
  return coefficient;
}

}  // namespace baleen
