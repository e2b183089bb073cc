// Internal: the kernels behind permute.h (the sort is stable_sort_cuda.h's). Rows are of `element`,
// weights and their gradients fp32, sums in fp32 in the order of a.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// The most slots a token may have in the kernels that sum over them.
inline constexpr int64_t kPermuteCudaMaxSlots = 64;

// y[n] = x[source_row[n]], rows of row_bytes bytes.
void GatherRowsCuda(int64_t rows, int64_t row_bytes, const void* x, const int32_t* source_row_N,
                    void* y, void* stream);

// y[row_of_slot[t, a]] = x[t] for the slots that are not -1, rows of row_bytes bytes.
void SpreadRowsCuda(int64_t tokens, int64_t A, int64_t row_bytes, const void* x,
                    const int32_t* row_of_slot_TA, void* y, void* stream);

// y[t] = sum over a of weights[t, a] * x[row_of_slot[t, a]]; weights null: 1. Slots of -1 add 0.
struct CombineRowsCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t tokens = 0, A = 0, D = 0;
  const void* x = nullptr;
  const int32_t* row_of_slot_TA = nullptr;
  const float* weights_TA = nullptr;
  void* y = nullptr;
};
void CombineRowsCuda(const CombineRowsCudaArgs& args, void* stream);

// dx[row] = weights[t, a] * dy[t] for the row of each slot; dweights[t, a] = dy[t] . x[row], 0 for
// a slot of -1. Rows of dx without a slot are not written.
struct CombineRowsBackwardCudaArgs {
  CudaElement element = CudaElement::kF32;
  int64_t tokens = 0, A = 0, D = 0;
  const void* dy = nullptr;
  const void* x = nullptr;
  const int32_t* row_of_slot_TA = nullptr;
  const float* weights_TA = nullptr;
  void* dx = nullptr;
  float* dweights_TA = nullptr;
};
void CombineRowsBackwardCuda(const CombineRowsBackwardCudaArgs& args, void* stream);

// groups[t, m] = m where some id of token t lies in [m * group_size, (m + 1) * group_size), else
// -1.
void GroupsOfTokensCuda(int64_t tokens, int64_t A, int64_t groups, int64_t group_size,
                        const int32_t* ids_TA, int32_t* groups_TM, void* stream);

}  // namespace baleen
