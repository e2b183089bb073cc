// How many layers each pipeline part holds: a solver over per-layer costs, and the check of a
// user's own numbers.
//
// Parts are numbered in the order of the model. The first holds the embedding, the last the head
// (final norm, head, MTP); every part has a layer or more, except that the last may hold the head
// alone. A rank's cost is the sum over its parts.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/core/status.h"

namespace baleen {

// Time of one microbatch, forward and backward, in any unit; 0 or more each.
struct StageCosts {
  double embedding = 0;
  std::vector<double> layers;  // [num_hidden_layers]
  double head = 0;             // final norm, head and loss, MTP
};

// Layers of each part, [num_parts] = [part_rank.size()]; part_rank says whose a part is (PartRanks,
// parallel/schedule.h). Ordered by: the largest cost of a rank, the largest cost of a part, the sum
// of the squared part costs, then fewer layers in earlier parts (whose ranks hold more
// microbatches).
//
// One part a rank: the best split, by dynamic programming over parts. Two parts a rank (loop or V):
// the least largest rank, by dynamic programming over ranks; from there single layers are handed
// from part to part while that betters the order. More parts a rank: such handing alone, from the
// split whose largest part is least; where layers cost about the same that ends at the least
// largest rank too, with very uneven ones it may miss it, in every case tried by less than the
// costliest layer.
//
// Costs are compared in units of 2^-28 of their sum, so that equal layers tie. The same input gives
// the same split on every rank. ConfigError if there are too few layers, with what fits.
absl::StatusOr<std::vector<int64_t>> SplitLayers(const StageCosts& costs,
                                                 const std::vector<int>& part_rank);

// parallelism.layer_split as a user wrote it: ConfigError for a wrong count or sum, a negative
// number, or a part without layers that is not the last; all that is wrong in one message.
absl::Status CheckLayerSplit(const std::vector<int64_t>& split, int num_parts, int64_t num_layers);

// One line a part: rank, layers first..last, embedding and head, its share of the whole cost and
// that of its rank. `split` has passed CheckLayerSplit.
std::string LayerSplitTable(const std::vector<int64_t>& split, const StageCosts& costs,
                            const std::vector<int>& part_rank);

}  // namespace baleen
