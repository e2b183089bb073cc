#include "data/guarded_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace baleen {
namespace {

int64_t ModifiedNs(const struct stat& info) {
  return int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
}

}  // namespace

absl::StatusOr<GuardedFile> GuardedFile::Open(const std::string& path) {
  GuardedFile file;
  file.path_ = path;
  // O_NONBLOCK: opening a FIFO must not wait for its writer before the check below refuses it.
  file.descriptor_ = FileDescriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file.descriptor_) return DataError(path, ": cannot open: ", std::strerror(errno));
  struct stat info;
  if (::fstat(file.descriptor_.get(), &info) != 0) {
    return EnvironmentError(path, ": cannot stat: ", std::strerror(errno));
  }
  if (!S_ISREG(info.st_mode)) return DataError(path, ": expected a regular file");
  file.size_ = info.st_size;
  file.device_ = info.st_dev;
  file.inode_ = info.st_ino;
  file.modified_ns_ = ModifiedNs(info);
  return file;
}

absl::Status GuardedFile::ReadAt(int64_t offset, absl::Span<uint8_t> out) const {
  size_t done = 0;
  while (done < out.size()) {
    const ssize_t n = ::pread(descriptor_.get(), out.data() + done, out.size() - done,
                              offset + static_cast<int64_t>(done));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return EnvironmentError(path_, ": cannot read: ", std::strerror(errno));
    if (n == 0) {
      return DataError(path_, ": the file ends at byte ", offset + static_cast<int64_t>(done),
                       ", expected ", size_,
                       " bytes as when it was opened: it was truncated while in use. Restore the "
                       "file or start the run again.");
    }
    done += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

absl::Status GuardedFile::CheckUnchanged() const {
  struct stat opened, named;
  if (::fstat(descriptor_.get(), &opened) != 0) {
    return EnvironmentError(path_, ": cannot stat: ", std::strerror(errno));
  }
  const bool exists = ::stat(path_.c_str(), &named) == 0;
  if (!exists || named.st_ino != inode_ || named.st_dev != device_) {
    return DataError(path_, ": the file was ", exists ? "replaced by another" : "removed",
                     " while it was in use. Restore the file or start the run again.");
  }
  if (opened.st_size != size_ || ModifiedNs(opened) != modified_ns_) {
    return DataError(
        path_, ": the file changed while it was in use: found ", opened.st_size,
        " bytes, expected ", size_,
        " with the old time of modification. Restore the file or start the run again.");
  }
  return absl::OkStatus();
}

}  // namespace baleen
