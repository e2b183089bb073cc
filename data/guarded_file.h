// A file that is read in pieces over hours: pread instead of a mapping, so that a file cut short
// under the run is an error and not a SIGBUS, and an identity check (inode, length, time) for a
// file that was replaced.
#pragma once

#include <cstdint>
#include <string>

#include "absl/types/span.h"
#include "kernels/core/file.h"
#include "kernels/core/status.h"

namespace baleen {

class GuardedFile {
 public:
  // DataError when the file is missing or not a regular file.
  static absl::StatusOr<GuardedFile> Open(const std::string& path);

  const std::string& path() const { return path_; }
  int64_t size() const { return size_; }
  // Exactly out.size() bytes from `offset`; DataError when the file ends before.
  absl::Status ReadAt(int64_t offset, absl::Span<uint8_t> out) const;
  // DataError when the path names another file now, or the file changed length or time.
  absl::Status CheckUnchanged() const;

 private:
  GuardedFile() = default;
  std::string path_;
  FileDescriptor descriptor_;
  int64_t size_ = 0;
  uint64_t device_ = 0;
  uint64_t inode_ = 0;
  int64_t modified_ns_ = 0;
};

}  // namespace baleen
