// The V: rank r holds part r (down arm, 0) and part 2P - 1 - r (up arm, 1), so that rank P - 1
// turns a microbatch round without a message and rank 0 has both the embedding and the loss.
//
// ZB-V (Qi et al., arXiv 2401.10241): no rank waits between its first and last action when F = B =
// W. DualPipeV (DeepSeek, "cut in half" DualPipe): from the middle on, the forward of one arm and
// the input gradient of the other run as one interleaved action whose all-to-alls and computation
// hide each other.
#include <algorithm>

#include "parallel/schedule_policies.h"

namespace baleen {
namespace {

enum Arm { kDown = 0, kUp = 1 };

// Writes one rank's list; microbatches are counted per arm and action.
class VWriter {
 public:
  VWriter(const ScheduleSpec& spec, int rank)
      : num_microbatches_(spec.num_microbatches), part_{rank, 2 * spec.num_ranks - 1 - rank} {}

  void Forward(Arm arm) { Add(ActionKind::kForward, arm, forwards_[arm]++); }
  void BackwardInput(Arm arm) { Add(ActionKind::kBackwardInput, arm, inputs_[arm]++); }
  void BackwardWeight(Arm arm) { Add(ActionKind::kBackwardWeight, arm, weights_[arm]++); }
  void Backward(Arm arm) {
    BackwardInput(arm);
    BackwardWeight(arm);
  }
  void ForwardBackward(Arm forward, Arm backward) {
    program_.push_back({ActionKind::kForwardBackward, part_[forward], forwards_[forward]++,
                        part_[backward], inputs_[backward]++});
    BackwardWeight(backward);
  }

  int forwards(Arm arm) const { return forwards_[arm]; }
  int inputs(Arm arm) const { return inputs_[arm]; }
  int weights(Arm arm) const { return weights_[arm]; }
  Program Take() { return std::move(program_); }

 private:
  // A ZB-V of few microbatches is that of 2P - 1 with the actions of the last ones left out.
  void Add(ActionKind kind, Arm arm, int microbatch) {
    if (microbatch < num_microbatches_) program_.push_back({kind, part_[arm], microbatch});
  }

  int num_microbatches_;
  int part_[2];
  int forwards_[2] = {0, 0};
  int inputs_[2] = {0, 0};
  int weights_[2] = {0, 0};
  Program program_;
};

// The end of DualPipeV, when no forward is left: weight gradients put off by the second half of the
// plain backwards fill the waits of the last ones.
void DrainDualPipeV(int num_ranks, int rank, VWriter& v) {
  std::vector<Arm> put_off;  // in the order of their input gradients
  size_t done = 0;
  const auto backward = [&](Arm arm, bool put_off_weight) {
    if (!put_off_weight) return v.Backward(arm);
    v.BackwardInput(arm);
    put_off.push_back(arm);
  };
  // Of the 2 (rank + 1) backwards the later rank + 1 put their weights off.
  for (int i = 0; i < 2 * (rank + 1); ++i) backward(i % 2 == 0 ? kUp : kDown, i >= rank + 1);
  for (int i = 0; i < num_ranks - 1 - rank; ++i) {
    v.BackwardWeight(put_off[done++]);
    backward(kDown, true);
  }
  while (done < put_off.size()) v.BackwardWeight(put_off[done++]);
}

}  // namespace

Program VForwardProgram(const ScheduleSpec& spec, int rank) {
  const int microbatches = spec.num_microbatches;
  VWriter v(spec, rank);
  // A microbatch is back on this rank after 2 (P - r) - 1 more parts.
  const int ahead = std::min(microbatches, 2 * (spec.num_ranks - rank) - 1);
  for (int i = 0; i < ahead; ++i) v.Forward(kDown);
  for (int i = 0; i < microbatches; ++i) {
    v.Forward(kUp);
    v.Forward(kDown);
  }
  return v.Take();
}

Program ZbvProgram(const ScheduleSpec& spec, int rank) {
  const int to_turn = spec.num_ranks - rank;  // ranks from here to the turn, this one included
  const int microbatches = std::max(2 * spec.num_ranks - 1, spec.num_microbatches);
  VWriter v(spec, rank);
  for (int i = 0; i < 2 * to_turn - 1; ++i) v.Forward(kDown);
  for (int i = 0; i < rank; ++i) {
    v.Forward(kUp);
    v.Forward(kDown);
  }
  for (int i = 0; i < to_turn; ++i) {
    v.Forward(kUp);
    v.Backward(kUp);
  }
  while (v.forwards(kUp) < v.forwards(kDown) || v.forwards(kDown) < microbatches) {
    if (v.forwards(kDown) < microbatches) v.Forward(kDown);
    v.Backward(kDown);
    v.Forward(kUp);
    v.Backward(kUp);
  }
  // No forward is left: input gradients first, as others wait for them.
  for (int i = 0; i < rank; ++i) {
    v.BackwardInput(kDown);
    v.BackwardInput(kUp);
  }
  for (int i = 0; i < to_turn; ++i) {
    v.BackwardInput(kDown);
    v.BackwardWeight(kDown);
  }
  while (v.weights(kUp) < v.inputs(kUp)) v.BackwardWeight(kUp);
  while (v.weights(kDown) < v.inputs(kDown)) v.BackwardWeight(kDown);
  return v.Take();
}

Program DualPipeVProgram(const ScheduleSpec& spec, int rank) {
  const int ranks = spec.num_ranks;
  const int below = ranks - 1 - rank;  // ranks between this one and the turn
  VWriter v(spec, rank);
  for (int i = 0; i < 2 * below; ++i) v.Forward(kDown);
  for (int i = 0; i < rank + 1; ++i) {
    v.Forward(kDown);
    v.Forward(kUp);
  }
  for (int i = 0; i < below; ++i) {
    v.Backward(kUp);
    v.Forward(kUp);
  }
  for (int i = 0; i < spec.num_microbatches - 2 * ranks + rank + 1; ++i) {
    if (i == 0 && rank == ranks - 1) {
      // All ranks wait for the first gradient from the turn: it goes alone, without a forward
      // beside it.
      v.Forward(kDown);
      v.Backward(kUp);
    } else {
      v.ForwardBackward(kDown, kUp);
    }
    v.ForwardBackward(kUp, kDown);
  }
  for (int i = 0; i < below; ++i) {
    v.Backward(kUp);
    v.ForwardBackward(kUp, kDown);
  }
  DrainDualPipeV(ranks, rank, v);
  return v.Take();
}

}  // namespace baleen
