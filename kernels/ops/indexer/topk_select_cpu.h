// The CPU definition behind topk_select.h, for float and double. topk_select.cc has checked the
// arguments.
#pragma once

#include "kernels/ops/indexer/topk_select.h"

namespace baleen {

template <typename T>
TopkResult TopkSelectCpu(const Context& context, const Tensor& scores_TS, const KeyWindows& windows,
                         int64_t k, ChosenScores chosen);

}  // namespace baleen
