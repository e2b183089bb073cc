#include "data/inspect_tokens.h"

#include <algorithm>
#include <bit>
#include <limits>
#include <nlohmann/json.hpp>
#include <vector>

#include "absl/strings/str_format.h"
#include "data/token_source.h"
#include "kernels/core/file.h"

namespace baleen {
namespace {

constexpr int64_t kLargestRecord = 1 << 20;
constexpr int kBarWidth = 40;

// What PREFIX.json says; -1 where it does not.
struct Record {
  std::string tokenizer;
  int64_t vocab_size = -1;
  int64_t eos_id = -1;
  int64_t num_documents = -1;
  int64_t num_tokens = -1;
};

absl::StatusOr<Record> ReadRecord(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kLargestRecord));
  const auto json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_object()) return DataError(path, ": expected a JSON object");
  Record record;
  if (json.contains("tokenizer") && json["tokenizer"].is_string())
    record.tokenizer = json["tokenizer"];
  for (const auto& [key, value] :
       {std::pair{"vocab_size", &record.vocab_size}, std::pair{"eos_id", &record.eos_id},
        std::pair{"documents", &record.num_documents}, std::pair{"tokens", &record.num_tokens}}) {
    if (!json.contains(key)) continue;
    if (!json[key].is_number_integer())
      return DataError(path, ": ", key, ": expected a whole number");
    *value = json[key].get<int64_t>();
  }
  return record;
}

absl::StatusOr<Record> RecordOf(const TokenSource& source) {
  if (source.hdf5() != nullptr) {
    return Record{.vocab_size = source.hdf5()->vocab_size(), .eos_id = source.hdf5()->eos_id()};
  }
  const std::string path = source.path() + ".json";
  if (!FileExists(path)) return Record();
  ASSIGN_OR_RETURN(Record record, ReadRecord(path));
  for (const auto& [name, recorded, found] :
       {std::tuple{"documents", record.num_documents, source.num_documents()},
        std::tuple{"tokens", record.num_tokens, source.num_tokens()}}) {
    if (recorded >= 0 && recorded != found) {
      return DataError(path, ": ", name, ": found ", recorded, ", but the token files hold ", found,
                       "; are they of one set?");
    }
  }
  return record;
}

// Documents by length: bucket 0 is empty ones, bucket b > 0 those of [2^(b-1), 2^b) tokens.
std::string LengthReport(const TokenSource& source) {
  std::vector<int64_t> counts(65, 0), tokens(65, 0);
  int64_t longest = 0, shortest = std::numeric_limits<int64_t>::max();
  for (int64_t document = 0; document < source.num_documents(); ++document) {
    const int64_t length = source.document_length(document);
    const int bucket = std::bit_width(static_cast<uint64_t>(length));
    ++counts[bucket];
    tokens[bucket] += length;
    longest = std::max(longest, length);
    shortest = std::min(shortest, length);
  }
  if (source.num_documents() == 0) return "";
  std::string text = absl::StrFormat(
      "length      %d to %d tokens, mean %.1f\n", shortest, longest,
      static_cast<double>(source.num_tokens()) / static_cast<double>(source.num_documents()));
  const int64_t most = *std::max_element(tokens.begin(), tokens.end());
  text += "\n  length in tokens        documents          tokens\n";
  for (int bucket = 0; bucket <= std::bit_width(static_cast<uint64_t>(longest)); ++bucket) {
    if (counts[bucket] == 0) continue;
    const int64_t low = bucket == 0 ? 0 : int64_t{1} << (bucket - 1);
    const int64_t high = bucket == 0 ? 0 : 2 * low - 1;
    const auto bar =
        most == 0 ? 0 : static_cast<int>(static_cast<double>(tokens[bucket]) * kBarWidth / most);
    absl::StrAppendFormat(&text, "  %9d .. %-9d %10d %15d  %s\n", low, high, counts[bucket],
                          tokens[bucket], std::string(bar, '#'));
  }
  return text;
}

absl::StatusOr<std::string> TokenReport(const TokenSource& source, const Record& record) {
  if (record.vocab_size >= 0) RETURN_IF_ERROR(source.CheckVocabulary(record.vocab_size));
  int32_t smallest = std::numeric_limits<int32_t>::max(),
          largest = std::numeric_limits<int32_t>::min();
  int64_t eos_inside = 0;
  std::vector<int32_t> buffer(1 << 20);
  for (int64_t begin = 0; begin < source.num_tokens(); begin += std::ssize(buffer)) {
    const auto part = absl::MakeSpan(buffer).first(
        std::min<int64_t>(std::ssize(buffer), source.num_tokens() - begin));
    RETURN_IF_ERROR(source.CopyTokens(begin, part));
    const auto [low, high] = std::minmax_element(part.begin(), part.end());
    smallest = std::min(smallest, *low);
    largest = std::max(largest, *high);
    eos_inside += std::count(part.begin(), part.end(), record.eos_id);
  }
  std::string text = "ids         none\n";
  if (source.num_tokens() > 0) text = absl::StrFormat("ids         %d to %d\n", smallest, largest);
  if (record.eos_id < 0) return text;
  int64_t eos_at_end = 0;
  for (int64_t document = 0; document < source.num_documents(); ++document) {
    if (source.document_length(document) == 0) continue;
    int32_t last = 0;
    RETURN_IF_ERROR(
        source.CopyTokens(source.document_begin(document + 1) - 1, absl::MakeSpan(&last, 1)));
    eos_at_end += last == record.eos_id;
  }
  absl::StrAppendFormat(&text,
                        "eos         id %d ends %d of %d documents, stands inside them %d times\n",
                        record.eos_id, eos_at_end, source.num_documents(), eos_inside - eos_at_end);
  return text;
}

}  // namespace

absl::StatusOr<std::string> InspectTokens(const std::string& path, TokenScan scan) {
  ASSIGN_OR_RETURN(const TokenSource source, TokenSource::Open(path));
  ASSIGN_OR_RETURN(const Record record, RecordOf(source));
  std::string text = absl::StrFormat("%s: token file (%s)\n", source.path(), source.Format());
  if (!record.tokenizer.empty()) absl::StrAppend(&text, "tokenizer   ", record.tokenizer, "\n");
  if (record.vocab_size >= 0) absl::StrAppend(&text, "vocabulary  ", record.vocab_size, "\n");
  absl::StrAppendFormat(&text, "documents   %d\ntokens      %d\n", source.num_documents(),
                        source.num_tokens());
  if (scan == TokenScan::kAllTokens) {
    ASSIGN_OR_RETURN(const std::string tokens, TokenReport(source, record));
    text += tokens;
  }
  return text + LengthReport(source);
}

}  // namespace baleen
