// The pipeline engine without messages: one pipeline rank runs every policy, and a program or work
// that cannot be right ends with the action named.
#include "parallel/pipeline_engine.h"

#include <gtest/gtest.h>

#include "tests/parallel/linear_pipeline.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::LinearWork;

void RunAlone(const Program& program, const std::vector<int>& part_rank, PipelineWork& work) {
  const auto self = MakeSelfCommunicator();
  RunPipeline(program, part_rank, *self, work);
}

TEST(PipelineEngine, RunsEveryPolicyOnOneRankWithoutMessages) {
  using P = SchedulePolicy;
  for (const auto& [policy, parts] : std::vector<std::pair<P, int>>{{P::kGpipe, 1},
                                                                    {P::k1F1B, 1},
                                                                    {P::kZbH1, 1},
                                                                    {P::kInterleaved, 2},
                                                                    {P::kInterleaved, 3},
                                                                    {P::kZbv, 2},
                                                                    {P::kDualPipeV, 2}}) {
    for (int microbatches = policy == P::kDualPipeV ? 2 : 1; microbatches <= 5; ++microbatches) {
      for (const bool forward_only : {false, true}) {
        SCOPED_TRACE(absl::StrCat(Name(policy), " v ", parts, " M ", microbatches, forward_only));
        const auto checked = MakeCheckedSchedule({policy, 1, parts, microbatches, forward_only});
        ASSERT_THAT(checked, testing::IsOk());
        LinearWork work(parts, microbatches);
        RunAlone(checked->schedule.programs[0], checked->schedule.part_rank, work);
        work.ExpectDone(checked->schedule, 0);
      }
    }
  }
}

TEST(PipelineEngine, ChecksWhatItMakesAndPassesRefusalsOn) {
  const auto checked = MakeCheckedSchedule({SchedulePolicy::k1F1B, 2, 1, 3, false});
  ASSERT_THAT(checked, testing::IsOk());
  EXPECT_EQ(ProgramString(checked->schedule.programs[1]),
            "1F0<0 1F0 1F1<0 1B0 1B0>0 1W0 1F1 1B1 1F2<0 1B1>0 1W1 1F2 1B2 1B2>0 1W2");
  EXPECT_EQ(checked->report.peak_to_weight, (std::vector<int>{2, 1}));
  EXPECT_THAT(MakeCheckedSchedule({SchedulePolicy::kDualPipeV, 2, 2, 3, false}),
              HasStatus(absl::StatusCode::kInvalidArgument, "nearest that fit: 4 microbatches"));
}

TEST(PipelineEngineDeath, NamesTheActionThatHasNoInput) {
  LinearWork work(2, 1);
  const Program program = {{ActionKind::kForward, 1, 0}};
  EXPECT_DEATH(RunAlone(program, {0, 0}, work), "1F0: no activation of part 1 microbatch 0");
}

TEST(PipelineEngineDeath, NamesWhatTheProgramDidNotUse) {
  LinearWork work(2, 1);
  const Program program = {{ActionKind::kForward, 0, 0}};
  EXPECT_DEATH(RunAlone(program, {0, 0}, work), "activation of part 1 microbatch 0 was not used");
}

TEST(PipelineEngineDeath, RefusesAnotherRanksPartAndTooFewRanks) {
  LinearWork work(2, 1);
  const Program program = {{ActionKind::kForward, 2, 0}};
  EXPECT_DEATH(RunAlone(program, {0, 0}, work), "2F0: part 2 of 2");
  EXPECT_DEATH(RunAlone(program, {0, 1}, work), "parts on ranks 0,1, but self has 1");
}

// Work whose results break the contract: an activation of another length for odd microbatches, and
// none from part 1 on.
class WrongWork : public LinearWork {
 public:
  using LinearWork::LinearWork;
  Tensor Forward(int part, int microbatch, const Tensor& x) override {
    const Tensor y = LinearWork::Forward(part, microbatch, x);
    if (part > 0) return Tensor();
    return microbatch % 2 == 0 ? y : y.Rows(0, 3);
  }
};

TEST(PipelineEngineDeath, RefusesActivationsOfAnotherShapeOrNone) {
  WrongWork work(3, 2);
  const Program uneven = {{ActionKind::kForward, 0, 0}, {ActionKind::kForward, 0, 1}};
  EXPECT_DEATH(RunAlone(uneven, {0, 0, 0}, work), "0F1: I64\\[3\\] crosses, expected I64\\[640\\]");
  const Program none = {{ActionKind::kForward, 0, 0}, {ActionKind::kForward, 1, 0}};
  EXPECT_DEATH(RunAlone(none, {0, 0, 0}, work), "1F0 gave no tensor for the next part");
}

}  // namespace
}  // namespace baleen
