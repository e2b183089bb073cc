// How fast the two forms of attention over selected keys run on a GPU, for choosing between them:
// measured on one H100 at 4K to 32K tokens, sparse ones at 32K with ids of a trained indexer (near)
// (kernels/bench/RESULTS_ops.md). Only the ratio counts, so one table serves H100 and H200.
#pragma once

#include <cstdint>

#include "kernels/core/dtype.h"

namespace baleen {

// TFLOP/s of counted work: 2 FLOP a multiply-add of the formula's products, whatever a kernel
// executes beside them.
struct AttentionSpeed {
  double forward = 0;
  double backward = 0;
};

// SparseAttention: work is counted over the selected keys, 2 (C + V) forward and 2 (3 C + 2 V)
// backward a head and key.
AttentionSpeed SparseAttentionSpeed(DType dtype, int64_t num_heads, int64_t width,
                                    int64_t value_dim, int64_t num_selected);
// MaskedAttention of sequences of num_keys: work is counted over all keys of causal windows, 2 (Q +
// V) and 2 (3 Q + 2 V).
AttentionSpeed MaskedAttentionSpeed(DType dtype, int64_t q_dim, int64_t v_dim, int64_t num_keys);

// What surrounds the kernels: a product at the tensor cores' speed, and one, or a copy, that memory
// bounds (absorbed projections: a head's [nope | latent] rows meet a weight of 128 x 512).
inline constexpr double kProjectionTflops = 720;
inline constexpr double kMemoryTerabytesPerSecond = 2.6;

}  // namespace baleen
