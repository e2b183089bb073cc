// ProcessGrid: coordinates, folding, and the messages of layouts that cannot be.
#include "parallel/process_grid.h"

#include <gtest/gtest.h>

#include <set>

#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;

TEST(ProcessGrid, PutsTensorNeighboursOnNeighbouringRanks) {
  ASSERT_OK_AND_ASSIGN(
      const ProcessGrid grid,
      ProcessGrid::Make(16, {.tensor = 2, .pipeline = 2, .expert = 4, .context = 2}));
  EXPECT_EQ(grid.dp_size(), 2);
  EXPECT_EQ(grid.edp_size(), 2);
  const ProcessGrid::Coordinates at = grid.At(13);
  EXPECT_EQ(at.pp, 1);
  EXPECT_EQ(at.dp, 1);
  EXPECT_EQ(at.cp, 0);
  EXPECT_EQ(at.tp, 1);
  EXPECT_EQ(at.edp, 1);
  EXPECT_EQ(at.ep, 1);
}

TEST(ProcessGrid, GivesEveryRankOnePlaceOnBothSetsOfAxes) {
  ASSERT_OK_AND_ASSIGN(
      const ProcessGrid grid,
      ProcessGrid::Make(24, {.tensor = 2, .pipeline = 3, .expert = 4, .context = 2}));
  std::set<int> dense, expert;
  for (int rank = 0; rank < 24; ++rank) {
    const auto at = grid.At(rank);
    EXPECT_EQ(grid.DenseRank(at.pp, at.dp, at.cp, at.tp), rank);
    EXPECT_EQ(grid.ExpertRank(at.pp, at.edp, at.ep), rank);
    dense.insert(grid.DenseRank(at.pp, at.dp, at.cp, at.tp));
    expert.insert(grid.ExpertRank(at.pp, at.edp, at.ep));
  }
  EXPECT_EQ(dense.size(), 24);
  EXPECT_EQ(expert.size(), 24);
}

TEST(ProcessGrid, SaysWhichProductIsWrongAndWhatWouldFit) {
  EXPECT_THAT(
      ProcessGrid::Make(10, {.tensor = 4}),
      HasStatus(absl::StatusCode::kInvalidArgument,
                "tensor 4 x pipeline 1 x context 1 = 4 does not divide the 10 ranks of this "
                "job; with this layout start 8 or 12 ranks"));
  EXPECT_THAT(ProcessGrid::Make(8, {.pipeline = 2, .expert = 3}),
              HasStatus(absl::StatusCode::kInvalidArgument,
                        "parallelism.expert = 3 does not divide the 4 ranks of a pipeline stage"));
  EXPECT_THAT(ProcessGrid::Make(8, {.pipeline = 2, .expert = 3}),
              HasStatus(absl::StatusCode::kInvalidArgument, "nearest that fit: 2 or 4"));
  EXPECT_THAT(ProcessGrid::Make(8, {.context = 0}),
              HasStatus(absl::StatusCode::kInvalidArgument, "parallelism.context = 0"));
}

}  // namespace
}  // namespace baleen
