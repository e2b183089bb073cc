// Names and life of state directories: `step-00000100`, `step-00000100.tmp.<id>`,
// `step-00000100.corrupt`, `latest`.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "kernels/core/status.h"

namespace baleen {

enum class StateEntry : uint8_t {
  kState,      // step-00000100
  kTemporary,  // step-00000100.tmp.<anything>: a save under way or interrupted, or a removal
               // interrupted
  kCorrupt,    // step-00000100.corrupt, .corrupt.1, ...
  kOther,
};

struct StateName {
  StateEntry entry = StateEntry::kOther;
  int64_t step = 0;
};

std::string StateDirectoryName(int64_t step);
StateName ParseStateName(absl::string_view name);

// Names in a directory, sorted. DataError when it is missing.
absl::StatusOr<std::vector<std::string>> ListNames(const std::string& dir);

// Removes a directory that holds files only; the first error is returned.
absl::Status RemoveDirectory(const std::string& path);

// `step-XXXXXXXX` -> `step-XXXXXXXX.corrupt` (or .corrupt.1, ...); returns the new path.
absl::StatusOr<std::string> SetAsideState(const std::string& step_dir);

}  // namespace baleen
