// Reader of Megatron's indexed token files: PREFIX.bin holds tokens back to back, PREFIX.idx says
// where documents begin.
//
//   .idx, little-endian: "MMIDIDX\0\0" | u64 version 1 | u8 type | u64 S sequences | u64 D document
//   indices |
//                        i32[S] tokens per sequence | i64[S] byte offsets in .bin | i64[D] first
//                        sequence of documents
//
// An .idx is hostile until Parse has compared every entry with the others and with the size of
// .bin.
#pragma once

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "data/guarded_file.h"
#include "kernels/core/file.h"
#include "kernels/core/status.h"

namespace baleen {

// Element types of token ids; the numbers are Megatron's codes. Other codes of the format are
// refused by name.
enum class TokenType : uint8_t { kUint8 = 1, kInt32 = 4, kUint16 = 8 };

int TokenBytes(TokenType type);
absl::string_view TokenTypeName(TokenType type);
// Megatron's own choice: u16 below 65,500 ids, i32 from there on.
TokenType TokenTypeForVocabulary(int64_t vocab_size);

// What an .idx says, checked. It is a view: `bytes` must outlive it.
class TokenIndex {
 public:
  // DataError names `idx_path`, the entry, what was expected and found. Allocates nothing.
  static absl::StatusOr<TokenIndex> Parse(absl::Span<const uint8_t> bytes, int64_t bin_bytes,
                                          absl::string_view idx_path, absl::string_view bin_path);

  TokenType type() const { return type_; }
  int64_t num_sequences() const { return num_sequences_; }
  int64_t num_documents() const { return num_documents_; }
  int64_t num_tokens() const { return num_tokens_; }
  // Token offset at which a document begins, in [0, num_documents()]; the last one is num_tokens().
  int64_t document_begin(int64_t document) const;

 private:
  TokenIndex() = default;
  absl::Span<const uint8_t> bytes_;
  TokenType type_ = TokenType::kInt32;
  int64_t num_sequences_ = 0;
  int64_t num_documents_ = 0;
  int64_t num_tokens_ = 0;
};

// An open pair of files. The index is mapped (shared by all ranks of a host), tokens are read with
// pread.
class IndexedTokens {
 public:
  // `prefix` is the path without .bin / .idx.
  static absl::StatusOr<IndexedTokens> Open(const std::string& prefix);

  const std::string& path() const { return prefix_; }
  TokenType type() const { return index_.type(); }
  int64_t num_documents() const { return index_.num_documents(); }
  int64_t num_tokens() const { return index_.num_tokens(); }
  int64_t document_begin(int64_t document) const { return index_.document_begin(document); }
  // Tokens [begin, begin + out.size()) of the whole set, across documents. DataError when the file
  // became shorter.
  absl::Status CopyTokens(int64_t begin, absl::Span<int32_t> out) const;
  // DataError when either file was replaced, truncated or touched since Open. Call it once a batch,
  // before the index is used: a truncated mapping would end the process.
  absl::Status CheckUnchanged() const;

 private:
  IndexedTokens(std::string prefix, MappedFile idx, GuardedFile bin, TokenIndex index)
      : prefix_(std::move(prefix)), idx_(std::move(idx)), bin_(std::move(bin)), index_(index) {}
  std::string prefix_;
  MappedFile idx_;
  GuardedFile bin_;
  TokenIndex index_;  // looks into idx_
};

}  // namespace baleen
