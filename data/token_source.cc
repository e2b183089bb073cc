#include "data/token_source.h"

#include <algorithm>
#include <type_traits>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "kernels/core/file.h"

namespace baleen {

absl::StatusOr<TokenSource> TokenSource::Open(const std::string& path) {
  if (absl::EndsWith(path, ".h5") || absl::EndsWith(path, ".hdf5")) {
    ASSIGN_OR_RETURN(Hdf5Tokens tokens, Hdf5Tokens::Open(path));
    return TokenSource(std::move(tokens));
  }
  absl::string_view prefix = path;
  if (!absl::ConsumeSuffix(&prefix, ".idx")) absl::ConsumeSuffix(&prefix, ".bin");
  const std::string name(prefix);
  if (!FileExists(name + ".idx") && !FileExists(name + ".bin")) {
    return DataError(path, ": no token file of this name: expected ", name, ".bin and ", name,
                     ".idx (made by baleen data build or Megatron), or a path ending in .h5");
  }
  ASSIGN_OR_RETURN(IndexedTokens tokens, IndexedTokens::Open(name));
  return TokenSource(std::move(tokens));
}

const std::string& TokenSource::path() const {
  return std::visit([](const auto& tokens) -> const std::string& { return tokens.path(); },
                    tokens_);
}

std::string TokenSource::Format() const {
  const auto* indexed = std::get_if<IndexedTokens>(&tokens_);
  return indexed == nullptr ? "HDF5 u32"
                            : absl::StrCat("Megatron ", TokenTypeName(indexed->type()));
}

int64_t TokenSource::num_documents() const {
  return std::visit([](const auto& tokens) { return tokens.num_documents(); }, tokens_);
}

int64_t TokenSource::num_tokens() const {
  return std::visit([](const auto& tokens) { return tokens.num_tokens(); }, tokens_);
}

int64_t TokenSource::document_begin(int64_t document) const {
  return std::visit([&](const auto& tokens) { return tokens.document_begin(document); }, tokens_);
}

int64_t TokenSource::DocumentOf(int64_t token) const {
  int64_t low = 0, high = num_documents() -
                          1;  // the answer: the last document that begins at or before the token
  while (low < high) {
    const int64_t middle = low + (high - low + 1) / 2;
    if (document_begin(middle) <= token) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

absl::Status TokenSource::CopyTokens(int64_t begin, absl::Span<int32_t> out) const {
  return std::visit([&](const auto& tokens) { return tokens.CopyTokens(begin, out); }, tokens_);
}

absl::StatusOr<std::string> TokenSource::Contents() const {
  constexpr int64_t kPlaces = 64, kTokens = 1024;  // of all tokens where there are fewer
  RETURN_IF_ERROR(CheckUnchanged());
  const int64_t length = std::min(kTokens, num_tokens());
  const int64_t places = std::min(kPlaces, (num_tokens() + kTokens - 1) / kTokens);
  std::vector<int32_t> tokens(places * length);
  for (int64_t i = 0; i < places; ++i) {
    const int64_t begin = places == 1 ? 0 : (num_tokens() - length) * i / (places - 1);
    RETURN_IF_ERROR(CopyTokens(begin, absl::MakeSpan(tokens).subspan(i * length, length)));
  }
  std::string samples =
      Hash128({reinterpret_cast<const uint8_t*>(tokens.data()), tokens.size() * sizeof(int32_t)});
  for (int64_t i = 0; i < kPlaces; ++i) {
    absl::StrAppend(&samples, " ", document_begin(num_documents() * i / kPlaces));
  }
  return absl::StrCat(num_documents(), " documents, ", num_tokens(), " tokens, samples ",
                      Hash128({reinterpret_cast<const uint8_t*>(samples.data()), samples.size()}));
}

absl::Status TokenSource::CheckUnchanged() const {
  return std::visit([](const auto& tokens) { return tokens.CheckUnchanged(); }, tokens_);
}

absl::Status TokenSource::CheckVocabulary(int64_t vocab_size) const {
  RETURN_IF_ERROR(CheckUnchanged());
  std::vector<int32_t> buffer(1 << 20);
  for (int64_t begin = 0; begin < num_tokens(); begin += static_cast<int64_t>(buffer.size())) {
    const int64_t count = std::min<int64_t>(buffer.size(), num_tokens() - begin);
    const auto part = absl::MakeSpan(buffer).first(count);
    RETURN_IF_ERROR(CopyTokens(begin, part));
    RETURN_IF_ERROR(CheckTokens(begin, part, vocab_size));
  }
  return absl::OkStatus();
}

absl::Status TokenSource::CheckTokens(int64_t begin, absl::Span<const int32_t> tokens,
                                      int64_t vocab_size) const {
  // Compared as unsigned numbers, so that a negative id is too large as well.
  const auto limit = static_cast<uint32_t>(std::clamp<int64_t>(vocab_size, 0, int64_t{1} << 31));
  const auto bad = std::find_if(tokens.begin(), tokens.end(),
                                [&](int32_t id) { return static_cast<uint32_t>(id) >= limit; });
  if (bad == tokens.end()) return absl::OkStatus();
  const int64_t token = begin + (bad - tokens.begin());
  const int64_t document = DocumentOf(token);
  return DataError(path(), ": document ", document, ", token ", token - document_begin(document),
                   " (token ", token, " of the file): found id ", *bad, ", expected 0 to ",
                   vocab_size - 1,
                   ", the model's vocabulary; was the set made with another tokenizer?");
}

}  // namespace baleen
