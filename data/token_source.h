// A set of tokenised documents, whatever file holds it: Megatron .bin/.idx or HDF5. Documents are
// consecutive ranges of one long row of token ids.
#pragma once

#include <cstdint>
#include <string>
#include <variant>

#include "absl/types/span.h"
#include "data/hdf5_tokens.h"
#include "data/indexed_tokens.h"
#include "kernels/core/status.h"

namespace baleen {

class TokenSource {
 public:
  // `path` is a Megatron prefix (PREFIX, PREFIX.bin or PREFIX.idx) or an HDF5 token file (*.h5,
  // *.hdf5).
  static absl::StatusOr<TokenSource> Open(const std::string& path);
  explicit TokenSource(IndexedTokens tokens) : tokens_(std::move(tokens)) {}
  explicit TokenSource(Hdf5Tokens tokens) : tokens_(std::move(tokens)) {}

  const std::string& path() const;
  // How ids are stored, for reports: "u16", "i32", "HDF5 u32", ...
  std::string Format() const;
  // The HDF5 reader, whose attributes name vocabulary and eos; null for Megatron's files.
  const Hdf5Tokens* hdf5() const { return std::get_if<Hdf5Tokens>(&tokens_); }
  int64_t num_documents() const;
  int64_t num_tokens() const;
  // Token offset of a document, in [0, num_documents()]; the last one is num_tokens().
  int64_t document_begin(int64_t document) const;
  int64_t document_length(int64_t document) const {
    return document_begin(document + 1) - document_begin(document);
  }
  // The document that holds a token offset (empty documents hold none).
  int64_t DocumentOf(int64_t token) const;
  // Tokens [begin, begin + out.size()); the range must lie inside [0, num_tokens()).
  absl::Status CopyTokens(int64_t begin, absl::Span<int32_t> out) const;
  // "12 documents, 3456 tokens, samples HASH": what tells this set from another of the same path;
  // the hash is of tokens and of documents' offsets at 64 evenly spaced places each.
  absl::StatusOr<std::string> Contents() const;
  // DataError when a file was replaced, truncated or touched since Open.
  absl::Status CheckUnchanged() const;

  // Reads every token; DataError names file, document and offset of the first id outside [0,
  // vocab_size).
  absl::Status CheckVocabulary(int64_t vocab_size) const;
  // The same for tokens that were just copied from offset `begin`.
  absl::Status CheckTokens(int64_t begin, absl::Span<const int32_t> tokens,
                           int64_t vocab_size) const;

 private:
  std::variant<IndexedTokens, Hdf5Tokens> tokens_;
};

}  // namespace baleen
