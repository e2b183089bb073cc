// Internal: the kernels behind permute.h (the sort is stable_sort_cuda.h's). Rows are of `element`,
// sums in fp32 in the order of a.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// y[n] = x[source_row[n]], rows of row_bytes bytes.
void GatherRowsCuda(int64_t rows, int64_t row_bytes, const void* x, const int32_t* source_row_N,
                    void* y, void* stream);

// y[row_of_slot[t, a]] = x[t] for the slots that are not -1, rows of row_bytes bytes.
void SpreadRowsCuda(int64_t tokens, int64_t A, int64_t row_bytes, const void* x,
                    const int32_t* row_of_slot_TA, void* y, void* stream);

// y[t] = sum over a of x[row_of_slot[t, a]]. Slots of -1 add 0.
struct SumRowsCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t tokens = 0, A = 0, D = 0;
  const void* x = nullptr;
  const int32_t* row_of_slot_TA = nullptr;
  void* y = nullptr;
};
void SumRowsCuda(const SumRowsCudaArgs& args, void* stream);

// groups[t, m] = m where some id of token t lies in [m * group_size, (m + 1) * group_size), else
// -1.
void GroupsOfTokensCuda(int64_t tokens, int64_t A, int64_t groups, int64_t group_size,
                        const int32_t* ids_TA, int32_t* groups_TM, void* stream);

}  // namespace baleen
