// Packing: the documents of one source, in an order of the epoch, are laid end to end and cut into
// samples. An epoch of T tokens gives floor((T - 1) / L) samples of L + 1 tokens; sample k covers
// stream tokens [k L, k L + L]: neighbours share one token, every token but the first is a target
// once. Samples are then dealt in a second order, so that a batch is not all of one long document.
#pragma once

#include <cstdint>
#include <vector>

#include "data/index_order.h"
#include "data/token_source.h"
#include "kernels/core/status.h"

namespace baleen {

// kShuffled: documents and samples permuted anew each epoch; kFileOrder: as in the file, each epoch
// the same.
enum class SampleOrder { kShuffled, kFileOrder };

struct Sample {
  std::vector<int32_t> tokens;  // L + 1
  // Positions in `tokens` where a document, or the rest of one, begins; the first is 0.
  std::vector<int32_t> document_begins;
};

struct DatasetOptions {
  int64_t seq_length = 0;  // L
  uint64_t seed = 0;
  uint32_t source_idx = 0;  // place in the blend: equal files listed twice get different orders
  SampleOrder order = SampleOrder::kShuffled;
};

// The rules at the corners: the (T - 1) mod L tokens at the end of an epoch's order are left out
// (in shuffled epochs each time others); empty documents add nothing; a source with fewer than L +
// 1 tokens has no sample and is refused; a batch larger than an epoch runs into the next one. Both
// orders are functions of (seed, source, epoch).
class Dataset {
 public:
  // DataError when the source holds fewer than seq_length + 1 tokens.
  static absl::StatusOr<Dataset> Create(TokenSource source, const DatasetOptions& options);

  const TokenSource& source() const { return source_; }
  int64_t samples_per_epoch() const { return samples_per_epoch_; }
  // Sample `sample` >= 0 of the endless row of epochs; its ids are checked against `vocab_size`.
  // The first sample of an epoch costs a pass over the document lengths, the others a search in its
  // result.
  absl::StatusOr<Sample> ReadSample(int64_t sample, int64_t vocab_size);

 private:
  // Where in an epoch's stream every kDocumentsPerBlock-th document begins: random access without
  // O(documents) state.
  struct EpochPlan {
    int64_t epoch = -1;
    std::vector<int64_t> block_begins;
  };
  static constexpr int64_t kDocumentsPerBlock = 256;

  Dataset(TokenSource source, const DatasetOptions& options);
  IndexOrder DocumentOrder(int64_t epoch) const;
  IndexOrder OrderOfSamples(int64_t epoch) const;
  const EpochPlan& PlanOf(int64_t epoch);

  TokenSource source_;
  DatasetOptions options_;
  int64_t samples_per_epoch_;
  std::vector<EpochPlan> plans_;  // the last two epochs used: a batch may straddle them
};

}  // namespace baleen
