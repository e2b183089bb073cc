// Pipeline schedules against what is published about them: bubble and live microbatches, and
// refusals of impossible numbers. F, B, W: forward, input gradient, weight gradient of what a rank
// holds; P ranks, M microbatches.
#include "parallel/schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using testing::HasStatus;
using testing::IsOk;

Schedule Make(SchedulePolicy policy, int ranks, int parts, int microbatches, bool forward = false) {
  const absl::StatusOr<Schedule> made = MakeSchedule({policy, ranks, parts, microbatches, forward});
  EXPECT_THAT(made.status(), IsOk());
  return made.ok() ? *made : Schedule{};
}

Timeline Simulate(const Schedule& schedule, const ScheduleCosts& costs) {
  const absl::StatusOr<Timeline> timeline = SimulateSchedule(schedule, costs);
  EXPECT_THAT(timeline.status(), IsOk());
  return timeline.ok() ? *timeline : Timeline{};
}

ScheduleReport LowerAndCheck(const Schedule& schedule) {
  const absl::StatusOr<Schedule> lowered = LowerSchedule(schedule);
  EXPECT_THAT(lowered.status(), IsOk());
  if (!lowered.ok()) return {};
  const absl::StatusOr<ScheduleReport> report = CheckSchedule(*lowered);
  EXPECT_THAT(report.status(), IsOk());
  return report.ok() ? *report : ScheduleReport{};
}

void ExpectBubble(const Schedule& schedule, const ScheduleCosts& costs, double expected) {
  const Timeline timeline = Simulate(schedule, costs);
  for (int rank = 0; rank < schedule.spec.num_ranks; ++rank) {
    EXPECT_DOUBLE_EQ(timeline.Bubble(rank), expected) << "rank " << rank;
  }
}

// One call per (P, M) with P in 2..16 and M in {P, 2P, 4P}, from `least` P on.
template <typename Body>
void ForEachSize(int least, Body body) {
  for (int ranks = 2; ranks <= 16; ++ranks) {
    for (int times : {1, 2, 4}) {
      if (times < least) continue;
      SCOPED_TRACE(absl::StrCat("P ", ranks, " M ", times * ranks));
      body(ranks, times * ranks);
    }
  }
}

// The forms of GPipe, 1F1B and interleaved count a backward as one block after which the gradient
// leaves: t_b = B + W.
constexpr ScheduleCosts kOneBackward = {.forward = 12, .backward_input = 20, .backward_weight = 0};
constexpr ScheduleCosts kSeparate = {.forward = 3, .backward_input = 4, .backward_weight = 2};

// Narayanan et al., arXiv 2104.04473, 2.2: bubble (p - 1)(t_f + t_b) for GPipe and 1F1B; GPipe
// stashes m microbatches.
TEST(Schedule, GpipeHasThePublishedBubbleAndKeepsEveryMicrobatch) {
  ForEachSize(1, [](int ranks, int microbatches) {
    const Schedule schedule = Make(SchedulePolicy::kGpipe, ranks, 1, microbatches);
    ExpectBubble(schedule, kOneBackward, (ranks - 1) * (12 + 20));
    const ScheduleReport report = LowerAndCheck(schedule);
    EXPECT_THAT(report.peak_to_weight, Each(microbatches));
    EXPECT_THAT(report.peak_to_input, Each(microbatches));
  });
}

// The same bubble; at most p microbatches in flight on the first rank, one fewer on each next
// (ibid.; p - rank).
TEST(Schedule, OneFOneBHasThePublishedBubbleAndKeepsPMinusRankMicrobatches) {
  ForEachSize(1, [](int ranks, int microbatches) {
    const Schedule schedule = Make(SchedulePolicy::k1F1B, ranks, 1, microbatches);
    ExpectBubble(schedule, kOneBackward, (ranks - 1) * (12 + 20));
    const ScheduleReport report = LowerAndCheck(schedule);
    for (int rank = 0; rank < ranks; ++rank) {
      EXPECT_EQ(report.peak_to_weight[rank], ranks - rank) << "rank " << rank;
      EXPECT_EQ(report.peak_to_input[rank], ranks - rank) << "rank " << rank;
    }
  });
}

