// How rows move between the ranks that share a microbatch (batch.h has the letters R, G, T). On one
// rank each returns its argument.
//
// What is gathered are rows (of latents, keys, ids, or of x for the MLP); what comes back are sums:
// each pair is one another's transpose, forward and backward.
#pragma once

#include "trainer/model/model_context.h"

namespace baleen {

// [R, ...] of each rank of tp -> [G, ...]
Tensor GatherGroup(const ModelContext& model, absl::string_view label, const Tensor& own_R);
// [G, ...] partial sums -> [R, ...] sums over tp
Tensor ReduceScatterGroup(const ModelContext& model, absl::string_view label, const Tensor& sum_G);

// [R, ...] of each rank of cp_tp -> [T, ...] in the order of keys
Tensor GatherKeys(const ModelContext& model, const Batch& batch, absl::string_view label,
                  const Tensor& own_R);
// [T, ...] partial sums in the order of keys -> [R, ...] sums over cp_tp
Tensor ReduceScatterKeys(const ModelContext& model, const Batch& batch, absl::string_view label,
                         const Tensor& sum_T);

}  // namespace baleen
