// Text report of a training state, or of a run's `checkpoints` folder, for `baleen inspect`.
#pragma once

#include <string>

#include "kernels/core/status.h"

namespace baleen {

enum class StateDepth {
  kManifest,  // manifest and file sizes
  kContents,  // every file hashed, every piece read through HDF5 and compared with its hash; NaN
              // and infinity counted
  kDigest,    // every file hashed; a hash of each tensor and one of the state (state_digest.h)
};

struct StateReport {
  std::string text;
  bool healthy = false;
};

// `path` is a `step-XXXXXXXX` directory or a folder of them (then every state gets a line, damaged
// ones too).
absl::StatusOr<StateReport> InspectState(const std::string& path, StateDepth depth);

}  // namespace baleen
