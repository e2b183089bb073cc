// The engine of a pipeline: runs one rank's lowered program, action after action, over the pipeline
// communicator. It knows neither the policy nor the model: what an action computes is PipelineWork,
// where a result goes is read from `part_rank`.
//
// A result stays on the rank where the next part lies on it too (the turn of a V, interleaved parts
// of one rank); otherwise it waits for its send. Every tensor waits under its (part, microbatch)
// and is let go when it has been used.
#pragma once

#include <vector>

#include "kernels/core/status.h"
#include "kernels/core/tensor.h"
#include "parallel/communicator.h"
#include "parallel/schedule.h"

namespace baleen {

// What the actions compute. Calls come in the order of the program: for each (part, microbatch)
// Forward, BackwardInput, BackwardWeight, once each; in a forward-only program Forward alone. A
// tensor passed in may be kept by copying the Tensor (storage is shared): the engine drops its own
// when the call returns. A tensor returned may be kept too, but not written to: it is sent later,
// or is the next part's input as it is.
class PipelineWork {
 public:
  virtual ~PipelineWork() = default;

  // `x` is empty for the first part. Returns the activation for the next part; empty for the last.
  virtual Tensor Forward(int part, int microbatch, const Tensor& x) = 0;
  // `dy` is empty for the last part. Returns the gradient of the part's input; empty for the first.
  virtual Tensor BackwardInput(int part, int microbatch, const Tensor& dy) = 0;
  virtual void BackwardWeight(int part, int microbatch) = 0;

  // Forward and BackwardInput of two microbatches, phases interleaved (kForwardBackward).
  struct Both {
    Tensor activation;  // as Forward returns it
    Tensor gradient;    // as BackwardInput returns it
  };
  virtual Both ForwardBackward(int forward_part, int forward_microbatch, const Tensor& x,
                               int backward_part, int backward_microbatch, const Tensor& dy) = 0;

  // A new tensor with the shape and dtype of what crosses between parts, activations and gradients
  // alike, to receive into.
  virtual Tensor EmptyActivation() = 0;
};

// Runs the program of rank `pp.rank()`. Every rank of `pp` calls it with its own program of one
// schedule. `part_rank` is the schedule's; with one pipeline rank no message is sent. Labels of
// messages are the text of their action ("0F3>1"). On return no tensor waits.
void RunPipeline(const Program& program, const std::vector<int>& part_rank, Communicator& pp,
                 PipelineWork& work);

// A schedule that is lowered and has passed the check, and what the check counted.
struct CheckedSchedule {
  Schedule schedule;
  ScheduleReport report;
};

// Make, lower, check. Depends on `spec` alone, so every rank may call it and gets the same.
// ConfigError where the policy cannot have these numbers.
absl::StatusOr<CheckedSchedule> MakeCheckedSchedule(const ScheduleSpec& spec);

}  // namespace baleen
