#include "tests/data/token_files.h"

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "data/indexed_tokens_writer.h"
#include "kernels/core/check.h"
#include "kernels/core/file.h"

namespace baleen::testing {
namespace {

template <typename T>
void Append(std::string& out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out.append(bytes, sizeof(T));
}

}  // namespace

TestDirectory::TestDirectory() {
  std::string pattern = (std::filesystem::temp_directory_path() / "baleen-data-XXXXXX").string();
  CHECK(::mkdtemp(pattern.data()) != nullptr) << pattern;
  root_ = pattern;
}

TestDirectory::~TestDirectory() {
  std::error_code unused;
  std::filesystem::remove_all(root_, unused);
}

std::string TestDirectory::Path(absl::string_view name) const { return JoinPath(root_, name); }

void WriteBytes(const std::string& path, absl::string_view bytes) {
  std::filesystem::create_directories(std::filesystem::path(path).parent_path());
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  CHECK(file.good()) << path;
}

std::string ReadBytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  CHECK(file.good()) << path;
  std::ostringstream bytes;
  bytes << file.rdbuf();
  return bytes.str();
}

std::string RawIndex::Bytes() const {
  std::string out = magic;
  Append(out, version);
  Append(out, type);
  Append(out, num_sequences);
  Append(out, num_indices);
  for (const int32_t length : lengths) Append(out, length);
  for (const int64_t pointer : pointers) Append(out, pointer);
  for (const int64_t document : documents) Append(out, document);
  return out + tail;
}

RawIndex IndexOf(const std::vector<int32_t>& lengths) {
  RawIndex index;
  index.num_sequences = lengths.size();
  index.num_indices = lengths.size() + 1;
  index.lengths = lengths;
  int64_t pointer = 0;
  index.documents.push_back(0);
  for (const int32_t length : lengths) {
    index.pointers.push_back(pointer);
    pointer += 4 * length;
    index.documents.push_back(std::ssize(index.documents));
  }
  return index;
}

void WriteTokenSet(const std::string& prefix, const Documents& documents, TokenType type) {
  absl::StatusOr<IndexedTokensWriter> writer = IndexedTokensWriter::Create(prefix, type);
  CHECK_OK(writer.status());
  for (const auto& document : documents) CHECK_OK(writer->AddDocument(document));
  CHECK_OK(writer->Finish());
}

TokenSource OpenTokenSet(const std::string& path) {
  absl::StatusOr<TokenSource> source = TokenSource::Open(path);
  CHECK_OK(source.status());
  return *std::move(source);
}

Documents NumberedDocuments(const std::vector<int>& lengths) {
  Documents documents;
  for (size_t d = 0; d < lengths.size(); ++d) {
    auto& document = documents.emplace_back();
    for (int i = 0; i < lengths[d]; ++i) document.push_back(static_cast<int32_t>(100 * d) + i);
  }
  return documents;
}

}  // namespace baleen::testing