// With the gradient sent between B and W, each of the P - 1 hops back is W shorter: (P - 1)(F + B).
TEST(Schedule, SendingTheGradientBeforeTheWeightGradientSavesWPerHop) {
  ForEachSize(1, [](int ranks, int microbatches) {
    for (SchedulePolicy policy : {SchedulePolicy::kGpipe, SchedulePolicy::k1F1B}) {
      ExpectBubble(Make(policy, ranks, 1, microbatches), kSeparate, (ranks - 1) * (3 + 4));
    }
  });
}

// arXiv 2104.04473, 2.2: (p - 1)(t_f + t_b) / v. In flight: the 2 (p - 1 - rank) + (v - 1) p
// forwards that Megatron-LM runs ahead and the one of the first 1F1B pair, or all there are;
// counted in parts of 1 / v of a rank's layers.
TEST(Schedule, InterleavedDividesTheBubbleByItsLoops) {
  ForEachSize(1, [](int ranks, int microbatches) {
    for (int loops : {2, 4}) {
      const Schedule schedule = Make(SchedulePolicy::kInterleaved, ranks, loops, microbatches);
      const ScheduleCosts part = {
          .forward = 12.0 / loops, .backward_input = 20.0 / loops, .backward_weight = 0};
      ExpectBubble(schedule, part, (ranks - 1) * (12.0 + 20.0) / loops);
      const ScheduleReport report = LowerAndCheck(schedule);
      for (int rank = 0; rank < ranks; ++rank) {
        const int ahead = 2 * (ranks - 1 - rank) + (loops - 1) * ranks + 1;
        EXPECT_EQ(report.peak_to_weight[rank], std::min(ahead, loops * microbatches))
            << "rank " << rank;
      }
    }
  });
}

// Qi et al., arXiv 2401.10241, table 2: ZB-H1 (p - 1)(T_F + T_B - T_W), memory p M_B; DeepSeek's
// DualPipe README writes the same as (PP - 1)(F + B - 2W), its B holding the W.
TEST(Schedule, ZbH1HasThePublishedBubbleAndTheMemoryOf1F1B) {
  ForEachSize(1, [](int ranks, int microbatches) {
    const Schedule schedule = Make(SchedulePolicy::kZbH1, ranks, 1, microbatches);
    ExpectBubble(schedule, {}, (ranks - 1) * (1 + 1 - 1));
    ExpectBubble(schedule, kSeparate, (ranks - 1) * (3 + 4 - 2));
    const ScheduleReport report = LowerAndCheck(schedule);
    EXPECT_THAT(report.peak_to_weight, Each(ranks));
    for (int rank = 0; rank < ranks; ++rank) EXPECT_EQ(report.peak_to_input[rank], ranks - rank);
  });
}

// Qi et al., section 6 (ZB-V): zero bubble when T_F = T_B = T_W, where a rank's cost runs from its
// first to its last action; memory p M_B, which is 2 p of its half-size parts. A step that starts
// and ends together still has the way to the turn, (P - 1) F of one part, less than any V can do
// without.
TEST(Schedule, ZbvNeverWaitsAtEqualCostsWithTheMemoryOf1F1B) {
  ForEachSize(2, [](int ranks, int microbatches) {
    const Schedule schedule = Make(SchedulePolicy::kZbv, ranks, 2, microbatches);
    const Timeline timeline = Simulate(schedule, {});
    for (int rank = 0; rank < ranks; ++rank)
      EXPECT_EQ(timeline.InnerBubble(rank), 0) << "rank " << rank;
    ExpectBubble(schedule, {}, ranks - 1);
    EXPECT_THAT(LowerAndCheck(schedule).peak_to_weight, Each(2 * ranks));
  });
}

