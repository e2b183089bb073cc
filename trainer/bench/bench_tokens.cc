#include "trainer/bench/bench_tokens.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <utility>

#include "data/indexed_tokens_writer.h"
#include "kernels/core/random.h"

namespace baleen {

BenchTokens::BenchTokens(BenchTokens&& other) noexcept
    : folder_(std::exchange(other.folder_, "")), prefix_(std::move(other.prefix_)) {}

BenchTokens::~BenchTokens() {
  std::error_code ignored;  // a folder left in /tmp is no reason to fail
  if (!folder_.empty()) std::filesystem::remove_all(folder_, ignored);
}

absl::StatusOr<BenchTokens> BenchTokens::Make(int64_t num_tokens, int64_t vocab_size,
                                              int64_t seed) {
  const char* chosen = std::getenv("TMPDIR");
  std::string folder =
      absl::StrCat(chosen != nullptr && *chosen != '\0' ? chosen : "/tmp", "/baleen-bench-XXXXXX");
  if (::mkdtemp(folder.data()) == nullptr) {
    return EnvironmentError("making a folder for the bench's tokens, ", folder, ": ",
                            std::strerror(errno), "; set TMPDIR to a folder that can be written");
  }
  BenchTokens tokens(std::move(folder));
  const RandomStream random(static_cast<uint64_t>(seed), NameStream("bench tokens"));
  std::vector<int32_t> ids(num_tokens);
  for (int64_t i = 0; i < num_tokens; ++i) {
    ids[i] = static_cast<int32_t>(random.Integer(static_cast<uint64_t>(i)) %
                                  static_cast<uint64_t>(vocab_size));
  }
  ASSIGN_OR_RETURN(IndexedTokensWriter writer,
                   IndexedTokensWriter::Create(tokens.prefix(), TokenType::kInt32));
  RETURN_IF_ERROR(writer.AddDocument(ids));
  RETURN_IF_ERROR(writer.Finish());
  return tokens;
}

}  // namespace baleen
