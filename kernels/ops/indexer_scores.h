// Lightning-indexer scores (spec 1.1): I[t, s] = sum_j w[t, j] * relu(q^I[t, j] . k^I[s]).
//
// Legend: T query rows, S keys, I index heads, J index_head_dim. w has the folded scale I^-0.5 J^-0.5 in it.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"
#include "kernels/ops/attention.h"

namespace baleen {

// scores_TS; -inf outside the row's window. The caller chooses chunks of query rows: T x S is what is allocated.
Tensor IndexerScores(const Context& context, const Tensor& q_TIJ, const Tensor& k_SJ,
                     const Tensor& w_TI, const KeyWindows& windows);

}  // namespace baleen
