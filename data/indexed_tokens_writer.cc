#include "data/indexed_tokens_writer.h"

#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <limits>

#include "kernels/core/check.h"
#include "kernels/core/file.h"

namespace baleen {
namespace {

template <typename T>
void Append(std::string& out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out.append(bytes, sizeof(T));
}

std::string ParentOf(const std::string& path) {
  const std::string parent = std::filesystem::path(path).parent_path().string();
  return parent.empty() ? "." : parent;
}

int64_t LargestId(TokenType type) {
  return type == TokenType::kUint8    ? std::numeric_limits<uint8_t>::max()
         : type == TokenType::kUint16 ? std::numeric_limits<uint16_t>::max()
                                      : std::numeric_limits<int32_t>::max();
}

template <typename T>
std::string Narrow(absl::Span<const int32_t> tokens) {
  std::string out;
  out.reserve(tokens.size() * sizeof(T));
  for (const int32_t id : tokens) Append(out, static_cast<T>(id));
  return out;
}

std::string Encode(absl::Span<const int32_t> tokens, TokenType type) {
  return type == TokenType::kUint8    ? Narrow<uint8_t>(tokens)
         : type == TokenType::kUint16 ? Narrow<uint16_t>(tokens)
                                      : Narrow<int32_t>(tokens);
}

// The whole .idx for documents of one sequence each.
std::string EncodeIndex(const std::vector<int32_t>& lengths, TokenType type) {
  std::string out("MMIDIDX\0\0", 9);
  Append(out, uint64_t{1});
  Append(out, static_cast<uint8_t>(type));
  Append(out, static_cast<uint64_t>(lengths.size()));
  Append(out, static_cast<uint64_t>(lengths.size() + 1));
  for (const int32_t length : lengths) Append(out, length);
  int64_t pointer = 0;
  for (const int32_t length : lengths) {
    Append(out, pointer);
    pointer += int64_t{length} * TokenBytes(type);
  }
  for (int64_t document = 0; document <= std::ssize(lengths); ++document) Append(out, document);
  return out;
}

}  // namespace

void CloseStream(std::FILE* file) { std::fclose(file); }

IndexedTokensWriter::IndexedTokensWriter(std::string prefix, TokenType type)
    : prefix_(std::move(prefix)),
      temporary_bin_(absl::StrCat(prefix_, ".bin.tmp.", ::getpid())),
      type_(type) {}

absl::StatusOr<IndexedTokensWriter> IndexedTokensWriter::Create(const std::string& prefix,
                                                                TokenType type) {
  RETURN_IF_ERROR(MakeDirectories(ParentOf(prefix)));
  IndexedTokensWriter writer(prefix, type);
  writer.bin_ = OwnedStream(std::fopen(writer.temporary_bin_.c_str(), "wb"));
  if (!writer.bin_) {
    return EnvironmentError(writer.temporary_bin_, ": cannot create: ", std::strerror(errno));
  }
  return writer;
}

IndexedTokensWriter::~IndexedTokensWriter() {
  if (bin_) ::unlink(temporary_bin_.c_str());
}

absl::Status IndexedTokensWriter::AddDocument(absl::Span<const int32_t> tokens) {
  CHECK(bin_) << prefix_ << ": the writer has finished";
  if (tokens.size() > std::numeric_limits<int32_t>::max()) {
    return DataError(prefix_, ": document ", num_documents(), " has ", tokens.size(),
                     " tokens, expected at most 2^31 - 1");
  }
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] < 0 || tokens[i] > LargestId(type_)) {
      return DataError(prefix_, ": document ", num_documents(), ", token ", i, ": found id ",
                       tokens[i], ", expected 0 to ", LargestId(type_), " (", TokenTypeName(type_),
                       ")");
    }
  }
  const std::string bytes = Encode(tokens, type_);
  if (std::fwrite(bytes.data(), 1, bytes.size(), bin_.get()) != bytes.size()) {
    return EnvironmentError(temporary_bin_, ": cannot write: ", std::strerror(errno));
  }
  lengths_.push_back(static_cast<int32_t>(tokens.size()));
  num_tokens_ += static_cast<int64_t>(tokens.size());
  return absl::OkStatus();
}

absl::Status IndexedTokensWriter::Finish() {
  CHECK(bin_) << prefix_ << ": the writer has finished";
  const std::string bin = prefix_ + ".bin", idx = prefix_ + ".idx";
  if (std::fflush(bin_.get()) != 0 || ::fsync(::fileno(bin_.get())) != 0) {
    return EnvironmentError(temporary_bin_, ": cannot write: ", std::strerror(errno));
  }
  if (::unlink(idx.c_str()) != 0 && errno != ENOENT) {
    return EnvironmentError(idx, ": cannot remove the old index: ", std::strerror(errno));
  }
  if (::rename(temporary_bin_.c_str(), bin.c_str()) != 0) {
    return EnvironmentError(bin, ": cannot rename into place: ", std::strerror(errno));
  }
  bin_.Reset();
  RETURN_IF_ERROR(SyncDirectory(ParentOf(prefix_)));
  return WriteFileDurably(idx, EncodeIndex(lengths_, type_));
}

}  // namespace baleen
