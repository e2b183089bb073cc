// Files as a run needs them: mapped or read with a size limit, written durably, named in every
// error.
//
// Durable means: written to a temporary name beside the target, checked, fsynced, renamed,
// directory fsynced. A reader then sees the old file or the new one, never a torn one (reliability:
// save protocol).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/core/owned.h"
#include "kernels/core/status.h"

namespace baleen {

void CloseDescriptor(int descriptor);
using FileDescriptor = Owned<int, CloseDescriptor, -1>;

// A regular file mapped read-only. Symbolic links are followed to a regular file (as in the hub's
// cache).
class MappedFile {
 public:
  // DataError when the file is missing, not regular or cannot be mapped.
  static absl::StatusOr<MappedFile> Open(const std::string& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  absl::Span<const uint8_t> bytes() const {
    return absl::MakeConstSpan(static_cast<const uint8_t*>(data_), size_);
  }
  const std::string& path() const { return path_; }
  // DataError when the file was replaced or changed length or time since it was mapped; call it
  // before a long read, since a truncated mapping would kill the process.
  absl::Status CheckUnchanged() const;

 private:
  MappedFile() = default;
  std::string path_;
  void* data_ = nullptr;
  size_t size_ = 0;
  uint64_t inode_ = 0;
  int64_t modified_ns_ = 0;
  FileDescriptor descriptor_;
};

// The whole file; DataError when it is missing or larger than `limit_bytes`.
absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t limit_bytes);

// Durable write of a small file. EnvironmentError names the path and the system's reason.
absl::Status WriteFileDurably(const std::string& path, absl::string_view contents);

// fsync of a file that was just written, and of a directory whose entries changed.
absl::Status SyncFile(const std::string& path);
absl::Status SyncDirectory(const std::string& path);

// Creates a directory and its parents; ok when it exists.
absl::Status MakeDirectories(const std::string& path);

bool FileExists(const std::string& path);
bool DirectoryExists(const std::string& path);

// XXH3-128 of bytes, as 32 hexadecimal digits.
std::string Hash128(absl::Span<const uint8_t> bytes);
absl::StatusOr<std::string> HashFile(const std::string& path);

// "a/b" from ("a", "b").
std::string JoinPath(absl::string_view directory, absl::string_view name);
// Last component of a path.
std::string Basename(absl::string_view path);

}  // namespace baleen
