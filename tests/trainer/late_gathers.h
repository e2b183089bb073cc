// A communicator whose begun gathers arrive as late as they may: until Wait of its number the other
// ranks' parts of what a gather fills are NaN. So who reads a value without waiting for it, which
// on the host is there at once and on a GPU most of the time, is found out everywhere.
#pragma once

#include <memory>

#include "parallel/communicator.h"

namespace baleen::testing {

// The parts that Split makes of it are late too.
std::unique_ptr<Communicator> MakeLateGathers(std::unique_ptr<Communicator> inner);

}  // namespace baleen::testing
