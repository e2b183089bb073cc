// Repeats a piece of training and says how long it takes, what it holds and where its time goes.
#pragma once

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "kernels/core/context.h"
#include "parallel/communicator.h"
#include "trainer/bench/timeline.h"

namespace baleen {

struct Workload {
  std::vector<std::string> phases;
  // Once through. Calls `watch`, where given, with the number of each phase as it begins.
  using Watch = std::function<void(int phase)>;
  std::function<absl::Status(const Watch& watch)> run;
};

struct MeasureOptions {
  int64_t steps = 5;
  int64_t warmup = 2;
  bool trace = true;  // on GPUs, once more under CUPTI
};

struct Measured {
  std::vector<double> step_seconds;  // of the slowest rank
  double median_seconds = 0;
  std::map<std::string, MemoryUse> uses;  // of this rank; peaks of the timed steps
  MemoryUse total;                        // its peak is that of the fullest rank
  // Of one more step: from the trace; without one the host's times, with a wait for the device at
  // each border (`no_trace` says why; empty on the CPU, where there is nothing to trace).
  std::vector<PhaseTime> phases;
  std::optional<DeviceTimeline> timeline;
  std::string no_trace;
  std::vector<DeviceRecord> records;
};

// Every rank of `world` calls it.
absl::StatusOr<Measured> Measure(const Context& context, Communicator& world,
                                 const Workload& workload, const MeasureOptions& options);

// bf16 8192^3 on GPUs, fp32 512^3 on the CPU, by the op that the model uses: FLOP/s.
double MatmulCeiling(const Context& context);

}  // namespace baleen
