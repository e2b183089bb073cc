// Input for the state layer: reads that tell a damaged file (DataError) from a sick disk
// (EnvironmentError).
//
// The difference decides what a resume does: damage means "set this state aside, try the one
// before"; a read error means "stop and say so", because the same file may be whole tomorrow.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/types/span.h"
#include "kernels/core/file.h"
#include "kernels/core/status.h"

namespace baleen {

// XXH3-128 in parts; the same value as Hash128 of the whole.
class StreamHash {
 public:
  StreamHash();
  ~StreamHash();
  StreamHash(const StreamHash&) = delete;
  StreamHash& operator=(const StreamHash&) = delete;
  void Update(absl::Span<const uint8_t> bytes);
  std::string Hex() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

struct OpenedFile {
  FileDescriptor descriptor;
  int64_t bytes = 0;
};

// A regular file, no symbolic link. DataError when it is missing or something else.
absl::StatusOr<OpenedFile> OpenStateFile(const std::string& path);

// Calls `use(offset, block)` for the file's bytes in order, in blocks of at most 4 MiB; DataError
// when there are fewer bytes than `bytes`.
absl::Status ForEachBlock(
    int descriptor, const std::string& path, int64_t bytes,
    absl::FunctionRef<absl::Status(int64_t offset, absl::Span<const uint8_t> block)> use);

// Size and XXH3-128 hash must be these.
absl::Status VerifyFileHash(const std::string& path, int64_t bytes, const std::string& hash);

// The whole of a small file.
absl::StatusOr<std::string> ReadStateText(const std::string& path, int64_t limit_bytes);

}  // namespace baleen
