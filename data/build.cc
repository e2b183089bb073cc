#include "data/build.h"

#include <nlohmann/json.hpp>

#include "absl/strings/str_format.h"
#include "data/indexed_tokens_writer.h"
#include "kernels/core/file.h"

namespace baleen {
namespace {

constexpr int64_t kBatchBytes =
    8 << 20;  // text tokenised at once: the helper's threads share a batch

class Builder {
 public:
  Builder(const BuildOptions& options, Tokenizer tokenizer, IndexedTokensWriter writer)
      : options_(options), tokenizer_(std::move(tokenizer)), writer_(std::move(writer)) {}

  absl::Status Add(Document document) {
    const absl::string_view text = document.text;
    source_hash_ +=
        Hash128(absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(text.data()), text.size()));
    source_hash_ = Hash128(absl::MakeConstSpan(
        reinterpret_cast<const uint8_t*>(source_hash_.data()), source_hash_.size()));
    text_bytes_ += static_cast<int64_t>(text.size());
    batch_bytes_ += static_cast<int64_t>(text.size());
    texts_.push_back(std::move(document.text));
    names_.push_back(std::move(document.name));
    return batch_bytes_ < kBatchBytes ? absl::OkStatus() : Flush();
  }

  absl::StatusOr<BuildReport> Finish(const DocumentCounts& files) {
    RETURN_IF_ERROR(Flush());
    if (writer_.num_documents() == 0) {
      return DataError(options_.prefix, ": no document found in the inputs (", files.files_read,
                       " files read, ", files.files_not_text, " left out as not UTF-8 text, ",
                       files.files_too_large, " as too large)");
    }
    RETURN_IF_ERROR(writer_.Finish());
    BuildReport report;
    report.files = files;
    report.num_documents = writer_.num_documents();
    report.num_tokens = writer_.num_tokens();
    report.text_bytes = text_bytes_;
    report.tokenizer = tokenizer_.info();
    report.type = TokenTypeForVocabulary(report.tokenizer.vocab_size);
    report.source_hash = source_hash_;
    return report;
  }

 private:
  absl::Status Flush() {
    ASSIGN_OR_RETURN(auto encoded, tokenizer_.Encode(texts_));
    for (size_t i = 0; i < encoded.size(); ++i) {
      for (const int32_t id : encoded[i]) {
        if (id < 0 || id >= tokenizer_.info().vocab_size) {
          return DataError(names_[i], ": the tokenizer gave id ", id, ", expected 0 to ",
                           tokenizer_.info().vocab_size - 1);
        }
      }
      if (options_.append_eod) encoded[i].push_back(static_cast<int32_t>(tokenizer_.info().eos_id));
      RETURN_IF_ERROR(Annotate(writer_.AddDocument(encoded[i]), names_[i]));
    }
    texts_.clear();
    names_.clear();
    batch_bytes_ = 0;
    return absl::OkStatus();
  }

  const BuildOptions& options_;
  Tokenizer tokenizer_;
  IndexedTokensWriter writer_;
  std::vector<std::string> texts_, names_;  // the batch
  int64_t batch_bytes_ = 0;
  int64_t text_bytes_ = 0;
  std::string source_hash_;
};

std::string EncodeRecord(const BuildOptions& options, const BuildReport& report) {
  nlohmann::ordered_json record;
  record["format"] = "baleen-tokens";
  record["version"] = 1;
  record["tokenizer"] = Basename(options.tokenizer.tokenizer);
  if (!report.tokenizer.sha256.empty()) record["tokenizer_sha256"] = report.tokenizer.sha256;
  record["vocab_size"] = report.tokenizer.vocab_size;
  record["bos_id"] = report.tokenizer.bos_id;
  record["eos_id"] = report.tokenizer.eos_id;
  record["append_eod"] = options.append_eod;
  record["token_type"] = std::string(TokenTypeName(report.type));
  record["documents"] = report.num_documents;
  record["tokens"] = report.num_tokens;
  record["text_bytes"] = report.text_bytes;
  record["source_hash"] = report.source_hash;
  return record.dump(2) + "\n";
}

}  // namespace

absl::StatusOr<BuildReport> BuildTokens(const BuildOptions& options) {
  if (options.documents.inputs.empty()) {
    return ConfigError("data build: no input given, expected files, directories or .jsonl files");
  }
  if (options.prefix.empty())
    return ConfigError("data build: --to: expected the prefix of the files to write");
  for (const char* suffix : {".bin", ".idx", ".json"}) {
    if (!FileExists(options.prefix + suffix)) continue;
    return ConfigError("data build: ", options.prefix, suffix, " exists; nothing is overwritten, ",
                       "since a run that goes on would read other samples: remove ", options.prefix,
                       ".{bin,idx,json}, or name another prefix with --to");
  }
  ASSIGN_OR_RETURN(Tokenizer tokenizer, Tokenizer::Open(options.tokenizer));
  if (options.append_eod && tokenizer.info().eos_id < 0) {
    return ConfigError(
        "data build: --append-eod: ", options.tokenizer.tokenizer,
        " does not say which token ends a document; name it with --eod-token, or put "
        "tokenizer_config.json beside it");
  }
  const TokenType type = TokenTypeForVocabulary(tokenizer.info().vocab_size);
  ASSIGN_OR_RETURN(IndexedTokensWriter writer, IndexedTokensWriter::Create(options.prefix, type));
  Builder builder(options, std::move(tokenizer), std::move(writer));
  ASSIGN_OR_RETURN(const DocumentCounts files,
                   ForEachDocument(options.documents, [&](Document document) {
                     return builder.Add(std::move(document));
                   }));
  ASSIGN_OR_RETURN(BuildReport report, builder.Finish(files));
  RETURN_IF_ERROR(WriteFileDurably(options.prefix + ".json", EncodeRecord(options, report)));
  return report;
}

std::string Describe(const BuildReport& report, const std::string& prefix) {
  std::string text = absl::StrFormat(
      "%s.bin, %s.idx: %d documents, %d tokens (%s), vocabulary %d, %.2f bytes a token\n", prefix,
      prefix, report.num_documents, report.num_tokens, TokenTypeName(report.type),
      report.tokenizer.vocab_size,
      static_cast<double>(report.text_bytes) /
          static_cast<double>(std::max<int64_t>(1, report.num_tokens)));
  absl::StrAppend(&text, "files read ", report.files.files_read,
                  "; left out: ", report.files.files_not_text, " not UTF-8 text, ",
                  report.files.files_too_large, " too large, ", report.files.empty_documents,
                  " empty documents\n");
  return text;
}

}  // namespace baleen
