#include "parallel/expert_exchange.h"

#include <numeric>

namespace baleen {
namespace {

std::vector<int64_t> Times(std::vector<int64_t> counts, int64_t factor) {
  for (int64_t& count : counts) count *= factor;
  return counts;
}

// Rows in the order of ranks to the ranks, and what they sent.
ExpertMessage Begin(const Context& context, Communicator& axis, absl::string_view label,
                    const Tensor& rows, const std::vector<int64_t>& send_rows,
                    const std::vector<int64_t>& recv_rows) {
  if (axis.size() == 1) return {rows};
  const int64_t width = rows.dim(1);
  const int64_t arriving = std::accumulate(recv_rows.begin(), recv_rows.end(), int64_t{0});
  const Tensor received = context.Empty(rows.dtype(), {arriving, width});
  const uint64_t call =
      axis.BeginAllToAllV(label, rows, Times(send_rows, width), received, Times(recv_rows, width));
  return {received, &axis, call};
}

Tensor End(const ExpertMessage& message) {
  if (message.axis != nullptr) message.axis->Wait(message.call);
  return message.rows;
}

// Rows that stand sorted by destination, in the order in which they arrive.
ExpertMessage BeginLeave(const Context& context, const ExpertHop& hop, absl::string_view label,
                         const Tensor& rows) {
  return Begin(context, *hop.axis, label, rows, hop.send_rows, hop.recv_rows);
}
// Its mirror.
ExpertMessage BeginBack(const Context& context, const ExpertHop& hop, absl::string_view label,
                        const Tensor& arrived) {
  return Begin(context, *hop.axis, label, arrived, hop.recv_rows, hop.send_rows);
}

// Tokens to the receivers' sorted rows, and sorted rows back to the order in which they left.
ExpertMessage BeginSend(const Context& context, const ExpertHop& hop, absl::string_view label,
                        const Tensor& x_T) {
  return BeginLeave(context, hop, label, GatherRows(context, x_T, hop.send.source_row_N));
}
Tensor EndSend(const Context& context, const ExpertHop& hop, const ExpertMessage& message) {
  const Tensor arrived = End(message);
  return hop.sorted ? arrived : GatherRows(context, arrived, hop.arrivals.source_row_N);
}
ExpertMessage BeginReturn(const Context& context, const ExpertHop& hop, absl::string_view label,
                          const Tensor& sorted_N) {
  if (hop.sorted) return BeginBack(context, hop, label, sorted_N);
  const Tensor row_of_arrival =
      hop.arrivals.row_of_slot_TA.Reshaped({hop.arrivals.row_of_slot_TA.num_elements()});
  return BeginBack(context, hop, label, GatherRows(context, sorted_N, row_of_arrival));
}

Tensor SendRows(const Context& context, const ExpertHop& hop, absl::string_view label,
                const Tensor& x_T) {
  return EndSend(context, hop, BeginSend(context, hop, label, x_T));
}
Tensor ReturnRows(const Context& context, const ExpertHop& hop, absl::string_view label,
                  const Tensor& sorted_N) {
  return End(BeginReturn(context, hop, label, sorted_N));
}

// values[t, a] at the row of slot (t, a), one column. The slot of each row is the inverse of
// row_of_slot: slots sorted by their row.
Tensor RowsOfSlots(const Context& context, const Permutation& send, const Tensor& values_TA) {
  const int64_t slots = values_TA.num_elements();
  const int64_t rows = send.source_row_N.num_elements();
  const Permutation inverse =
      BuildPermutation(context, send.row_of_slot_TA.Reshaped({slots, 1}), 0, rows, rows);
  return GatherRows(context, values_TA.Reshaped({slots, 1}), inverse.source_row_N);
}
// Its mirror; 0 for a slot without a row.
Tensor SlotsOfRows(const Context& context, const Permutation& send, const Tensor& values_N1) {
  const Tensor& row_of_slot = send.row_of_slot_TA;
  const int64_t slots = row_of_slot.num_elements();
  return GatherRowsBackward(context, values_N1, row_of_slot.Reshaped({slots, 1}))
      .Reshaped(row_of_slot.shape());
}

ExpertRound::CombineMessages BeginCombineBackwardOneHop(const Context& context,
                                                        const ExpertHop& hop,
                                                        absl::string_view label,
                                                        const Tensor& dy_TD,
                                                        const Tensor& weights_TA) {
  if (hop.axis->size() == 1) return {{dy_TD}, {weights_TA}};
  return {BeginSend(context, hop, label, dy_TD),
          BeginLeave(context, hop, label, RowsOfSlots(context, hop.send, weights_TA))};
}

CombineGradients EndCombineBackwardOneHop(const Context& context, const ExpertHop& hop,
                                          absl::string_view label,
                                          const ExpertRound::CombineMessages& sent,
                                          const Tensor& expert_out_ND) {
  const Tensor dy = End(sent.dy), weights = End(sent.weights);
  if (hop.axis->size() == 1) {
    return CombineRowsBackward(context, dy, expert_out_ND, hop.send.row_of_slot_TA, weights);
  }
  // Here an arrived row is a token of one slot: the op sorts dy and leaves the dots as they came.
  CombineGradients gradients =
      CombineRowsBackward(context, dy, expert_out_ND, hop.arrivals.row_of_slot_TA, weights);
  gradients.dweights_TA =
      SlotsOfRows(context, hop.send, End(BeginBack(context, hop, label, gradients.dweights_TA)));
  return gradients;
}

}  // namespace

const Tensor& ExpertRound::offsets_L1() const {
  return inner_.arrivals.offsets_L1.empty() ? inner_.send.offsets_L1 : inner_.arrivals.offsets_L1;
}

Tensor ExpertRound::ToNode(const Context& context, absl::string_view label,
                           const Tensor& x_T) const {
  return outer_ ? SendRows(context, *outer_, label, x_T) : x_T;
}

Tensor ExpertRound::SumFromNodes(const Context& context, absl::string_view label,
                                 const Tensor& sum_V) const {
  if (!outer_) return sum_V;
  return GatherRowsBackward(context, ReturnRows(context, *outer_, label, sum_V),
                            outer_->send.row_of_slot_TA);
}

ExpertMessage ExpertRound::BeginDispatch(const Context& context, const Tensor& x_TD) const {
  return BeginSend(context, outer_ ? *outer_ : inner_, dispatch_label_, x_TD);
}

Tensor ExpertRound::EndDispatch(const Context& context, const ExpertMessage& sent) const {
  if (!outer_) return EndSend(context, inner_, sent);
  return SendRows(context, inner_, dispatch_label_, EndSend(context, *outer_, sent));
}

ExpertMessage ExpertRound::BeginCombine(const Context& context, const Tensor& expert_out_ND,
                                        const Tensor& weights_TA) const {
  if (!outer_) return BeginReturn(context, inner_, combine_label_, expert_out_ND);
  const Tensor weights_VA = ToNode(context, combine_label_, weights_TA);
  const Tensor rows = ReturnRows(context, inner_, combine_label_, expert_out_ND);
  return BeginReturn(context, *outer_, combine_label_,
                     CombineRows(context, rows, inner_.send.row_of_slot_TA, weights_VA));
}

Tensor ExpertRound::EndCombine(const Context& context, const ExpertMessage& sent,
                               const Tensor& weights_TA) const {
  const Tensor rows = End(sent);
  return outer_ ? GatherRowsBackward(context, rows, outer_->send.row_of_slot_TA)
                : CombineRows(context, rows, inner_.send.row_of_slot_TA, weights_TA);
}

ExpertRound::CombineMessages ExpertRound::BeginCombineBackward(const Context& context,
                                                               const Tensor& dy_TD,
                                                               const Tensor& weights_TA) const {
  if (!outer_) {
    return BeginCombineBackwardOneHop(context, inner_, combine_label_, dy_TD, weights_TA);
  }
  return {BeginSend(context, *outer_, combine_label_, dy_TD),
          BeginSend(context, *outer_, combine_label_, weights_TA)};
}

CombineGradients ExpertRound::EndCombineBackward(const Context& context,
                                                 const CombineMessages& sent,
                                                 const Tensor& expert_out_ND) const {
  if (!outer_) {
    return EndCombineBackwardOneHop(context, inner_, combine_label_, sent, expert_out_ND);
  }
  const Tensor dy_VD = EndSend(context, *outer_, sent.dy);
  const Tensor weights_VA = EndSend(context, *outer_, sent.weights);
  CombineGradients gradients = EndCombineBackwardOneHop(
      context, inner_, combine_label_,
      BeginCombineBackwardOneHop(context, inner_, combine_label_, dy_VD, weights_VA),
      expert_out_ND);
  // A slot's expert is on one node; the other nodes add zero.
  gradients.dweights_TA = SumFromNodes(context, combine_label_, gradients.dweights_TA);
  return gradients;
}

ExpertMessage ExpertRound::BeginDispatchBackward(const Context& context,
                                                 const Tensor& drows_ND) const {
  if (!outer_) return BeginReturn(context, inner_, dispatch_label_, drows_ND);
  const Tensor rows = ReturnRows(context, inner_, dispatch_label_, drows_ND);
  return BeginReturn(context, *outer_, dispatch_label_,
                     GatherRowsBackward(context, rows, inner_.send.row_of_slot_TA));
}

Tensor ExpertRound::EndDispatchBackward(const Context& context, const ExpertMessage& sent) const {
  return GatherRowsBackward(context, End(sent), (outer_ ? *outer_ : inner_).send.row_of_slot_TA);
}

Tensor ExpertRound::Dispatch(const Context& context, const Tensor& x_TD) const {
  return EndDispatch(context, BeginDispatch(context, x_TD));
}

Tensor ExpertRound::Combine(const Context& context, const Tensor& expert_out_ND,
                            const Tensor& weights_TA) const {
  return EndCombine(context, BeginCombine(context, expert_out_ND, weights_TA), weights_TA);
}

CombineGradients ExpertRound::CombineBackward(const Context& context, const Tensor& dy_TD,
                                              const Tensor& expert_out_ND,
                                              const Tensor& weights_TA) const {
  return EndCombineBackward(context, BeginCombineBackward(context, dy_TD, weights_TA),
                            expert_out_ND);
}

Tensor ExpertRound::DispatchBackward(const Context& context, const Tensor& drows_ND) const {
  return EndDispatchBackward(context, BeginDispatchBackward(context, drows_ND));
}

}  // namespace baleen
