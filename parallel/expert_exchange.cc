#include "parallel/expert_exchange.h"

#include <numeric>

#include "kernels/ops/moe/slot_values.h"

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
  return BeginLeave(context, hop, label, GatherRows(context, x_T, hop.send));
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

// Tokens' rows back at their tokens.
Tensor SumOfRows(const Context& context, const ExpertHop& hop, const Tensor& rows) {
  return GatherRowsBackward(context, rows, hop.send.row_of_slot_TA);
}

Tensor AsColumn(const Tensor& values_N) { return values_N.Reshaped({values_N.num_elements(), 1}); }
Tensor AsVector(const Tensor& column_N1) { return column_N1.Reshaped({column_N1.num_elements()}); }

// A number for each slot of the hop's tokens, to the slots' sorted rows at the receivers.
ExpertMessage BeginSendValues(const Context& context, const ExpertHop& hop, absl::string_view label,
                              const Tensor& values_TA) {
  const Tensor values_N = RowsOfSlots(context, values_TA, hop.send.row_of_slot_TA,
                                      hop.send.source_row_N.num_elements());
  return BeginLeave(context, hop, label, AsColumn(values_N));
}
Tensor EndSendValues(const Context& context, const ExpertHop& hop, const ExpertMessage& message) {
  return AsVector(EndSend(context, hop, message));
}
// Its mirror; 0 for a slot without a row.
ExpertMessage BeginReturnValues(const Context& context, const ExpertHop& hop,
                                absl::string_view label, const Tensor& values_N) {
  return BeginReturn(context, hop, label, AsColumn(values_N));
}
Tensor EndReturnValues(const Context& context, const ExpertHop& hop, const ExpertMessage& message) {
  return SlotsOfRows(context, AsVector(End(message)), hop.send.row_of_slot_TA);
}

}  // namespace

const Tensor& ExpertRound::offsets_L1() const {
  return inner_.arrivals.offsets_L1.empty() ? inner_.send.offsets_L1 : inner_.arrivals.offsets_L1;
}

Tensor ExpertRound::ToNode(const Context& context, absl::string_view label,
                           const Tensor& x_T) const {
  return outer_ ? SendRows(context, *outer_, label, x_T) : x_T;
}

// --- Out: tokens to experts, with their weights or (dy) without.

WeightedMessage ExpertRound::BeginDispatch(const Context& context, const Tensor& x_TD,
                                           const Tensor& weights_TA) const {
  const ExpertHop& hop = first_hop();
  return {BeginSend(context, hop, dispatch_label_, x_TD),
          outer_ ? BeginSend(context, hop, dispatch_label_, weights_TA)
                 : BeginSendValues(context, hop, dispatch_label_, weights_TA)};
}

WeightedRows ExpertRound::EndDispatch(const Context& context, const WeightedMessage& sent) const {
  if (!outer_) {
    return {EndSend(context, inner_, sent.rows), EndSendValues(context, inner_, sent.weights)};
  }
  const Tensor x_VD = EndSend(context, *outer_, sent.rows);
  const Tensor weights_VA = EndSend(context, *outer_, sent.weights);
  return {SendRows(context, inner_, dispatch_label_, x_VD),
          EndSendValues(context, inner_,
                        BeginSendValues(context, inner_, dispatch_label_, weights_VA))};
}

ExpertMessage ExpertRound::BeginCombineBackward(const Context& context, const Tensor& dy_TD) const {
  return BeginSend(context, first_hop(), combine_label_, dy_TD);
}

Tensor ExpertRound::EndCombineBackward(const Context& context, const ExpertMessage& sent) const {
  if (!outer_) return EndSend(context, inner_, sent);
  return SendRows(context, inner_, combine_label_, EndSend(context, *outer_, sent));
}

// --- Home: experts' rows to the tokens' sums.

ExpertMessage ExpertRound::BeginCombine(const Context& context, const Tensor& expert_out_ND) const {
  if (!outer_) return BeginReturn(context, inner_, combine_label_, expert_out_ND);
  const Tensor rows = ReturnRows(context, inner_, combine_label_, expert_out_ND);
  return BeginReturn(context, *outer_, combine_label_, SumOfRows(context, inner_, rows));
}

Tensor ExpertRound::EndCombine(const Context& context, const ExpertMessage& sent) const {
  return SumOfRows(context, first_hop(), End(sent));
}

WeightedMessage ExpertRound::BeginDispatchBackward(const Context& context,
                                                   const WeightedRows& gradients) const {
  if (!outer_) {
    return {BeginReturn(context, inner_, dispatch_label_, gradients.rows_ND),
            BeginReturnValues(context, inner_, dispatch_label_, gradients.weights_N)};
  }
  const Tensor rows = ReturnRows(context, inner_, dispatch_label_, gradients.rows_ND);
  const Tensor weights_VA = EndReturnValues(
      context, inner_, BeginReturnValues(context, inner_, dispatch_label_, gradients.weights_N));
  return {BeginReturn(context, *outer_, dispatch_label_, SumOfRows(context, inner_, rows)),
          BeginReturn(context, *outer_, dispatch_label_, weights_VA)};
}

WeightedTokens ExpertRound::EndDispatchBackward(const Context& context,
                                                const WeightedMessage& sent) const {
  const ExpertHop& hop = first_hop();
  const Tensor dx_TD = SumOfRows(context, hop, End(sent.rows));
  // A slot's expert is on one node; the other nodes add zero.
  return {dx_TD, outer_ ? SumOfRows(context, hop, End(sent.weights))
                        : EndReturnValues(context, hop, sent.weights)};
}

// --- Whole.

WeightedRows ExpertRound::Dispatch(const Context& context, const Tensor& x_TD,
                                   const Tensor& weights_TA) const {
  return EndDispatch(context, BeginDispatch(context, x_TD, weights_TA));
}

Tensor ExpertRound::Combine(const Context& context, const Tensor& expert_out_ND) const {
  return EndCombine(context, BeginCombine(context, expert_out_ND));
}

Tensor ExpertRound::CombineBackward(const Context& context, const Tensor& dy_TD) const {
  return EndCombineBackward(context, BeginCombineBackward(context, dy_TD));
}

WeightedTokens ExpertRound::DispatchBackward(const Context& context,
                                             const WeightedRows& gradients) const {
  return EndDispatchBackward(context, BeginDispatchBackward(context, gradients));
}

}  // namespace baleen
