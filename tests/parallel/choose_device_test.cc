// Which GPU a rank takes.
#include "parallel/choose_device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;

TEST(ChooseDevice, GivesEachRankItsOwn) {
  for (int rank = 0; rank < 4; ++rank) EXPECT_EQ(*ChooseDevice(8, rank, 4), rank);
}

TEST(ChooseDevice, TakesTheOnlyOneThatTheLauncherShows) { EXPECT_EQ(*ChooseDevice(1, 3, 4), 0); }

TEST(ChooseDevice, SaysHowManyAreMissing) {
  EXPECT_THAT(ChooseDevice(2, 0, 4),
              HasStatus(absl::StatusCode::kFailedPrecondition,
                        "4 ranks on this host, but only 2 GPUs are visible"));
  EXPECT_THAT(ChooseDevice(0, 0, 1),
              HasStatus(absl::StatusCode::kFailedPrecondition, "no GPU is visible"));
}

}  // namespace
}  // namespace baleen
