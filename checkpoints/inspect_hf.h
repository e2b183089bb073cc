// Text report of a Hugging Face directory, for `baleen inspect`.
#pragma once

#include <string>

#include "absl/status/statusor.h"

namespace baleen {

enum class InspectDepth {
  kHeaders,  // config, index, headers and scales
  kValues,   // every tensor is read: NaN and infinity counts, MTP duplicates compared
};

struct InspectReport {
  std::string text;
  bool healthy =
      false;  // nothing missing, misshapen or unknown; with kValues: nothing that is not finite
};

absl::StatusOr<InspectReport> InspectHf(const std::string& directory, InspectDepth depth);

}  // namespace baleen
