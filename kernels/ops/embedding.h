// Embedding rows, for a whole vocabulary or one rank's part of it: y[t] = table[ids[t] -
// vocab_begin], zero where the id belongs to another rank. Backward: dtable[id - vocab_begin] +=
// dy[t], summed in the order of t.
//
// On the CPU kF32 and kF64, on CUDA kF32 and kBF16. dtable is kF32 (kF64 for kF64 dy); on CUDA the
// rows of a word are added up in fp32 before they are added to it.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

// ids_T kI32 [T]; table_WD [W, D] holds ids vocab_begin .. vocab_begin + W - 1.
Tensor EmbeddingLookup(const Context& context, const Tensor& ids_T, const Tensor& table_WD,
                       int64_t vocab_begin);
void EmbeddingBackward(const Context& context, const Tensor& ids_T, const Tensor& dy_TD,
                       const Tensor& dtable_WD, int64_t vocab_begin);

}  // namespace baleen
