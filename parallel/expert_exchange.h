// Expert parallelism: token rows travel to the ranks that hold their experts, and back.
//
// Rank r of ep holds experts r L .. (r + 1) L - 1 (L = E / ranks). A round is one pass of some own
// tokens: Dispatch, the experts' work by the caller, Combine; the backward mirrors it. A row takes
// its routing weight along and the expert applies it, so that Combine is a sum. Rows move by
// all-to-all-v, in one hop, or in two where ranks come in nodes: first between ranks of the same
// place in their nodes, each token at most once per node, then inside the node to its experts; sums
// are formed per node before they travel back. No token is dropped; an expert, a rank or everybody
// may get nothing or everything.
//
// What a rank takes in at once is bounded: own tokens are cut in equal chunks, all ranks exchange
// the counts of all chunks once, and each joins the same consecutive chunks to rounds in which no
// rank exceeds the bound. The bound is on rows of one kind (x, outputs, their gradients); while
// rows are sorted or sent on, a second copy of them lives for that moment. Legend: T own tokens (of
// a round), A experts per token, E experts of all ranks, L of one rank, V tokens seen by a rank
// between the hops (V = T with one hop), N rows at a rank's experts, sorted by expert, then by
// where they came from, then by token; D hidden.
#pragma once

#include <optional>
#include <string>
#include <vector>

#include "kernels/core/context.h"
#include "kernels/ops/moe/permute.h"
#include "parallel/communicator.h"

namespace baleen {

// The ranks that share the experts. With two hops: node are consecutive ranks of ep, across are
// those of the same place in each node, in the order of nodes. Both null: one hop.
struct ExpertAxes {
  Communicator& ep;
  Communicator* node = nullptr;
  Communicator* across = nullptr;
};

struct ExpertPlanParams {
  int64_t num_experts = 1;  // E
  int64_t max_tokens = 0;   // own tokens of the rank of ep that has the most
  int64_t max_rows = 0;     // bound on rows from all ranks held at once; 0: no bound
  std::string label;        // of the collectives: the layer
};

// The smallest bound that can be kept: one token of each rank, all of them to one rank. node_size
// 0: one hop; else the tokens that pass through on their way into the node count too.
int64_t MinimumExpertRows(int64_t ep_size, int64_t experts_per_rank, int64_t top_k,
                          int64_t node_size = 0);

// One exchange of rows along an axis, there and back: rows sorted by destination leave, arrive in
// the order of the ranks they come from, and are sorted by the receiver's experts.
struct ExpertHop {
  Communicator* axis = nullptr;
  Permutation send;                // over the experts (or nodes) of the whole axis
  std::vector<int64_t> send_rows;  // for each rank of the axis
  std::vector<int64_t> recv_rows;
  Permutation arrivals;  // over the rank's own experts; a "token" is an arrived row. Empty when
                         // the axis is one rank: rows are sorted as they leave
  bool sorted = true;    // rows arrive in the order in which they are wanted
};

// Rows on their way between the two halves of one function of a round.
struct ExpertMessage {
  Tensor rows;
  Communicator* axis = nullptr;  // null: they do not travel
  uint64_t call = 0;
};
// The same with a number for each row (or, on the way to nodes, A for each token).
struct WeightedMessage {
  ExpertMessage rows, weights;
};

struct WeightedRows {
  Tensor rows_ND;
  Tensor weights_N;
};
struct WeightedTokens {
  Tensor tokens_TD;
  Tensor weights_TA;
};

// One pass of own tokens begin .. end - 1; its functions take and return those rows only. Every
// rank of ep calls them in the same order. The axes must outlive it. Each comes whole and in two
// halves: between Begin and End the slowest of its messages may run beside what the caller
// computes, on the way out the first, on the way home the last. (With two hops the other one stays
// inside a node and is not beside anything.)
class ExpertRound {
 public:
  int64_t begin() const { return begin_; }
  int64_t end() const { return end_; }
  int64_t held_rows() const { return held_rows_; }  // rows from all ranks that this rank takes in
  const Tensor& offsets_L1() const;                 // rows of local expert l

  WeightedRows Dispatch(const Context& context, const Tensor& x_TD, const Tensor& weights_TA) const;
  // y[t] = sum over a of the row of slot (t, a), in the order of a (with two hops, of nodes).
  Tensor Combine(const Context& context, const Tensor& expert_out_ND) const;
  // dout_ND: each row its token's dy.
  Tensor CombineBackward(const Context& context, const Tensor& dy_TD) const;
  // dx[t], the sum over a as in Combine, and the weights' gradients.
  WeightedTokens DispatchBackward(const Context& context, const WeightedRows& gradients) const;

  WeightedMessage BeginDispatch(const Context& context, const Tensor& x_TD,
                                const Tensor& weights_TA) const;
  WeightedRows EndDispatch(const Context& context, const WeightedMessage& sent) const;
  ExpertMessage BeginCombine(const Context& context, const Tensor& expert_out_ND) const;
  Tensor EndCombine(const Context& context, const ExpertMessage& sent) const;
  ExpertMessage BeginCombineBackward(const Context& context, const Tensor& dy_TD) const;
  Tensor EndCombineBackward(const Context& context, const ExpertMessage& sent) const;
  WeightedMessage BeginDispatchBackward(const Context& context,
                                        const WeightedRows& gradients) const;
  WeightedTokens EndDispatchBackward(const Context& context, const WeightedMessage& sent) const;

 private:
  friend class ExpertPlanner;
  // Rows of tokens to the nodes of their experts, at their places there.
  Tensor ToNode(const Context& context, absl::string_view label, const Tensor& x_T) const;
  const ExpertHop& first_hop() const { return outer_ ? *outer_ : inner_; }

  int64_t begin_ = 0, end_ = 0;
  int64_t held_rows_ = 0;
  std::optional<ExpertHop> outer_;  // to nodes
  ExpertHop inner_;                 // to experts
  std::string dispatch_label_, combine_label_;
};

struct ExpertPlan {
  std::vector<ExpertRound> rounds;  // as many on every rank; they cover the own tokens in order
  int64_t max_held_rows() const;    // over the rounds
};

// ids_TA: kI32, each 0 .. E - 1, no expert twice in a row. Exchanges the counts (one all-gather)
// and, with two hops, the ids.
ExpertPlan MakeExpertPlan(const Context& context, const ExpertAxes& axes,
                          const ExpertPlanParams& params, const Tensor& ids_TA);

}  // namespace baleen