// deepseek-ai/DualPipe README: DualPipeV's bubble (PP / 2 - 1)(F&B + B - 3W) and activations PP +
// 1, PP = 2 P parts, B a full backward, F&B a forward and a full backward together. Bubble as a
// bound: ours sends the gradient before its W.
TEST(Schedule, DualPipeVStaysWithinThePublishedBubbleAndMemory) {
  ForEachSize(2, [](int ranks, int microbatches) {
    const Schedule schedule = Make(SchedulePolicy::kDualPipeV, ranks, 2, microbatches);
    for (const ScheduleCosts& cost : {ScheduleCosts{1, 1, 1, 2}, ScheduleCosts{2, 3, 2, 5},
                                      ScheduleCosts{3, 3, 3, 5}, ScheduleCosts{10, 15, 8, 22}}) {
      const double w = cost.backward_weight;
      const double bound =
          (ranks - 1) * (cost.forward_backward + w + cost.backward_input + w - 3 * w);
      const Timeline timeline = Simulate(schedule, cost);
      for (int rank = 0; rank < ranks; ++rank)
        EXPECT_LE(timeline.Bubble(rank), bound) << "rank " << rank;
    }
    ExpectBubble(schedule, {}, ranks - 1);  // equal costs: the way to the turn alone, as ZB-V
    EXPECT_THAT(LowerAndCheck(schedule).peak_to_weight, Each(2 * ranks + 1));
  });
}

// Forward only: P - 1 parts before the last rank starts, in a V as many again on the way back.
TEST(Schedule, ForwardOnlyWaitsForTheWayThroughAlone) {
  ForEachSize(1, [](int ranks, int microbatches) {
    for (SchedulePolicy policy :
         {SchedulePolicy::kGpipe, SchedulePolicy::k1F1B, SchedulePolicy::kZbH1}) {
      ExpectBubble(Make(policy, ranks, 1, microbatches, true), {}, ranks - 1);
    }
    ExpectBubble(Make(SchedulePolicy::kInterleaved, ranks, 4, microbatches, true), {}, ranks - 1);
    for (SchedulePolicy policy : {SchedulePolicy::kZbv, SchedulePolicy::kDualPipeV}) {
      const Schedule schedule = Make(policy, ranks, 2, microbatches, true);
      ExpectBubble(schedule, {}, 2 * (ranks - 1));
      EXPECT_THAT(LowerAndCheck(schedule).peak_to_weight, Each(1));
    }
  });
}

TEST(Schedule, EveryPolicyPassesTheCheckAtEverySizeItAllows) {
  int checked = 0;
  for (int ranks : {1, 2, 3, 4, 5, 7, 8, 16}) {
    for (int microbatches : {1, 2, 3, 5, 8, 14, 16, 31, 32, 48}) {
      for (int policy = 0; policy < 6; ++policy) {
        for (int parts : {1, 2, 3, 4}) {
          for (bool forward_only : {false, true}) {
            const ScheduleSpec spec = {static_cast<SchedulePolicy>(policy), ranks, parts,
                                       microbatches, forward_only};
            const absl::StatusOr<Schedule> schedule = MakeSchedule(spec);
            if (!schedule.ok()) continue;
            SCOPED_TRACE(absl::StrCat(Name(spec.policy), " P ", ranks, " parts ", parts, " M ",
                                      microbatches, forward_only ? " forward only" : ""));
            LowerAndCheck(*schedule);
            ++checked;
          }
        }
      }
    }
  }
  EXPECT_GT(checked, 1000);
}

TEST(Schedule, PartsLieStandardLoopedOrInAV) {
  EXPECT_THAT(PartRanks(SchedulePolicy::k1F1B, 3, 1), ElementsAre(0, 1, 2));
  EXPECT_THAT(PartRanks(SchedulePolicy::kInterleaved, 3, 2), ElementsAre(0, 1, 2, 0, 1, 2));
  EXPECT_THAT(PartRanks(SchedulePolicy::kZbv, 3, 2), ElementsAre(0, 1, 2, 2, 1, 0));
}

