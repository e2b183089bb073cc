// One part a rank: GPipe (Huang et al. 2019), 1F1B (Narayanan et al. 2019) and ZB-H1 (Qi et al.,
// arXiv 2401.10241).
//
// 1F1B: rank r runs P - 1 - r forwards ahead, then one forward, one backward, so at most P - r
// microbatches live. ZB-H1: the same order of F and B, but rank r keeps r weight gradients in hand
// and spends them where it would wait in the end; P microbatches live on every rank, as on rank 0
// of 1F1B.
#include <algorithm>

#include "parallel/schedule_policies.h"

namespace baleen {
namespace {

// F and B in the order of 1F1B; a W follows its B after `weights_in_hand` others were put off.
Program OneFOneB(const ScheduleSpec& spec, int rank, int weights_in_hand) {
  const int microbatches = spec.num_microbatches;
  const int warm_up = std::min(microbatches, spec.num_ranks - 1 - rank);
  Program program;
  int forwards = 0;
  int weights = 0;
  while (forwards < warm_up) program.push_back({ActionKind::kForward, rank, forwards++});
  for (int backwards = 0; backwards < microbatches; ++backwards) {
    if (forwards < microbatches) program.push_back({ActionKind::kForward, rank, forwards++});
    program.push_back({ActionKind::kBackwardInput, rank, backwards});
    if (backwards - weights >= weights_in_hand) {
      program.push_back({ActionKind::kBackwardWeight, rank, weights++});
    }
  }
  while (weights < microbatches) {
    program.push_back({ActionKind::kBackwardWeight, rank, weights++});
  }
  return program;
}

}  // namespace

Program ForwardProgram(const ScheduleSpec& spec, int rank) {
  Program program;
  for (int m = 0; m < spec.num_microbatches; ++m) {
    program.push_back({ActionKind::kForward, rank, m});
  }
  return program;
}

Program GpipeProgram(const ScheduleSpec& spec, int rank) {
  Program program = ForwardProgram(spec, rank);
  for (int m = 0; m < spec.num_microbatches; ++m) {
    program.push_back({ActionKind::kBackwardInput, rank, m});
    program.push_back({ActionKind::kBackwardWeight, rank, m});
  }
  return program;
}

Program OneFOneBProgram(const ScheduleSpec& spec, int rank) { return OneFOneB(spec, rank, 0); }

Program ZbH1Program(const ScheduleSpec& spec, int rank) { return OneFOneB(spec, rank, rank); }

}  // namespace baleen
