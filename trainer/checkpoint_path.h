// What a path on the command line of `eval` and `export` stands for.
#pragma once

#include <optional>
#include <string>

#include "kernels/core/status.h"

namespace baleen {

struct CheckpointPath {
  enum class Kind { kHuggingFace, kState, kRun } kind = Kind::kHuggingFace;
  std::string path;     // Hugging Face directory, or state directory
  std::string run_dir;  // of a run or of a state inside one; empty otherwise
};

// A directory with config.json, one with manifest.json, or a run directory (then its newest state).
// DataError names what was looked for.
absl::StatusOr<CheckpointPath> ResolveCheckpointPath(const std::string& path);

}  // namespace baleen
