// A whole run: its directory, lock and signals; every stage in turn, resumed where the newest
// checkpoint stands.
#pragma once

#include "configs/schema/run_file.h"
#include "trainer/run_device.h"

namespace baleen {

struct RunOptions {
  bool dry_run = false;  // parse, open, plan and print; train nothing, write nothing
};

// Every rank calls it; all return the same status. Preemption (checkpoint.signal) is
// absl::StatusCode::kCancelled after the checkpoint was written.
absl::Status RunTraining(const LoadedRun& loaded, const RunOptions& options, RunDevice& device);

}  // namespace baleen
