// The pipeline engine on real MPI ranks: every policy computes what one rank computes, to the last
// bit; random layouts side by side; nothing is kept longer than the check said.
#include <gtest/gtest.h>

#include <random>

#include "parallel/mpi_communicator.h"
#include "parallel/pipeline_engine.h"
#include "tests/parallel/linear_pipeline.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::LinearWork;

struct Layout {
  SchedulePolicy policy;
  int parts_per_rank;
};

constexpr Layout kLayouts[] = {
    {SchedulePolicy::kGpipe, 1},       {SchedulePolicy::k1F1B, 1},
    {SchedulePolicy::kZbH1, 1},        {SchedulePolicy::kInterleaved, 2},
    {SchedulePolicy::kInterleaved, 3}, {SchedulePolicy::kZbv, 2},
    {SchedulePolicy::kDualPipeV, 2},
};

// The numbers that each policy can have (docs/schedules.md).
bool Possible(const ScheduleSpec& spec) {
  if (spec.forward_only) return true;
  if (spec.policy == SchedulePolicy::kInterleaved) {
    return spec.num_microbatches % spec.num_ranks == 0;
  }
  return spec.policy != SchedulePolicy::kDualPipeV || spec.num_microbatches >= 2 * spec.num_ranks;
}

std::string SpecString(const ScheduleSpec& spec) {
  return absl::StrCat(Name(spec.policy), " P ", spec.num_ranks, " v ", spec.parts_per_rank, " M ",
                      spec.num_microbatches, spec.forward_only ? " forward only" : "");
}

class PipelineEngineTest : public ::testing::Test {
 protected:
  // Calls body(spec) for every policy over all of the world's ranks.
  template <typename Body>
  void ForEachSpec(const std::vector<int>& microbatch_counts, Body body) {
    for (const Layout& layout : kLayouts) {
      for (const int microbatches : microbatch_counts) {
        for (const bool forward_only : {false, true}) {
          const ScheduleSpec spec = {layout.policy, world_->size(), layout.parts_per_rank,
                                     microbatches, forward_only};
          SCOPED_TRACE(SpecString(spec));
          body(spec);
        }
      }
    }
  }

  std::unique_ptr<Communicator> world_ = WrapMpiWorld();
};

TEST_F(PipelineEngineTest, EveryPolicyComputesWhatOneRankComputes) {
  const int ranks = world_->size();
  std::vector<int> microbatch_counts;
  // P .. 4P; on many ranks the ends and the middle.
  for (int m = ranks; m <= 4 * ranks; m += ranks > 4 ? ranks : 1) microbatch_counts.push_back(m);
  ForEachSpec(microbatch_counts, [&](const ScheduleSpec& spec) {
    const auto checked = MakeCheckedSchedule(spec);
    ASSERT_EQ(checked.ok(), Possible(spec)) << checked.status().ToString();
    if (!checked.ok()) return;
    const Schedule& schedule = checked->schedule;
    LinearWork work(schedule.num_parts(), spec.num_microbatches);
    RunPipeline(schedule.programs[world_->rank()], schedule.part_rank, *world_, work);
    work.ExpectDone(schedule, world_->rank());
    const bool interleaves = spec.policy == SchedulePolicy::kDualPipeV && !spec.forward_only;
    EXPECT_EQ(work.interleaved() > 0, interleaves);
  });
}

TEST_F(PipelineEngineTest, HoldsNoMoreTensorsThanTheCheckCounted) {
  const int ranks = world_->size();
  ForEachSpec({2 * ranks}, [&](const ScheduleSpec& spec) {
    const auto checked = MakeCheckedSchedule(spec);
    ASSERT_THAT(checked, testing::IsOk());
    const Schedule& schedule = checked->schedule;
    LinearWork work(schedule.num_parts(), spec.num_microbatches);
    RunPipeline(schedule.programs[world_->rank()], schedule.part_rank, *world_, work);
    // What stays on the rank is not in the check's count.
    bool hands_over = false;
    for (int part = 1; part < schedule.num_parts(); ++part) {
      hands_over |= schedule.part_rank[part - 1] == world_->rank() &&
                    schedule.part_rank[part] == world_->rank();
    }
    if (hands_over) return;
    // Received and not yet used, and what the action under way makes of it.
    const int made = work.interleaved() > 0 ? 2 : 1;
    EXPECT_LE(work.peak_tensors(), checked->report.peak_received[world_->rank()] + made);
  });
}

TEST_F(PipelineEngineTest, RandomLayoutsSideBySideEndWithTheSameResults) {
  std::mt19937 random(11);  // the same draws on every rank
  for (int drawn = 0; drawn < 200; ++drawn) {
    // The world is dealt to pipelines of up to `most` ranks, in a random order of ranks.
    const int most = 1 + static_cast<int>(random() % world_->size());
    std::vector<int> places(world_->size());
    for (size_t i = 0; i < places.size(); ++i) {
      const size_t j = random() % (i + 1);
      places[i] = places[j];
      places[j] = static_cast<int>(i);
    }
    const Layout& layout = kLayouts[random() % std::size(kLayouts)];
    const int microbatches = 1 + static_cast<int>(random() % (2 * most));
    const bool forward_only = random() % 4 == 0;
    const int most_delay_us = random() % 4 == 0 ? 200 : 0;

    const int place = places[world_->rank()];
    const auto pp = world_->Split(place / most, place, "pp");
    ScheduleSpec spec = {layout.policy, pp->size(), layout.parts_per_rank, microbatches,
                         forward_only};
    // The next number of microbatches that the policy can have.
    while (!Possible(spec)) ++spec.num_microbatches;
    SCOPED_TRACE(absl::StrCat("layout ", drawn, ": ", SpecString(spec)));
    const auto checked = MakeCheckedSchedule(spec);
    ASSERT_THAT(checked, testing::IsOk());
    const Schedule& schedule = checked->schedule;
    LinearWork work(schedule.num_parts(), spec.num_microbatches, most_delay_us,
                    1000 * drawn + world_->rank());
    RunPipeline(schedule.programs[pp->rank()], schedule.part_rank, *pp, work);
    work.ExpectDone(schedule, pp->rank());
  }
}

TEST_F(PipelineEngineTest, LabelsMessagesWithTheirActions) {
  if (world_->size() != 2) return;  // two ranks: one message each way
  const auto checked = MakeCheckedSchedule({SchedulePolicy::k1F1B, 2, 1, 1, false});
  ASSERT_THAT(checked, testing::IsOk());
  LinearWork work(2, 1);
  RunPipeline(checked->schedule.programs[world_->rank()], checked->schedule.part_rank, *world_,
              work);
  const std::string record = world_->FlightRecord();
  for (const char* call : {"#0 Send 0F0>1 5120 bytes done", "#1 Recv 0B0<1 5120 bytes done"}) {
    EXPECT_EQ(record.find(call) != std::string::npos, world_->rank() == 0) << record;
  }
  for (const char* call : {"#0 Recv 1F0<0 5120 bytes done", "#1 Send 1B0>0 5120 bytes done"}) {
    EXPECT_EQ(record.find(call) != std::string::npos, world_->rank() == 1) << record;
  }
}

}  // namespace
}  // namespace baleen
