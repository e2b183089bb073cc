// `baleen data build`: text in, Megatron .bin/.idx out, and a PREFIX.json that says how the set was
// made.
#pragma once

#include <cstdint>
#include <string>

#include "data/documents.h"
#include "data/indexed_tokens.h"
#include "data/tokenizer.h"
#include "kernels/core/status.h"

namespace baleen {

struct BuildOptions {
  DocumentOptions documents;
  TokenizerOptions tokenizer;
  std::string prefix;       // PREFIX of .bin, .idx and .json
  bool append_eod = false;  // the tokenizer's eos id ends every document
};

struct BuildReport {
  DocumentCounts files;
  int64_t num_documents = 0;
  int64_t num_tokens = 0;
  int64_t text_bytes = 0;
  TokenizerInfo tokenizer;
  TokenType type = TokenType::kInt32;
  // Chain of XXH3-128 over the documents' texts in order: equal sources, equal hash, whatever the
  // tokenizer.
  std::string source_hash;
};

// ConfigError: no input, or append_eod with a tokenizer whose eos token is not known. DataError: as
// ForEachDocument, and when no document is found. A set that exists is not replaced (ConfigError):
// a run may be reading it.
absl::StatusOr<BuildReport> BuildTokens(const BuildOptions& options);

// A few lines for the terminal.
std::string Describe(const BuildReport& report, const std::string& prefix);

}  // namespace baleen
