#include "data/dataset.h"

#include <algorithm>

#include "kernels/core/check.h"

namespace baleen {
namespace {

// Names of the two orders of an epoch, as IndexOrder takes them.
constexpr uint32_t kDocumentPurpose = 1;
constexpr uint32_t kSamplePurpose = 2;

constexpr size_t kPlansKept = 2;

}  // namespace

Dataset::Dataset(TokenSource source, const DatasetOptions& options)
    : source_(std::move(source)),
      options_(options),
      samples_per_epoch_((source_.num_tokens() - 1) / options.seq_length) {}

absl::StatusOr<Dataset> Dataset::Create(TokenSource source, const DatasetOptions& options) {
  CHECK_GE(options.seq_length, 1);
  if (source.num_tokens() < options.seq_length + 1) {
    return DataError(
        source.path(), ": the set has ", source.num_tokens(), " tokens in ", source.num_documents(),
        " documents, expected at least one sample of seq_length + 1 = ", options.seq_length + 1,
        "; use more text or a shorter data.seq_length");
  }
  return Dataset(std::move(source), options);
}

IndexOrder Dataset::DocumentOrder(int64_t epoch) const {
  const int64_t size = source_.num_documents();
  if (options_.order == SampleOrder::kFileOrder) return IndexOrder::Identity(size);
  return IndexOrder::Shuffled(size, options_.seed, kDocumentPurpose, options_.source_idx, epoch);
}

IndexOrder Dataset::OrderOfSamples(int64_t epoch) const {
  if (options_.order == SampleOrder::kFileOrder) return IndexOrder::Identity(samples_per_epoch_);
  return IndexOrder::Shuffled(samples_per_epoch_, options_.seed, kSamplePurpose,
                              options_.source_idx, epoch);
}

const Dataset::EpochPlan& Dataset::PlanOf(int64_t epoch) {
  if (options_.order == SampleOrder::kFileOrder) epoch = 0;  // all epochs are the same
  for (const EpochPlan& plan : plans_) {
    if (plan.epoch == epoch) return plan;
  }
  if (plans_.size() == kPlansKept) plans_.erase(plans_.begin());
  EpochPlan& plan = plans_.emplace_back();
  plan.epoch = epoch;
  const IndexOrder documents = DocumentOrder(epoch);
  plan.block_begins.reserve(documents.size() / kDocumentsPerBlock + 1);
  int64_t begin = 0;
  for (int64_t place = 0; place < documents.size(); ++place) {
    if (place % kDocumentsPerBlock == 0) plan.block_begins.push_back(begin);
    begin += source_.document_length(documents.At(place));
  }
  return plan;
}

absl::StatusOr<Sample> Dataset::ReadSample(int64_t sample, int64_t vocab_size) {
  CHECK_GE(sample, 0);
  const int64_t epoch = sample / samples_per_epoch_;
  const int64_t begin = OrderOfSamples(epoch).At(sample % samples_per_epoch_) * options_.seq_length;
  const IndexOrder documents = DocumentOrder(epoch);
  const std::vector<int64_t>& blocks = PlanOf(epoch).block_begins;
  const int64_t block = std::upper_bound(blocks.begin(), blocks.end(), begin) - blocks.begin() - 1;

  Sample result;
  result.tokens.resize(options_.seq_length + 1);
  int64_t filled = 0;
  int64_t document_begin = blocks[block];  // in the stream of the epoch
  for (int64_t place = block * kDocumentsPerBlock; filled < std::ssize(result.tokens); ++place) {
    if (place == documents.size()) {
      return DataError(source_.path(), ": document lengths changed while the file was in use");
    }
    const int64_t document = documents.At(place);
    const int64_t length = source_.document_length(document);
    const int64_t skip =
        begin + filled - document_begin;  // tokens of this document before the sample
    document_begin += length;
    if (skip >= length) continue;
    const int64_t count = std::min<int64_t>(length - skip, std::ssize(result.tokens) - filled);
    const int64_t token = source_.document_begin(document) + skip;
    const auto part = absl::MakeSpan(result.tokens).subspan(filled, count);
    RETURN_IF_ERROR(source_.CopyTokens(token, part));
    RETURN_IF_ERROR(source_.CheckTokens(token, part, vocab_size));
    result.document_begins.push_back(static_cast<int32_t>(filled));
    filled += count;
  }
  return result;
}

}  // namespace baleen
