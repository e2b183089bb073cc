// Token files for tests: an .idx spelled out field by field, so that each field can be broken;
// small sets on disk.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "data/indexed_tokens.h"
#include "data/token_source.h"

namespace baleen::testing {

using Documents = std::vector<std::vector<int32_t>>;

// A directory of its own for each test, removed at the end.
class TestDirectory {
 public:
  TestDirectory();
  ~TestDirectory();
  TestDirectory(const TestDirectory&) = delete;
  TestDirectory& operator=(const TestDirectory&) = delete;
  std::string Path(absl::string_view name) const;

 private:
  std::string root_;
};

void WriteBytes(const std::string& path, absl::string_view bytes);
std::string ReadBytes(const std::string& path);

// The fields of an .idx in the order of the format, each as it will stand in the file.
struct RawIndex {
  std::string magic = std::string("MMIDIDX\0\0", 9);
  uint64_t version = 1;
  uint8_t type = 4;
  uint64_t num_sequences = 0;
  uint64_t num_indices = 0;
  std::vector<int32_t> lengths;
  std::vector<int64_t> pointers;
  std::vector<int64_t> documents;
  std::string tail;

  std::string Bytes() const;
};

// A sound index of i32 documents, one sequence each.
RawIndex IndexOf(const std::vector<int32_t>& lengths);

// Writes PREFIX.bin/.idx with the project's writer.
void WriteTokenSet(const std::string& prefix, const Documents& documents,
                   TokenType type = TokenType::kInt32);
TokenSource OpenTokenSet(const std::string& path);

// Documents whose tokens are unique: document d holds 100 d, 100 d + 1, ...
Documents NumberedDocuments(const std::vector<int>& lengths);

}  // namespace baleen::testing
