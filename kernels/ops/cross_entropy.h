// Cross-entropy over a vocabulary that may be split over ranks, in two passes with a tiny exchange
// in between:
//
//   1. statistics of the local columns: m[t] = max_w logits, z[t] = sum_w exp(logits - m),
//      y[t] = logits[target] or 0
//   2. (ranks combine: M = max m, Z = sum z exp(m - M), Y = sum y)
//      loss[t] = log Z + M - Y
//      dlogits = scale * (exp(logits - M) / Z - onehot(target)), written over the logits
// A target of -1 carries no loss and no gradient. Logits are kF32 or kF64 on the CPU, kF32 or kBF16
// on CUDA (the gradient is rounded once); statistics and losses kF32 (kF64 for kF64 logits).
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

struct CrossEntropyStats {
  Tensor row_max_T;       // kF32 (kF64 for kF64 logits)
  Tensor row_sum_T;       // sum of exp(logit - row_max)
  Tensor target_logit_T;  // 0 where the target is not among the local columns
};

// logits_TW: columns are ids vocab_begin .. vocab_begin + W - 1. targets_T kI32, -1 = ignored.
CrossEntropyStats CrossEntropyLocalStats(const Context& context, const Tensor& logits_TW,
                                         const Tensor& targets_T, int64_t vocab_begin);

// Combines the statistics of `parts` ranks, each tensor being [parts, T], into those of the whole
// vocabulary [T].
CrossEntropyStats CombineCrossEntropyStats(const Context& context, const CrossEntropyStats& parts);

// Per-row loss [T] from whole-vocabulary statistics; 0 where the target is -1.
Tensor CrossEntropyLoss(const Context& context, const CrossEntropyStats& stats,
                        const Tensor& targets_T);

// Overwrites logits_TW with scale * d loss / d logits.
void CrossEntropyBackwardInPlace(const Context& context, const Tensor& logits_TW,
                                 const Tensor& targets_T, const CrossEntropyStats& stats,
                                 int64_t vocab_begin, double scale);

}  // namespace baleen
