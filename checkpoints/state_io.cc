#include "checkpoints/state_io.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "absl/strings/str_format.h"

#define XXH_INLINE_ALL
#include <xxhash.h>

namespace baleen {

struct alignas(64) StreamHash::State {
  XXH3_state_t xxh;
};

StreamHash::StreamHash() : state_(std::make_unique<State>()) { XXH3_128bits_reset(&state_->xxh); }
StreamHash::~StreamHash() = default;

void StreamHash::Update(absl::Span<const uint8_t> bytes) {
  XXH3_128bits_update(&state_->xxh, bytes.data(), bytes.size());
}

std::string StreamHash::Hex() const {
  const XXH128_hash_t hash = XXH3_128bits_digest(&state_->xxh);
  return absl::StrFormat("%016x%016x", hash.high64, hash.low64);
}

absl::StatusOr<OpenedFile> OpenStateFile(const std::string& path) {
  OpenedFile opened;
  opened.descriptor =
      FileDescriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!opened.descriptor) {
    if (errno == ENOENT) return DataError(path, ": the file is missing");
    if (errno == ELOOP) return DataError(path, ": expected a regular file, found a symbolic link");
    return EnvironmentError(path, ": cannot open: ", std::strerror(errno));
  }
  struct stat info;
  if (::fstat(opened.descriptor.get(), &info) != 0) {
    return EnvironmentError(path, ": cannot stat: ", std::strerror(errno));
  }
  if (!S_ISREG(info.st_mode)) return DataError(path, ": expected a regular file");
  opened.bytes = info.st_size;
  return opened;
}

absl::Status ForEachBlock(
    int descriptor, const std::string& path, int64_t bytes,
    absl::FunctionRef<absl::Status(int64_t offset, absl::Span<const uint8_t> block)> use) {
  constexpr int64_t kBlockBytes = int64_t{4} << 20;
  std::vector<uint8_t> buffer(static_cast<size_t>(std::min(bytes, kBlockBytes)));
  int64_t offset = 0;
  while (offset < bytes) {
    const size_t wanted = static_cast<size_t>(std::min(bytes - offset, kBlockBytes));
    const ssize_t n = ::pread(descriptor, buffer.data(), wanted, offset);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      return EnvironmentError(path, ": cannot read at offset ", offset, ": ", std::strerror(errno));
    }
    if (n == 0) {
      return DataError(path, ": the file ends at byte ", offset, ", expected ", bytes, " bytes");
    }
    RETURN_IF_ERROR(use(offset, absl::MakeConstSpan(buffer.data(), static_cast<size_t>(n))));
    offset += n;
  }
  return absl::OkStatus();
}

absl::Status VerifyFileHash(const std::string& path, int64_t bytes, const std::string& hash) {
  ASSIGN_OR_RETURN(const OpenedFile opened, OpenStateFile(path));
  if (opened.bytes != bytes) {
    return DataError(path, ": found ", opened.bytes, " bytes, the manifest says ", bytes);
  }
  StreamHash found;
  RETURN_IF_ERROR(ForEachBlock(opened.descriptor.get(), path, bytes, [&](int64_t, auto block) {
    found.Update(block);
    return absl::OkStatus();
  }));
  if (found.Hex() == hash) return absl::OkStatus();
  return DataError(path, ": the contents changed since they were written: found hash ", found.Hex(),
                   ", the manifest says ", hash);
}

absl::StatusOr<std::string> ReadStateText(const std::string& path, int64_t limit_bytes) {
  ASSIGN_OR_RETURN(const OpenedFile opened, OpenStateFile(path));
  if (opened.bytes > limit_bytes) {
    return DataError(path, ": the file has ", opened.bytes, " bytes, the limit is ", limit_bytes);
  }
  std::string text;
  text.reserve(static_cast<size_t>(opened.bytes));
  RETURN_IF_ERROR(
      ForEachBlock(opened.descriptor.get(), path, opened.bytes, [&](int64_t, auto block) {
        text.append(reinterpret_cast<const char*>(block.data()), block.size());
        return absl::OkStatus();
      }));
  return text;
}

}  // namespace baleen
