// Writer of Megatron's PREFIX.bin / PREFIX.idx, byte for byte what Megatron's own builder writes
// when each document is one sequence. Durable: both files grow under temporary names; Finish
// checks, syncs and renames them.
#pragma once

#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "data/indexed_tokens.h"
#include "kernels/core/owned.h"
#include "kernels/core/status.h"

namespace baleen {

void CloseStream(std::FILE* file);
using OwnedStream = Owned<std::FILE*, CloseStream>;

class IndexedTokensWriter {
 public:
  // Creates the directory of `prefix` where it is missing. EnvironmentError when the file cannot be
  // created.
  static absl::StatusOr<IndexedTokensWriter> Create(const std::string& prefix, TokenType type);
  IndexedTokensWriter(IndexedTokensWriter&&) = default;
  IndexedTokensWriter& operator=(IndexedTokensWriter&&) = delete;
  ~IndexedTokensWriter();  // without Finish nothing stays behind

  // May be empty. DataError when an id does not fit the type.
  absl::Status AddDocument(absl::Span<const int32_t> tokens);
  int64_t num_documents() const { return static_cast<int64_t>(lengths_.size()); }
  int64_t num_tokens() const { return num_tokens_; }

  // Puts the pair in place. An old index is removed first and the new one appears last: whatever
  // happens between, no reader meets an index beside the .bin of another set.
  absl::Status Finish();

 private:
  IndexedTokensWriter(std::string prefix, TokenType type);
  std::string prefix_;
  std::string temporary_bin_;
  TokenType type_;
  OwnedStream bin_;  // empty once finished
  std::vector<int32_t> lengths_;
  int64_t num_tokens_ = 0;
};

}  // namespace baleen
