// When each compute action starts and ends if every rank runs its list in order and waits only for
// what it needs.
#include <algorithm>
#include <cmath>
#include <limits>

#include "absl/strings/str_format.h"
#include "kernels/core/check.h"
#include "parallel/schedule.h"

namespace baleen {
namespace {

constexpr double kNotYet = std::numeric_limits<double>::infinity();

// When the results of each (part, microbatch) exist on the rank that made them.
class Results {
 public:
  Results(const Schedule& schedule, const std::function<double(const Action&)>& duration,
          double message)
      : schedule_(schedule),
        duration_(duration),
        message_(message),
        forward_(schedule.num_parts() * schedule.spec.num_microbatches, kNotYet),
        input_(forward_) {}

  // The earliest time at which `action` has what it needs; kNotYet if that is not known.
  double Ready(const Action& action) const {
    switch (action.kind) {
      case ActionKind::kForward:
        return ForwardReady(action.part, action.microbatch);
      case ActionKind::kBackwardInput:
        return InputReady(action.part, action.microbatch);
      case ActionKind::kBackwardWeight:
        return input_[At(action.part, action.microbatch)];
      case ActionKind::kForwardBackward:
        return std::max(ForwardReady(action.part, action.microbatch),
                        InputReady(action.backward_part, action.backward_microbatch));
      default:
        return 0;
    }
  }

  double Cost(const Action& action) const { return duration_(action); }

  void Finish(const Action& action, double end) {
    if (action.kind == ActionKind::kForward) forward_[At(action.part, action.microbatch)] = end;
    if (action.kind == ActionKind::kBackwardInput) input_[At(action.part, action.microbatch)] = end;
    if (action.kind == ActionKind::kForwardBackward) {
      forward_[At(action.part, action.microbatch)] = end;
      input_[At(action.backward_part, action.backward_microbatch)] = end;
    }
  }

 private:
  size_t At(int part, int microbatch) const {
    CHECK(part >= 0 && part < schedule_.num_parts()) << "part " << part;
    CHECK(microbatch >= 0 && microbatch < schedule_.spec.num_microbatches)
        << "microbatch " << microbatch;
    return static_cast<size_t>(part) * schedule_.spec.num_microbatches + microbatch;
  }

  double Arrival(double made, int from_part, int to_part) const {
    const bool message = schedule_.part_rank[from_part] != schedule_.part_rank[to_part];
    return made + (message ? message_ : 0);
  }

  double ForwardReady(int part, int microbatch) const {
    return part == 0 ? 0 : Arrival(forward_[At(part - 1, microbatch)], part - 1, part);
  }

  double InputReady(int part, int microbatch) const {
    const double own = forward_[At(part, microbatch)];
    if (part == schedule_.num_parts() - 1) return own;
    return std::max(own, Arrival(input_[At(part + 1, microbatch)], part + 1, part));
  }

  const Schedule& schedule_;
  const std::function<double(const Action&)>& duration_;
  double message_;
  std::vector<double> forward_;  // [part, microbatch]
  std::vector<double> input_;
};

bool IsCompute(ActionKind kind) {
  return kind == ActionKind::kForward || kind == ActionKind::kBackwardInput ||
         kind == ActionKind::kBackwardWeight || kind == ActionKind::kForwardBackward;
}

// Runs a rank's list as far as what is known allows; true if it got on.
bool Advance(const Program& program, size_t& next, Results& results,
             std::vector<TimedAction>& timed) {
  const size_t before = next;
  for (; next < program.size(); ++next) {
    const Action& action = program[next];
    if (!IsCompute(action.kind)) continue;
    const double ready = results.Ready(action);
    if (ready == kNotYet) break;
    const double start = std::max(ready, timed.empty() ? 0 : timed.back().end);
    const double end = start + results.Cost(action);
    results.Finish(action, end);
    timed.push_back({action, start, end});
  }
  return next != before;
}

}  // namespace

double Timeline::Busy(int rank) const {
  double busy = 0;
  for (const TimedAction& timed : ranks[rank]) busy += timed.end - timed.start;
  return busy;
}

double Timeline::InnerBubble(int rank) const {
  if (ranks[rank].empty()) return 0;
  return ranks[rank].back().end - ranks[rank].front().start - Busy(rank);
}

absl::StatusOr<Timeline> SimulateSchedule(const Schedule& schedule, const ScheduleCosts& costs) {
  const auto duration = [&](const Action& action) {
    switch (action.kind) {
      case ActionKind::kForward:
        return costs.forward;
      case ActionKind::kBackwardInput:
        return costs.backward_input;
      case ActionKind::kBackwardWeight:
        return costs.backward_weight;
      case ActionKind::kForwardBackward:
        return costs.forward_backward;
      default:
        return 0.0;
    }
  };
  return SimulateSchedule(schedule, duration, costs.message);
}

absl::StatusOr<Timeline> SimulateSchedule(const Schedule& schedule,
                                          const std::function<double(const Action&)>& duration,
                                          double message) {
  Results results(schedule, duration, message);
  Timeline timeline;
  timeline.ranks.resize(schedule.programs.size());
  std::vector<size_t> next(schedule.programs.size(), 0);
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t rank = 0; rank < schedule.programs.size(); ++rank) {
      moved |= Advance(schedule.programs[rank], next[rank], results, timeline.ranks[rank]);
    }
  }
  for (size_t rank = 0; rank < schedule.programs.size(); ++rank) {
    const Program& program = schedule.programs[rank];
    if (next[rank] < program.size()) {
      return absl::InternalError(absl::StrCat(
          "simulating schedule ", Name(schedule.spec.policy), ": rank ", rank, " never gets what ",
          ActionString(program[next[rank]]), " (action ", next[rank], ") needs"));
    }
    if (!timeline.ranks[rank].empty()) {
      timeline.makespan = std::max(timeline.makespan, timeline.ranks[rank].back().end);
    }
  }
  return timeline;
}

}  // namespace baleen
