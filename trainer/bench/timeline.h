// Where a step's time goes on the GPU, from the records of a trace (kernels/core/cuda_trace.h).
#pragma once

#include <string>
#include <vector>

#include "kernels/core/cuda_trace.h"

namespace baleen {

struct PhaseTime {
  std::string name;
  double seconds = 0;       // from its beginning to the next phase's, on the compute stream
  double idle_seconds = 0;  // of these, no kernel or copy ran on any stream
  double host_seconds = 0;  // how long the host was in it
};

struct WorkTime {
  std::string name;  // a kind (kernel_kind.h), or a kernel's name
  std::string kind;
  double seconds = 0;
  int64_t launches = 0;
};

struct DeviceTimeline {
  double seconds = 0;       // from the first mark to the last
  double idle_seconds = 0;  // gaps: nothing ran
  std::vector<PhaseTime> phases;
  std::vector<WorkTime> kinds;    // the longest first; streams that overlap count in full
  std::vector<WorkTime> kernels;  // the longest first
  double message_seconds = 0;     // NCCL's kernels
  double hidden_seconds = 0;      // of these, other work ran at the same time
};

// Mark n begins phase n of `phases`; the mark behind the last phase ends the step. Only what ran
// between the first mark and the last is counted: of work that crosses one of them its part within,
// and its launch in the step that it ends in. So a gather of parameters that one step begins and
// the next one hides is counted once, where the record holds the end of a step before.
DeviceTimeline MakeTimeline(const std::vector<DeviceRecord>& records,
                            const std::vector<std::string>& phases);

// The same records for chrome://tracing or Perfetto: a row for the phases and one a stream.
std::string ChromeTrace(const std::vector<DeviceRecord>& records,
                        const std::vector<std::string>& phases);

}  // namespace baleen
