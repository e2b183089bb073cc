// Reader of HDF5 token files: /tokens u32 [N], /doc_ends u64 [M] (exclusive ends, the last one N),
// root attributes format = "dsa-tokens", version = 1, vocab_size, and where known eos_id and
// tokenizer_sha256.
//
// HDF5 itself is used at Open only: it says where the raw bytes of /tokens stand (contiguous, or
// unfiltered chunks), and tokens are then read with pread. So a batch never waits for, or races
// with, the HDF5 calls of a checkpoint.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "data/guarded_file.h"
#include "kernels/core/status.h"

namespace baleen {

class Hdf5Tokens {
 public:
  // DataError names the file, the dataset or attribute, expected and found. Links to other files,
  // external and virtual storage, filters and user blocks are refused.
  static absl::StatusOr<Hdf5Tokens> Open(const std::string& path);

  const std::string& path() const { return file_.path(); }
  int64_t num_documents() const { return static_cast<int64_t>(document_ends_.size()); }
  int64_t num_tokens() const { return num_tokens_; }
  int64_t document_begin(int64_t document) const {
    return document == 0 ? 0 : static_cast<int64_t>(document_ends_[document - 1]);
  }
  // The attributes; -1 when the file has no eos_id.
  int64_t vocab_size() const { return vocab_size_; }
  int64_t eos_id() const { return eos_id_; }
  // As IndexedTokens. An id above 2^31 - 1 is a DataError.
  absl::Status CopyTokens(int64_t begin, absl::Span<int32_t> out) const;
  absl::Status CheckUnchanged() const { return file_.CheckUnchanged(); }

 private:
  explicit Hdf5Tokens(GuardedFile file) : file_(std::move(file)) {}
  // Reads shapes, attributes, document ends and the places of the tokens out of the HDF5 file.
  absl::Status ReadStructure();

  GuardedFile file_;
  int64_t num_tokens_ = 0;
  int64_t vocab_size_ = 0;
  int64_t eos_id_ = -1;
  int64_t chunk_tokens_ = 0;            // tokens in one piece; contiguous storage is one piece
  std::vector<int64_t> chunk_offsets_;  // file offset of each piece
  std::vector<uint64_t> document_ends_;
};

}  // namespace baleen
