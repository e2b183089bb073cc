// Moves columns between strided views: the rope part of a head, 512 into 576 columns, one key row
// to all heads. On the CPU kF32 and kF64, on CUDA kF32 and kBF16 (sums in fp32, one rounding).
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

// to = from, element by element. Same rows and cols; from.batch == to.batch, or 1: then every
// matrix of `to` gets it.
void CopyView(const Context& context, const MatrixView& from, const MatrixView& to);

// to += sum over the batch of from (in the order of the batch); to.batch == 1. The backward of a
// broadcast.
void AddBatchSum(const Context& context, const MatrixView& from, const MatrixView& to);

}  // namespace baleen
