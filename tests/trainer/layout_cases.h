// The cases of the layout matrices (on the CPU and on GPUs): which recipe, which layout, and the
// same step on one rank.
#pragma once

#include <string>
#include <vector>

#include "tests/trainer/layout_rig.h"

namespace baleen::testing {

enum class RecipeKind { kDense, kWarmUp, kSparse, kMasked };
const char* Name(RecipeKind kind);

struct Layout {
  int tensor = 1, context = 1, pipeline = 1, expert = 1, data = 1;
  ScheduleName schedule = ScheduleName::k1F1B;
  int virtual_stages = 0;  // 0: the schedule's
  Recompute recompute = Recompute::kNone;
  int expert_node_size = 0;
  int ranks() const { return tensor * context * pipeline * data; }
  std::string DebugString() const;
};

// A small model's step: 8 samples of 32 tokens, one a microbatch.
RigCase MakeCase(RecipeKind kind, const Layout& layout, int64_t layers);

// The same step on one rank, nothing recomputed, in one chunk and one round.
RigCase OnOneRank(RigCase c);
// Names a case of OnOneRank among those of MakeCase.
std::string KeyOf(const RigCase& one_rank);

// The values of a whole tensor that lie in `box`.
std::vector<double> ValuesAt(const Box& box, const StepOutcome::Piece& whole);

}  // namespace baleen::testing
