#include "data/loader.h"

#include <algorithm>
#include <limits>

#include "absl/strings/str_join.h"
#include "kernels/core/check.h"

namespace baleen {
namespace {

constexpr int32_t kNoLoss = -1;
constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();  // rows are int32 in key_begin

absl::Status CheckOptions(const LoaderOptions& options) {
  if (options.seq_length < 1 || options.seq_length >= kMaxRows) {
    return ConfigError("data.seq_length: found ", options.seq_length, ", expected 1 to ",
                       kMaxRows - 1);
  }
  if (options.first_sample < 0) {
    return ConfigError("data.first_sample: found ", options.first_sample, ", expected 0 or more");
  }
  if (options.vocab_size < 1) {
    return ConfigError("data: vocabulary of the model: found ", options.vocab_size,
                       ", expected 1 or more");
  }
  return absl::OkStatus();
}

absl::Status CheckSizes(int64_t global_batch_size, int64_t micro_batch_size, int64_t dp_size,
                        int64_t seq_length) {
  if (micro_batch_size < 1 || micro_batch_size > kMaxRows / seq_length) {
    return ConfigError("micro_batch_size: found ", micro_batch_size, ", expected 1 to ",
                       kMaxRows / seq_length, " samples of ", seq_length, " tokens");
  }
  if (global_batch_size < 1 || global_batch_size % (micro_batch_size * dp_size) != 0) {
    return ConfigError("global_batch_size: found ", global_batch_size,
                       ", expected a multiple of micro_batch_size x data parallel size = ",
                       micro_batch_size, " x ", dp_size, " = ", micro_batch_size * dp_size);
  }
  return absl::OkStatus();
}

absl::StatusOr<Dataset> OpenSource(const LoaderOptions& options, size_t source_idx) {
  ASSIGN_OR_RETURN(TokenSource source, TokenSource::Open(options.sources[source_idx].path));
  return Dataset::Create(std::move(source), {.seq_length = options.seq_length,
                                             .seed = options.seed,
                                             .source_idx = static_cast<uint32_t>(source_idx),
                                             .order = options.order});
}

// Appends the L rows of one sample.
void AppendSample(const Sample& sample, bool document_mask, Microbatch& batch) {
  const auto length = static_cast<int32_t>(batch.seq_length);
  const auto first_row = static_cast<int32_t>(batch.tokens.size());
  CHECK_EQ(std::ssize(sample.tokens), length + 1);
  // Which document piece position i lies in, for i = 0 .. L; without a mask all are one.
  std::vector<int32_t> piece_begin(length + 1, 0);
  if (document_mask) {
    for (size_t d = 0; d < sample.document_begins.size(); ++d) {
      const int32_t begin = sample.document_begins[d];
      const bool last = d + 1 == sample.document_begins.size();
      const int32_t end = last ? length + 1 : sample.document_begins[d + 1];
      std::fill(piece_begin.begin() + begin, piece_begin.begin() + end, begin);
    }
  }
  for (int32_t i = 0; i < length; ++i) {
    const bool next_same = piece_begin[i + 1] == piece_begin[i];
    const bool after_next_same = i + 2 <= length && piece_begin[i + 2] == piece_begin[i];
    batch.tokens.push_back(sample.tokens[i]);
    batch.targets.push_back(next_same ? sample.tokens[i + 1] : kNoLoss);
    batch.mtp_tokens.push_back(sample.tokens[i + 1]);
    batch.mtp_targets.push_back(after_next_same ? sample.tokens[i + 2] : kNoLoss);
    batch.positions.push_back(i - piece_begin[i]);
    batch.key_begin.push_back(first_row + piece_begin[i]);
    if (piece_begin[i] == i) batch.bounds.push_back(first_row + i);
    batch.num_targets += next_same;
    batch.num_mtp_targets += after_next_same;
  }
}

}  // namespace

Microbatch MakeMicrobatch(const std::vector<Sample>& samples, bool document_mask) {
  CHECK(!samples.empty());
  Microbatch batch;
  batch.num_samples = std::ssize(samples);
  batch.seq_length = std::ssize(samples[0].tokens) - 1;
  const int64_t rows = batch.num_samples * batch.seq_length;
  for (auto* column : {&batch.tokens, &batch.targets, &batch.mtp_tokens, &batch.mtp_targets,
                       &batch.positions, &batch.key_begin}) {
    column->reserve(rows);
  }
  for (const Sample& sample : samples) AppendSample(sample, document_mask, batch);
  batch.bounds.push_back(static_cast<int32_t>(rows));
  return batch;
}

absl::StatusOr<Loader> Loader::Open(LoaderOptions options) {
  RETURN_IF_ERROR(CheckOptions(options));
  std::vector<double> weights;
  for (const DataSourceOptions& source : options.sources) weights.push_back(source.weight);
  ASSIGN_OR_RETURN(Blend blend, Blend::Create(weights));
  std::vector<Dataset> datasets;
  std::vector<std::string> faults;  // of all sources, so that one attempt shows them all
  for (size_t i = 0; i < options.sources.size(); ++i) {
    absl::StatusOr<Dataset> dataset = OpenSource(options, i);
    if (dataset.ok()) {
      datasets.push_back(*std::move(dataset));
    } else {
      faults.emplace_back(dataset.status().message());
    }
  }
  if (!faults.empty()) return DataError(absl::StrJoin(faults, "\n"));
  return Loader(std::move(options), std::move(blend), std::move(datasets));
}

absl::StatusOr<Sample> Loader::ReadSample(int64_t sample) {
  const Blend::Pick pick = blend_.At(options_.first_sample + sample);
  return datasets_[pick.source_idx].ReadSample(pick.sample, options_.vocab_size);
}

absl::StatusOr<std::vector<Microbatch>> Loader::Step(int64_t consumed_samples,
                                                     int64_t global_batch_size,
                                                     int64_t micro_batch_size, int64_t dp_rank,
                                                     int64_t dp_size) {
  CHECK_GE(consumed_samples, 0);
  CHECK(dp_size >= 1 && dp_rank >= 0 && dp_rank < dp_size) << dp_rank << " of " << dp_size;
  RETURN_IF_ERROR(CheckSizes(global_batch_size, micro_batch_size, dp_size, options_.seq_length));
  for (const Dataset& dataset : datasets_) RETURN_IF_ERROR(dataset.source().CheckUnchanged());
  const int64_t num_microbatches = global_batch_size / (micro_batch_size * dp_size);
  std::vector<Microbatch> batches;
  for (int64_t m = 0; m < num_microbatches; ++m) {
    const int64_t first = consumed_samples + (m * dp_size + dp_rank) * micro_batch_size;
    std::vector<Sample> samples;
    for (int64_t b = 0; b < micro_batch_size; ++b) {
      ASSIGN_OR_RETURN(Sample sample, ReadSample(first + b));
      samples.push_back(std::move(sample));
    }
    batches.push_back(MakeMicrobatch(samples, options_.document_mask));
  }
  return batches;
}

absl::Status Loader::CheckVocabulary() const {
  for (const Dataset& dataset : datasets_) {
    RETURN_IF_ERROR(dataset.source().CheckVocabulary(options_.vocab_size));
  }
  return absl::OkStatus();
}

std::vector<SourceSummary> Loader::Summary() const {
  std::vector<SourceSummary> result;
  for (size_t i = 0; i < datasets_.size(); ++i) {
    const TokenSource& source = datasets_[i].source();
    result.push_back({source.path(), source.num_documents(), source.num_tokens(),
                      datasets_[i].samples_per_epoch(),
                      static_cast<double>(blend_.parts(i)) / static_cast<double>(blend_.period())});
  }
  return result;
}

}  // namespace baleen
