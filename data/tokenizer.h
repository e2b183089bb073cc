// Text to token ids: bytes, built in, or a Hugging Face tokenizer.json through the Python package
// tokenizers.
//
// Byte tokenizer: id = byte + 2. Ids 0 and 1 stay free for the model's bos and eos, so the
// vocabulary is 258.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/core/status.h"

namespace baleen {

constexpr int32_t kByteBosId = 0;
constexpr int32_t kByteEosId = 1;
constexpr int32_t kByteOffset = 2;
constexpr int32_t kByteVocabularySize = 256 + kByteOffset;

std::vector<int32_t> EncodeBytes(absl::string_view text);
// Ids that are no byte (bos, eos) are left out.
std::string DecodeBytes(absl::Span<const int32_t> tokens);

struct TokenizerOptions {
  std::string tokenizer = "bytes";  // "bytes", or the path of a tokenizer.json
  // Text of the token that ends a document. Empty: eos_token of tokenizer_config.json beside the
  // tokenizer.json.
  std::string eod_token;
  std::string python = "python3";
  std::string helper;  // data/tokenize_hf.py; empty: the one beside the sources
};

struct TokenizerInfo {
  int64_t vocab_size = 0;  // largest id + 1
  int64_t bos_id = -1;     // -1: not known
  int64_t eos_id = -1;
  std::string sha256;  // of tokenizer.json; empty for bytes
};

class HelperProcess;

class Tokenizer {
 public:
  // EnvironmentError when Python or its package tokenizers is missing (and how to install it);
  // DataError when the tokenizer cannot be read.
  static absl::StatusOr<Tokenizer> Open(const TokenizerOptions& options);
  Tokenizer(Tokenizer&&) noexcept;
  ~Tokenizer();

  const TokenizerInfo& info() const { return info_; }
  // Ids of each text. No bos or eos is added; special tokens spelled out in the text are ordinary
  // text.
  absl::StatusOr<std::vector<std::vector<int32_t>>> Encode(absl::Span<const std::string> texts);

 private:
  Tokenizer(TokenizerInfo info, std::unique_ptr<HelperProcess> helper);
  TokenizerInfo info_;
  std::unique_ptr<HelperProcess> helper_;  // none for bytes
};

}  // namespace baleen
