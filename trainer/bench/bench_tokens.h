// Tokens of a bench: a token file of random ids in a temporary folder, read by the loader that
// trains.
#pragma once

#include <string>

#include "kernels/core/status.h"

namespace baleen {

class BenchTokens {
 public:
  // EnvironmentError where the folder for temporary files (TMPDIR, else /tmp) takes no file.
  static absl::StatusOr<BenchTokens> Make(int64_t num_tokens, int64_t vocab_size, int64_t seed);
  BenchTokens(BenchTokens&& other) noexcept;
  BenchTokens& operator=(BenchTokens&&) = delete;
  ~BenchTokens();  // removes the folder

  // As data.train.path names it.
  const std::string& prefix() const { return prefix_; }

 private:
  explicit BenchTokens(std::string folder)
      : folder_(std::move(folder)), prefix_(folder_ + "/tokens") {}
  std::string folder_, prefix_;
};

}  // namespace baleen
