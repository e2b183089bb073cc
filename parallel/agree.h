// Agree: after every fallible phase all ranks learn whether it worked everywhere. If not, all
// return the error of the lowest rank that failed, named with that rank; nobody waits in a later
// collective for a rank that gave up.
#pragma once

#include <string>
#include <vector>

#include "kernels/core/status.h"
#include "parallel/communicator.h"

namespace baleen {

absl::Status Agree(Communicator& communicator, const absl::Status& status);

// Each rank's text on every rank, in the order of ranks.
std::vector<std::string> AllGatherStrings(Communicator& communicator, absl::string_view label,
                                          const std::string& text);
// The root's text on every rank.
std::string BroadcastString(Communicator& communicator, absl::string_view label,
                            const std::string& text, int root);

}  // namespace baleen