TEST(Schedule, SmallListsReadAsDrawnByHand) {
  const Schedule schedule = Make(SchedulePolicy::k1F1B, 2, 1, 2);
  EXPECT_EQ(ProgramString(schedule.programs[0]), "0F0 0F1 0B0 0W0 0B1 0W1");
  EXPECT_EQ(ProgramString(schedule.programs[1]), "1F0 1B0 1W0 1F1 1B1 1W1");
  ASSERT_OK_AND_ASSIGN(const Schedule lowered, LowerSchedule(schedule));
  EXPECT_EQ(ProgramString(lowered.programs[0]), "0F0 0F0>1 0F1 0F1>1 0B0<1 0B0 0W0 0B1<1 0B1 0W1");
  EXPECT_EQ(ProgramString(lowered.programs[1]), "1F0<0 1F0 1F1<0 1B0 1B0>0 1W0 1F1 1B1 1B1>0 1W1");
  // At one time the even pairs of ranks meet first: rank 1 takes from 0 before it gives to 2.
  ASSERT_OK_AND_ASSIGN(const Schedule forward,
                       LowerSchedule(Make(SchedulePolicy::k1F1B, 3, 1, 2, true)));
  EXPECT_EQ(ProgramString(forward.programs[1]), "1F0<0 1F0 1F1<0 1F0>2 1F1 1F1>2");
  EXPECT_EQ(ProgramString(Make(SchedulePolicy::kDualPipeV, 1, 2, 2).programs[0]),
            "0F0 1F0 0F1 1B0 1W0 1F1+0B0 0W0 1B1 1W1 0B1 0W1");
}

TEST(Schedule, AMessageDelaysOnlyWhoNeedsIt) {
  const ScheduleCosts costs = {.forward = 1, .message = 0.5};
  const Timeline timeline = Simulate(Make(SchedulePolicy::k1F1B, 3, 1, 4, true), costs);
  EXPECT_EQ(timeline.ranks[0].back().end, 4);
  EXPECT_EQ(timeline.ranks[1].front().start, 1.5);
  EXPECT_EQ(timeline.ranks[2].front().start, 3);
  EXPECT_EQ(timeline.makespan, 7);
}

TEST(Schedule, TheGridShowsRanksOverTime) {
  const Timeline timeline =
      Simulate(Make(SchedulePolicy::k1F1B, 2, 1, 2), {.forward = 1, .backward_input = 2});
  EXPECT_EQ(ScheduleGrid(timeline, 100),
            "time     0   1   2   3   4   5   6   7   8   9   10  | bubble\n"
            "rank 0   0F0 0F1         0B0---- 0W0     0B1---- 0W1 | 27.3%\n"
            "rank 1       1F0 1B0---- 1W0 1F1 1B1---- 1W1         | 27.3%\n");
  EXPECT_EQ(ScheduleGrid(timeline, 3),
            "time     0   1   2   ... to 11 | bubble\n"
            "rank 0   0F0 0F1     | 27.3%\n"
            "rank 1       1F0 1B0-| 27.3%\n");
}

TEST(Schedule, ImpossibleNumbersAreRefusedWithTheNearestThatFit) {
  struct Case {
    ScheduleSpec spec;
    const char* message;
  };
  for (const Case& c : std::vector<Case>{
           {{SchedulePolicy::k1F1B, 4, 1, 0},
            "schedule 1f1b: 0 microbatches on 4 pipeline ranks; expected 1 or more"},
           {{SchedulePolicy::kGpipe, 4, 2, 8}, "schedule gpipe: 2 parts a rank; expected 1"},
           {{SchedulePolicy::kInterleaved, 4, 1, 8},
            "schedule interleaved: 1 part a rank; expected 2 or more"},
           {{SchedulePolicy::kZbv, 4, 3, 8}, "schedule zbv: 3 parts a rank; expected 2"},
           {{SchedulePolicy::kInterleaved, 4, 2, 10},
            "do not divide among 4 pipeline ranks; nearest that fit: 8 or 12"},
           {{SchedulePolicy::kInterleaved, 4, 2, 3}, "nearest that fit: 4"},
           {{SchedulePolicy::kDualPipeV, 4, 2, 7},
            "nearest that fit: 8 microbatches, or 3 pipeline ranks"}}) {
    EXPECT_THAT(MakeSchedule(c.spec), HasStatus(absl::StatusCode::kInvalidArgument, c.message));
  }
}

TEST(Schedule, PoliciesHaveTheNamesOfTheRunFile) {
  for (const char* name : {"gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipev"}) {
    ASSERT_OK_AND_ASSIGN(const SchedulePolicy policy, ParseSchedulePolicy(name));
    EXPECT_EQ(Name(policy), name);
  }
  EXPECT_THAT(ParseSchedulePolicy("1F1B"),
              HasStatus(absl::StatusCode::kInvalidArgument, "expected one of gpipe | 1f1b"));
}

}  // namespace
}  // namespace baleen
