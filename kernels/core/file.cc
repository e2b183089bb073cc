#include "kernels/core/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_format.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace baleen {
namespace {

int64_t ModifiedNs(const struct stat& info) {
  return int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec;
}

absl::Status SystemError(absl::string_view doing, absl::string_view path) {
  return EnvironmentError(path, ": cannot ", doing, ": ", std::strerror(errno));
}

absl::Status WriteAll(int descriptor, absl::string_view contents, const std::string& path) {
  size_t written = 0;
  while (written < contents.size()) {
    const ssize_t n = ::write(descriptor, contents.data() + written, contents.size() - written);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return SystemError("write", path);
    written += static_cast<size_t>(n);
  }
  return absl::OkStatus();
}

}  // namespace

void CloseDescriptor(int descriptor) { ::close(descriptor); }

absl::StatusOr<MappedFile> MappedFile::Open(const std::string& path) {
  MappedFile file;
  file.path_ = path;
  file.descriptor_ = FileDescriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!file.descriptor_) return DataError(path, ": cannot open: ", std::strerror(errno));
  struct stat info;
  if (::fstat(file.descriptor_.get(), &info) != 0) return SystemError("stat", path);
  if (!S_ISREG(info.st_mode)) return DataError(path, ": expected a regular file");
  file.size_ = static_cast<size_t>(info.st_size);
  file.inode_ = info.st_ino;
  file.modified_ns_ = ModifiedNs(info);
  if (file.size_ > 0) {
    void* data = ::mmap(nullptr, file.size_, PROT_READ, MAP_PRIVATE, file.descriptor_.get(), 0);
    if (data == MAP_FAILED) return SystemError("map", path);
    file.data_ = data;
  }
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  if (this == &other) return *this;
  if (data_ != nullptr) ::munmap(data_, size_);
  path_ = std::move(other.path_);
  data_ = std::exchange(other.data_, nullptr);
  size_ = std::exchange(other.size_, 0);
  inode_ = other.inode_;
  modified_ns_ = other.modified_ns_;
  descriptor_ = std::move(other.descriptor_);
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(data_, size_);
}

absl::Status MappedFile::CheckUnchanged() const {
  struct stat opened, named;
  if (::fstat(descriptor_.get(), &opened) != 0) return SystemError("stat", path_);
  const bool same = ::stat(path_.c_str(), &named) == 0 && named.st_ino == inode_ &&
                    static_cast<size_t>(opened.st_size) == size_ &&
                    ModifiedNs(opened) == modified_ns_;
  if (same) return absl::OkStatus();
  return DataError(path_, ": the file was replaced or changed while it was in use; found ",
                   opened.st_size, " bytes, expected ", size_,
                   ". Restore the file or start the run again.");
}

absl::StatusOr<std::string> ReadFile(const std::string& path, int64_t limit_bytes) {
  ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  const auto bytes = file.bytes();
  if (static_cast<int64_t>(bytes.size()) > limit_bytes) {
    return DataError(path, ": the file has ", bytes.size(), " bytes, the limit is ", limit_bytes);
  }
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

absl::Status WriteFileDurably(const std::string& path, absl::string_view contents) {
  const std::string temporary = absl::StrCat(path, ".tmp.", ::getpid());
  FileDescriptor file(
      ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC | O_NOFOLLOW, 0644));
  if (!file) return SystemError("create", temporary);
  absl::Status status = WriteAll(file.get(), contents, temporary);
  if (status.ok() && ::fsync(file.get()) != 0) status = SystemError("sync", temporary);
  if (::close(file.Release()) != 0 && status.ok()) status = SystemError("close", temporary);
  if (status.ok() && ::rename(temporary.c_str(), path.c_str()) != 0) {
    status = SystemError("rename into place", path);
  }
  if (!status.ok()) {
    ::unlink(temporary.c_str());
    return status;
  }
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return SyncDirectory(parent.empty() ? "." : parent);
}

absl::Status SyncFile(const std::string& path) {
  FileDescriptor file(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (!file || ::fsync(file.get()) != 0) return SystemError("sync", path);
  return absl::OkStatus();
}

absl::Status SyncDirectory(const std::string& path) {
  FileDescriptor directory(::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory || ::fsync(directory.get()) != 0) return SystemError("sync directory", path);
  return absl::OkStatus();
}

absl::Status MakeDirectories(const std::string& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) return EnvironmentError(path, ": cannot create directory: ", error.message());
  return absl::OkStatus();
}

bool FileExists(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_regular_file(path, error);
}

bool DirectoryExists(const std::string& path) {
  std::error_code error;
  return std::filesystem::is_directory(path, error);
}

std::string Hash128(absl::Span<const uint8_t> bytes) {
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  return absl::StrFormat("%016x%016x", hash.high64, hash.low64);
}

absl::StatusOr<std::string> HashFile(const std::string& path) {
  ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
  return Hash128(file.bytes());
}

std::string JoinPath(absl::string_view directory, absl::string_view name) {
  return (std::filesystem::path(std::string(directory)) / std::string(name)).string();
}

std::string Basename(absl::string_view path) {
  return std::filesystem::path(std::string(path)).filename().string();
}

}  // namespace baleen
