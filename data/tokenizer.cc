#include "data/tokenizer.h"

#include <cstring>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "data/helper_process.h"
#include "kernels/core/file.h"

namespace baleen {
namespace {

constexpr int64_t kLongestHeader = 1 << 16;
constexpr uint64_t kMostTokens = (uint64_t{1} << 31) - 1;  // of one text, as in the .idx

// The first line of the helper: {"vocab_size", "bos_id", "eos_id", "sha256"} or {"error", "fault"}.
absl::StatusOr<TokenizerInfo> ReadHeader(HelperProcess& helper) {
  ASSIGN_OR_RETURN(const std::string line, helper.ReceiveLine(kLongestHeader));
  const auto header = nlohmann::json::parse(line, nullptr, /*allow_exceptions=*/false);
  if (!header.is_object())
    return EnvironmentError("tokenizer helper: unexpected first line: ", line);
  if (header.contains("error") && header["error"].is_string()) {
    const auto message = header["error"].get<std::string>();
    const bool environment = header.value("fault", nlohmann::json()) == "environment";
    return environment ? EnvironmentError(message) : DataError(message);
  }
  TokenizerInfo info;
  for (const auto& [key, value] :
       {std::pair{"vocab_size", &info.vocab_size}, std::pair{"bos_id", &info.bos_id},
        std::pair{"eos_id", &info.eos_id}}) {
    if (!header.contains(key) || !header[key].is_number_integer()) {
      return EnvironmentError("tokenizer helper: its first line lacks ", key, ": ", line);
    }
    *value = header[key].get<int64_t>();
  }
  if (header.contains("sha256") && header["sha256"].is_string()) {
    info.sha256 = header["sha256"].get<std::string>();
  }
  return info;
}

void AppendCount(std::string& out, uint64_t value) {
  char bytes[8];
  std::memcpy(bytes, &value, 8);
  out.append(bytes, 8);
}

absl::StatusOr<uint64_t> ReceiveCount(HelperProcess& helper) {
  char bytes[8];
  RETURN_IF_ERROR(helper.Receive(absl::MakeSpan(bytes)));
  uint64_t value;
  std::memcpy(&value, bytes, 8);
  return value;
}

}  // namespace

std::vector<int32_t> EncodeBytes(absl::string_view text) {
  std::vector<int32_t> tokens;
  tokens.reserve(text.size() + 1);  // and room for the eod
  for (const char c : text) tokens.push_back(static_cast<unsigned char>(c) + kByteOffset);
  return tokens;
}

std::string DecodeBytes(absl::Span<const int32_t> tokens) {
  std::string text;
  for (const int32_t id : tokens) {
    if (id >= kByteOffset && id < kByteVocabularySize) text += static_cast<char>(id - kByteOffset);
  }
  return text;
}

Tokenizer::Tokenizer(TokenizerInfo info, std::unique_ptr<HelperProcess> helper)
    : info_(std::move(info)), helper_(std::move(helper)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

absl::StatusOr<Tokenizer> Tokenizer::Open(const TokenizerOptions& options) {
  if (options.tokenizer == "bytes") {
    return Tokenizer({kByteVocabularySize, kByteBosId, kByteEosId, ""}, nullptr);
  }
  if (!FileExists(options.tokenizer)) {
    return DataError(options.tokenizer,
                     ": no such tokenizer; expected \"bytes\" or the path of a tokenizer.json");
  }
  const std::string script = options.helper.empty() ? BALEEN_TOKENIZER_HELPER : options.helper;
  if (!FileExists(script)) {
    return EnvironmentError(
        script, ": the tokenizer helper is missing; it is data/tokenize_hf.py of the sources");
  }
  std::vector<std::string> argv = {options.python, script, "--tokenizer", options.tokenizer};
  if (!options.eod_token.empty()) argv.insert(argv.end(), {"--eod-token", options.eod_token});
  absl::StatusOr<std::unique_ptr<HelperProcess>> helper = HelperProcess::Start(argv);
  if (!helper.ok()) {
    return Annotate(helper.status(),
                    "a tokenizer.json needs Python 3 with the package tokenizers "
                    "(apt-get install python3 python3-pip; pip install tokenizers)");
  }
  ASSIGN_OR_RETURN(TokenizerInfo info, ReadHeader(**helper));
  return Tokenizer(std::move(info), *std::move(helper));
}

absl::StatusOr<std::vector<std::vector<int32_t>>> Tokenizer::Encode(
    absl::Span<const std::string> texts) {
  std::vector<std::vector<int32_t>> result;
  if (helper_ == nullptr) {
    for (const std::string& text : texts) result.push_back(EncodeBytes(text));
    return result;
  }
  // Request: u64 texts, then u64 bytes and the bytes of each. Answer: u64 ids and i32 ids of each.
  // The helper reads the whole request before it answers, so neither side waits for the other's
  // full buffer.
  std::string request;
  AppendCount(request, texts.size());
  for (const std::string& text : texts) {
    AppendCount(request, text.size());
    request += text;
  }
  RETURN_IF_ERROR(helper_->Send(request));
  for (size_t i = 0; i < texts.size(); ++i) {
    ASSIGN_OR_RETURN(const uint64_t count, ReceiveCount(*helper_));
    if (count > kMostTokens || count > 4 * texts[i].size() + 16) {
      return EnvironmentError("tokenizer helper: ", count, " ids for a text of ", texts[i].size(),
                              " bytes");
    }
    std::vector<int32_t>& tokens = result.emplace_back(count);
    RETURN_IF_ERROR(
        helper_->Receive(absl::MakeSpan(reinterpret_cast<char*>(tokens.data()), 4 * count)));
  }
  return result;
}

}  // namespace baleen
