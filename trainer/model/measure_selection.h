// Compares what the indexer selects with what dense attention would look at, on a few query rows of
// a microbatch.
//
// The dense target of those rows is made from the latents on the spot, so that it can be asked in
// every stage and form of attention; the cost is that of R query rows, not of T.
#pragma once

#include "kernels/ops/indexer/indexer_loss.h"
#include "trainer/model/indexer.h"
#include "trainer/model/mla.h"

namespace baleen {

// Rows spread evenly over the microbatch, the last row among them, the same on every layout: the
// n-th of `count` is (n + 1) * num_rows / count - 1. Fewer when there are fewer rows.
std::vector<int32_t> SampleRows(int64_t num_rows, int64_t count);

// Results are of the sampled rows that this rank holds (none: empty tensors).
SelectionQualityResult MeasureSelection(const ModelContext& model, const Batch& batch,
                                        int64_t count, const Mla& mla, const Mla::Saved& latents,
                                        const Indexer::Saved& index);

// Keys chosen without an indexer (kRandom, kLast): ids_TK like those of TopkSelect.
Tensor SelectWithoutIndexer(const ModelContext& model, const Batch& batch, int64_t layer);

}  // namespace baleen
