#include "trainer/step_watch.h"

namespace baleen {

absl::string_view Name(StepPhase phase) {
  static constexpr absl::string_view kNames[kNumStepPhases] = {
      "batch",      "begin",  "forward", "backward_input", "backward_weight", "pipeline",
      "statistics", "reduce", "norms",   "update",         "summary"};
  return kNames[static_cast<int>(phase)];
}

}  // namespace baleen
