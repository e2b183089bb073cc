// One number a slot (a routing weight) as one number a row of the experts, and back; slots and rows
// as in permute.h.
//
//   v_N[row_of_slot[t, a]] = v_TA[t, a];  v_TA[t, a] = v_N[row_of_slot[t, a]], 0 without a row
// kF32 or kF64 on the CPU, kF32 on CUDA.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

// Each of num_rows rows belongs to one slot, as in a Permutation (on CUDA another row would hold
// anything).
Tensor RowsOfSlots(const Context& context, const Tensor& values_TA, const Tensor& row_of_slot_TA,
                   int64_t num_rows);
Tensor SlotsOfRows(const Context& context, const Tensor& values_N, const Tensor& row_of_slot_TA);

}  // namespace baleen
