// Less work where compute-sanitizer's racecheck watches each access to shared memory.
#pragma once

#include <cstdlib>
#include <string_view>

namespace baleen::testing {

// Kernels take a hundred times as long there, and numbers are tested elsewhere: what counts is that
// every kernel runs, with all its branches. launch/sanitize.py sets the variable.
inline bool UnderRacecheck() {
  const char* const tool = std::getenv("BALEEN_SANITIZER");
  return tool != nullptr && std::string_view(tool) == "racecheck";
}

}  // namespace baleen::testing
