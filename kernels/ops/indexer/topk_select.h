// Exact, deterministic top-k of each row's window: higher score first, then lower index;
// -0.0 == +0.0.
//
// ids are ascending, padded with -1 at the end; a row whose window has K keys or fewer gets all of
// them. Only scores inside the windows are read.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"
#include "kernels/ops/attention/attention.h"

namespace baleen {

struct TopkResult {
  Tensor ids_TK;     // kI32
  Tensor ties_T;     // kI32: keys left out although their score equals the smallest chosen one
  Tensor nan_row_1;  // kI32 [1]: lowest row with a NaN inside its window, -1 if none; such a row's
                     // ids are all -1. A NaN is an error of the run; it is read with the metrics:
                     // selecting never waits for the host.
  Tensor scores_TK;  // like the scores: of ids_TK, 0 where the id is -1; empty unless asked for
};

enum class ChosenScores : uint8_t { kDrop, kKeep };

// On CUDA scores are kF32, at most 2^18 a row, and k <= 2048.
TopkResult TopkSelect(const Context& context, const Tensor& scores_TS, const KeyWindows& windows,
                      int64_t k, ChosenScores chosen = ChosenScores::kDrop);

// The CUDA kernel that runs, in words.
std::string TopkSelectKernelName();

}  // namespace baleen
