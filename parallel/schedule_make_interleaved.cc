// Interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473): rank r holds parts r, r + P, r + 2P,
// ...
//
// Microbatches go in groups of P: a group passes the rank's first part, then its second, and so on;
// backward the same with the parts reversed. Rank r runs 2 (P - 1 - r) + (v - 1) P forwards ahead:
// the way of a group through v - 1 loops and there and back to the last rank.
#include <algorithm>

#include "parallel/schedule_policies.h"

namespace baleen {
namespace {

struct Step {
  int part;
  int microbatch;
};

// The order in which a rank meets (part, microbatch): by group, then loop, then microbatch.
std::vector<Step> GroupOrder(const ScheduleSpec& spec, int rank, ActionKind kind) {
  const int ranks = spec.num_ranks;
  const int loops = spec.parts_per_rank;
  std::vector<Step> order;
  for (int group = 0; group < spec.num_microbatches; group += ranks) {
    const int group_end = std::min(group + ranks, spec.num_microbatches);
    for (int i = 0; i < loops; ++i) {
      const int loop = kind == ActionKind::kForward ? i : loops - 1 - i;
      for (int m = group; m < group_end; ++m) order.push_back({loop * ranks + rank, m});
    }
  }
  return order;
}

}  // namespace

Program InterleavedForwardProgram(const ScheduleSpec& spec, int rank) {
  Program program;
  for (const Step& step : GroupOrder(spec, rank, ActionKind::kForward)) {
    program.push_back({ActionKind::kForward, step.part, step.microbatch});
  }
  return program;
}

Program InterleavedProgram(const ScheduleSpec& spec, int rank) {
  const Program forwards = InterleavedForwardProgram(spec, rank);
  const size_t ahead = 2 * (spec.num_ranks - 1 - rank) + (spec.parts_per_rank - 1) * spec.num_ranks;
  const size_t warm_up = std::min(forwards.size(), ahead);
  Program program(forwards.begin(), forwards.begin() + warm_up);
  size_t next = warm_up;
  for (const Step& step : GroupOrder(spec, rank, ActionKind::kBackwardInput)) {
    if (next < forwards.size()) program.push_back(forwards[next++]);
    program.push_back({ActionKind::kBackwardInput, step.part, step.microbatch});
    program.push_back({ActionKind::kBackwardWeight, step.part, step.microbatch});
  }
  return program;
}

}  // namespace baleen
