// Two steps whose updated values arrive only where somebody waits for them (late_gathers.h) are
// two steps whose values are there at once, to the last bit: nobody who computes with a value
// forgets to wait.
#include <gtest/gtest.h>

#include "parallel/mpi_communicator.h"
#include "tests/support/status_matchers.h"
#include "tests/trainer/late_gathers.h"
#include "tests/trainer/layout_cases.h"
#include "tests/trainer/same_step.h"

namespace baleen::testing {
namespace {

TEST(LateGathers, ChangeNoBitOfAStep) {
  const auto world = WrapMpiWorld();
  // CTest starts it with 8 ranks, which these layouts take; by hand there may be fewer.
  if (world->size() < 8) GTEST_SKIP() << "needs 8 ranks";
  const std::vector<Layout> layouts = {
      {.data = 8},
      {.expert = 4, .data = 4, .recompute = Recompute::kSelective},
      {.tensor = 2, .context = 2, .expert = 4, .data = 2, .recompute = Recompute::kFull},
      {.context = 2, .pipeline = 2, .expert = 4, .data = 2, .schedule = ScheduleName::kDualPipeV},
  };
  for (const Layout& layout : layouts) {
    const int ranks = layout.ranks();
    const int color = world->rank() < ranks ? 0 : 1;
    const auto prompt_part = world->Split(color, world->rank(), "part");
    const auto late_part = MakeLateGathers(world->Split(color, world->rank(), "late part"));
    if (color == 1) continue;
    for (const RecipeKind kind : {RecipeKind::kDense, RecipeKind::kWarmUp, RecipeKind::kSparse}) {
      SCOPED_TRACE(absl::StrCat(Name(kind), " ", layout.DebugString()));
      RigCase c = MakeCase(kind, layout, 3);
      c.steps = 2;
      c.measure_indexer = kind != RecipeKind::kDense;
      ASSERT_OK_AND_ASSIGN(const StepOutcome prompt, RunOneStep(c, *prompt_part));
      ASSERT_OK_AND_ASSIGN(const StepOutcome late, RunOneStep(c, *late_part));
      EXPECT_EQ(late.mass, prompt.mass);
      ExpectSameStep(late, prompt);
    }
  }
}

}  // namespace
}  // namespace baleen::testing
