// report.html of a run: what its metrics.jsonl holds, as curves, in one file.
#pragma once

#include <string>
#include <vector>

#include "kernels/core/status.h"

namespace baleen {

// DataError when a run has no readable metrics.jsonl. Lines that do not parse (a torn last one) are
// skipped.
absl::StatusOr<std::string> RunReport(const std::string& run_dir,
                                      const std::vector<std::string>& compare);

}  // namespace baleen
