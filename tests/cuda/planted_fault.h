// Faults for launch/gpu_tests.sh --sanitize, one for each tool: a tool that does not report its own
// sees nothing.
#pragma once

namespace baleen::testing {

// `tool` is the name of one of compute-sanitizer's tools; false: no such tool.
//   memcheck   writes behind the end of an allocation
//   racecheck  exchanges through shared memory without a barrier
//   synccheck  a thread at a warp's barrier that is not in its mask
//   initcheck  reads memory that nobody wrote
bool PlantFault(const char* tool);

}  // namespace baleen::testing
