// The data loader: microbatches as a pure function of (options, consumed samples, batch sizes,
// dp_rank, dp_size). Sample n of a run comes from the source that the blend names for n (blend.h),
// packed from its documents (dataset.h).
// Shape legend: B = micro_batch_size, L = seq_length; row b * L + i is position i of sample b.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "data/blend.h"
#include "data/dataset.h"
#include "kernels/core/status.h"

namespace baleen {

struct Microbatch {
  int64_t num_samples = 0;  // B
  int64_t seq_length = 0;   // L
  // All [B * L]. A sample is L + 1 tokens t_0 .. t_L; row i of a sample holds t_i and predicts
  // t_{i+1}.
  std::vector<int32_t> tokens;  // t_i
  // t_{i+1}; -1 = no loss: the next token is of another, masked document.
  std::vector<int32_t> targets;
  // t_{i+1}, whose embedding the MTP module takes; always a valid id.
  std::vector<int32_t> mtp_tokens;
  // t_{i+2}; -1 = no loss: i = L - 1, or the three tokens are not of one document.
  std::vector<int32_t> mtp_targets;
  std::vector<int32_t> positions;  // row - key_begin[row]
  // First row that a row may attend to: where its sample begins, with document_mask where its
  // document begins (or the sample, when the document began before it). The last is the row itself.
  std::vector<int32_t> key_begin;
  // The distinct values of key_begin, ascending, then B * L (cu_seqlens of variable-length
  // attention kernels).
  std::vector<int32_t> bounds;
  int64_t num_targets = 0;      // targets that are not -1
  int64_t num_mtp_targets = 0;  // mtp_targets that are not -1
};

struct DataSourceOptions {
  std::string path;  // as TokenSource::Open takes it
  double weight = 1.0;
};

struct LoaderOptions {
  std::vector<DataSourceOptions> sources;
  int64_t seq_length = 0;
  uint64_t seed = 0;
  int64_t vocab_size = 0;
  bool document_mask = false;
  SampleOrder order = SampleOrder::kShuffled;  // kFileOrder for validation
  int64_t first_sample = 0;                    // of the blend: sample 0 of the run
};

// What a source contributes, for the banner and the plan.
struct SourceSummary {
  std::string path;
  int64_t num_documents = 0;
  int64_t num_tokens = 0;
  int64_t samples_per_epoch = 0;
  double share = 0;  // part of all samples, 0..1
};

class Loader {
 public:
  // ConfigError: options that cannot be; DataError: a file that is missing, broken or shorter than
  // one sample.
  static absl::StatusOr<Loader> Open(LoaderOptions options);

  // This dp rank's microbatches of the step that takes samples [consumed, consumed + global batch).
  // Of those, microbatch m of rank d holds, for b = 0 .. micro_batch_size - 1,
  //   consumed + (m * dp_size + d) * micro_batch_size + b,
  // so every dp_size trains on the same set, and a restart needs `consumed_samples` and nothing
  // else. ConfigError when the global batch is no multiple of micro_batch_size * dp_size; DataError
  // when a file changed or a token is outside the vocabulary.
  absl::StatusOr<std::vector<Microbatch>> Step(int64_t consumed_samples, int64_t global_batch_size,
                                               int64_t micro_batch_size, int64_t dp_rank,
                                               int64_t dp_size);

  // Reads every token of every source once (baleen inspect --verify, train --dry-run). Step checks
  // what it reads.
  absl::Status CheckVocabulary() const;
  std::vector<SourceSummary> Summary() const;
  const LoaderOptions& options() const { return options_; }

 private:
  Loader(LoaderOptions options, Blend blend, std::vector<Dataset> datasets)
      : options_(std::move(options)), blend_(std::move(blend)), datasets_(std::move(datasets)) {}
  absl::StatusOr<Sample> ReadSample(int64_t sample);

  LoaderOptions options_;
  Blend blend_;
  std::vector<Dataset> datasets_;
};

// Rows, targets and masks of one microbatch from its samples, all of one length.
Microbatch MakeMicrobatch(const std::vector<Sample>& samples, bool document_mask);

}  // namespace baleen
