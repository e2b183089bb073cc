// Exit codes (docs/exit_codes.md): what a Slurm script can decide on.
#pragma once

#include "kernels/core/status.h"

namespace baleen {

enum ExitCode : int {
  kExitOk = 0,
  kExitConfig = 2,       // usage or configuration
  kExitEnvironment = 3,  // machine, library, disk, lock
  kExitData = 4,         // data or checkpoint
  kExitNumerics = 5,     // too many steps that were not finite
  kExitInternal = 70,    // a fault of Baleen's
  kExitPreempted = 75,   // checkpoint written: start me again
  kExitHang = 76,        // a rank stopped answering
};

inline ExitCode ExitCodeOf(const absl::Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kExitOk;
    case absl::StatusCode::kInvalidArgument:
      return kExitConfig;
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kResourceExhausted:
      return kExitEnvironment;
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kNotFound:
      return kExitData;
    case absl::StatusCode::kOutOfRange:
      return kExitNumerics;
    case absl::StatusCode::kCancelled:
      return kExitPreempted;
    case absl::StatusCode::kDeadlineExceeded:
      return kExitHang;
    default:
      return kExitInternal;
  }
}

}  // namespace baleen
