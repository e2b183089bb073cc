// File operations that fail on command. io_faults.cc defines write, pwrite, fsync, rename, ...
// itself; in an executable these stand before the C library's, for our code and for every shared
// library it calls.
//
// Armed, each such call on a file is counted, and the chosen one fails, or the process ends there.
#pragma once

#include <string>
#include <vector>

namespace baleen::testing {

enum class Fault {
  kNone,          // count and record only
  kErrorOnce,     // the nth call fails
  kErrorForever,  // the nth call and all after it fail
  kKill,          // the process ends before the nth call
  kKillTorn,      // as kKill, but a write first does half of its work
  kInterrupted,   // every read and write does half of what it is asked, every second call gives
                  // EINTR
};

struct FaultPlan {
  Fault fault = Fault::kNone;
  int nth = 0;  // counted from 1
  int error = 0;
};

inline constexpr int kKilledExit = 137;

void ArmFaults(const FaultPlan& plan);
// Ends the plan; the number of calls that were counted.
int DisarmFaults();

// "fsync /path", "rename /from /to", ... of successful calls since ArmFaults; descriptors as the
// path they were opened by.
const std::vector<std::string>& FaultTrace();

}  // namespace baleen::testing
