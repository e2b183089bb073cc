// Moves token rows to experts and back. Slot (t, a) = the a-th expert of token t; rows sorted by expert, then by token.
//
//   source_row_N[n]   the token whose row stands at sorted place n
//   row_of_slot_TA    the sorted place of slot (t, a); -1 where the slot goes to no expert in range
//   offsets_L1        expert l owns sorted rows offsets[l] .. offsets[l+1]
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

struct Permutation {
  Tensor source_row_N;    // kI32
  Tensor row_of_slot_TA;  // kI32
  Tensor offsets_L1;      // kI32 [num_experts + 1]
};

// Experts first_expert .. first_expert + num_experts - 1 (all of them, or one rank's).
Permutation BuildPermutation(const Context& context, const Tensor& expert_ids_TA,
                             int64_t first_expert, int64_t num_experts);

// y[n] = x[source_row[n]].
Tensor GatherRows(const Context& context, const Tensor& x_TD, const Tensor& source_row_N);
// Backward of GatherRows: dx[t] = sum over a of dy[row_of_slot[t, a]], in the order of a (deterministic).
Tensor GatherRowsBackward(const Context& context, const Tensor& dy_ND, const Tensor& row_of_slot_TA);

// y[t] = sum over a of weights[t, a] * x[row_of_slot[t, a]], in the order of a.
Tensor CombineRows(const Context& context, const Tensor& x_ND, const Tensor& row_of_slot_TA,
                   const Tensor& weights_TA);
struct CombineGradients {
  Tensor dx_ND;
  Tensor dweights_TA;
};
CombineGradients CombineRowsBackward(const Context& context, const Tensor& dy_TD, const Tensor& x_ND,
                                     const Tensor& row_of_slot_TA, const Tensor& weights_TA);

}  // namespace baleen
