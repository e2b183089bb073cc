// The text of `baleen inspect PATH` for a token file.
#pragma once

#include <string>

#include "kernels/core/status.h"

namespace baleen {

// kIndexOnly: documents and lengths, from the index. kAllTokens: also the range of ids and how
// documents end; one pass.
enum class TokenScan { kIndexOnly, kAllTokens };

// `path` as TokenSource::Open takes it. PREFIX.json, where there is one, gives tokenizer,
// vocabulary and eos id; with kAllTokens an id outside that vocabulary, and counts that differ from
// the record, are DataErrors.
absl::StatusOr<std::string> InspectTokens(const std::string& path, TokenScan scan);

}  // namespace baleen
