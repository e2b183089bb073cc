// What a step keeps of its selections, added up where the ids are: a hash of the chosen keys and
// the NaN flag of the scores. The host reads them with the metrics.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

// result_1 (kI64 [1]) += sum over rows r of h(r), h(r) = (sum over the ids i >= 0 of row r of
// mix(row_R[r], i) mod 2^64) >> 33: below 2^31 a row, so that the sum over a step's rows stays
// inside 64 bits. Two runs with the same number have selected the same keys in the same rows; the
// order of ids and rows does not count. row_R kI32 [R], ids_RK kI32 [R, K], -1: none.
void AddSelectionHash(const Context& context, const Tensor& row_R, const Tensor& ids_RK,
                      const Tensor& result_1);

// first_1 (kI32 [1]) = offset + nan_row_1[0] where that is a row (>= 0) and first_1 is none (-1)
// yet.
void KeepFirstNanRow(const Context& context, const Tensor& nan_row_1, int64_t offset,
                     const Tensor& first_1);
// count_1 (kI64 [1]) += 1 where nan_row_1 (kI32 [1]) is a row.
void CountNanRow(const Context& context, const Tensor& nan_row_1, const Tensor& count_1);

}  // namespace baleen
