// Moves token rows to experts and back. Slot (t, a) = the a-th expert of token t; rows sorted by
// expert, then by token.
//
//   source_row_N[n]   the token whose row stands at sorted place n
//   row_of_slot_TA    the sorted place of slot (t, a); -1 where the slot goes to no expert in range
//   offsets_L1        expert l owns sorted rows offsets[l] .. offsets[l+1]
//
// Rows are of any dtype where they are only moved; where they are summed kF32 or kF64 on the CPU,
// kF32 or kBF16 on CUDA (sums in fp32, rounded once). A number a slot: slot_values.h.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

struct Permutation {
  Tensor source_row_N;    // kI32
  Tensor row_of_slot_TA;  // kI32
  Tensor offsets_L1;      // kI32 [num_experts + 1]
};

inline constexpr int64_t kUnknownRows = -1;

// Experts first_expert .. first_expert + num_experts - 1 (all of them, or one rank's). num_rows:
// how many slots are in range, where the caller knows it: all of them, or what the exchanged counts
// say. With kUnknownRows on CUDA the host waits for the number.
Permutation BuildPermutation(const Context& context, const Tensor& expert_ids_TA,
                             int64_t first_expert, int64_t num_experts,
                             int64_t num_rows = kUnknownRows);

// y[n] = x[source_row[n]].
Tensor GatherRows(const Context& context, const Tensor& x_TD, const Tensor& source_row_N);
// The same for the rows of a permutation (y[n] = x[source_row_N[n]]); on CUDA each row of x is read
// once, whatever number of places it goes to.
Tensor GatherRows(const Context& context, const Tensor& x_TD, const Permutation& permutation);
// Backward of GatherRows: dx[t] = sum over a of dy[row_of_slot[t, a]], in the order of a.
Tensor GatherRowsBackward(const Context& context, const Tensor& dy_ND,
                          const Tensor& row_of_slot_TA);

// groups_TM (kI32) [t, m] = m where some id of token t is in m * group_size .. (m + 1) * group_size
// - 1, else -1: which of num_groups nodes a token goes to.
Tensor GroupsOfTokens(const Context& context, const Tensor& ids_TA, int64_t num_groups,
                      int64_t group_size);

}  // namespace baleen
