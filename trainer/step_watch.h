// The phases of a step, told as they begin: what baleen bench measures by.
#pragma once

#include <functional>

#include "absl/strings/string_view.h"
#include "parallel/pipeline_engine.h"

namespace baleen {

enum class StepPhase : uint8_t {
  kBatch,    // tokens of the step, from the loader to the device
  kBegin,    // nothing has been added to statistics and gradients
  kForward,  // of a microbatch and pipeline part, as the next two
  kBackwardInput,
  kBackwardWeight,
  kPipeline,    // between them: messages to other pipeline ranks
  kStatistics,  // their sums over the ranks: the host waits for the model's passes
  kReduce,      // the wait for what is left of the gradients' reduction
  kNorms,
  kUpdate,   // the gathers of the values begin in it, and end beside what follows
  kSummary,  // the host reads norms and means
};
inline constexpr int kNumStepPhases = static_cast<int>(StepPhase::kSummary) + 1;
absl::string_view Name(StepPhase phase);
// Called as the host begins a phase; what it enqueues until the next call belongs to that phase.
// Never empty.
using StepWatch = std::function<void(StepPhase phase)>;

// The pipeline's work, telling `watch` what each call does.
class WatchedWork : public PipelineWork {
 public:
  WatchedWork(PipelineWork& work, const StepWatch& watch) : work_(work), watch_(watch) {}

  Tensor Forward(int part, int microbatch, const Tensor& x) override {
    watch_(StepPhase::kForward);
    const Tensor y = work_.Forward(part, microbatch, x);
    watch_(StepPhase::kPipeline);
    return y;
  }
  Tensor BackwardInput(int part, int microbatch, const Tensor& dy) override {
    watch_(StepPhase::kBackwardInput);
    const Tensor dx = work_.BackwardInput(part, microbatch, dy);
    watch_(StepPhase::kPipeline);
    return dx;
  }
  void BackwardWeight(int part, int microbatch) override {
    watch_(StepPhase::kBackwardWeight);
    work_.BackwardWeight(part, microbatch);
    watch_(StepPhase::kPipeline);
  }
  // Two at once cannot be told apart: they count as the longer one.
  Both ForwardBackward(int forward_part, int forward_microbatch, const Tensor& x, int backward_part,
                       int backward_microbatch, const Tensor& dy) override {
    watch_(StepPhase::kBackwardInput);
    const Both both = work_.ForwardBackward(forward_part, forward_microbatch, x, backward_part,
                                            backward_microbatch, dy);
    watch_(StepPhase::kPipeline);
    return both;
  }
  Tensor EmptyActivation() override { return work_.EmptyActivation(); }

 private:
  PipelineWork& work_;
  const StepWatch& watch_;
};

}  // namespace baleen
