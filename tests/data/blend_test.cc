// Blends: golden picks, proportions, random access equal to counting, weights that cannot be.
#include "data/blend.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numeric>

#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using absl::StatusCode;
using testing::HasStatus;

std::vector<int64_t> Sources(const Blend& blend, int64_t begin, int64_t end) {
  std::vector<int64_t> sources;
  for (int64_t n = begin; n < end; ++n) sources.push_back(blend.At(n).source_idx);
  return sources;
}

TEST(Blend, TakesTheSourceWithTheGreatestSamplingError) {
  // Weights 0.3 and 0.7, errors of sample n before the pick: (0.3, 0.7) (0.6, 0.4) (-0.1, 1.1)
  // (0.2, 0.8) (0.5, 0.5: a tie) (-0.2, 1.2) (0.1, 0.9) (0.4, 0.6) (0.7, 0.3) (0, 1).
  ASSERT_OK_AND_ASSIGN(const Blend blend, Blend::Create(std::vector<double>{0.3, 0.7}));
  EXPECT_EQ(blend.period(), 10);
  EXPECT_EQ(Sources(blend, 0, 10), (std::vector<int64_t>{1, 0, 1, 1, 0, 1, 1, 1, 0, 1}));
  EXPECT_EQ(Sources(blend, 10, 20), Sources(blend, 0, 10));
}

TEST(Blend, EqualWeightsTakeTurnsInTheOrderOfTheSources) {
  ASSERT_OK_AND_ASSIGN(const Blend blend, Blend::Create(std::vector<double>{2, 2, 2}));
  EXPECT_EQ(blend.period(), 3);
  EXPECT_EQ(Sources(blend, 0, 6), (std::vector<int64_t>{0, 1, 2, 0, 1, 2}));
}

TEST(Blend, OneSourceGivesItsSamplesInOrder) {
  ASSERT_OK_AND_ASSIGN(const Blend blend, Blend::Create(std::vector<double>{0.017}));
  EXPECT_EQ(blend.period(), 1);
  EXPECT_EQ(blend.At(123456789012).sample, 123456789012);
}

TEST(Blend, RandomAccessEqualsCountingAndEveryErrorStaysSmall) {
  const std::vector<std::vector<double>> cases = {{0.3, 0.7},
                                                  {1, 2, 3, 4, 5},
                                                  {0.9, 0.05, 0.05},
                                                  {1.0 / 3, 2.0 / 3},
                                                  {std::sqrt(2.0), 1, M_PI},
                                                  {1e-9, 1},
                                                  {0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.4}};
  for (const std::vector<double>& weights : cases) {
    ASSERT_OK_AND_ASSIGN(const Blend blend, Blend::Create(weights));
    const double sum = std::accumulate(weights.begin(), weights.end(), 0.0);
    std::vector<int64_t> counts(weights.size(), 0);
    const int64_t last = std::min<int64_t>(2 * blend.period() + 7, 100000);
    for (int64_t n = 0; n < last; ++n) {
      const Blend::Pick pick = blend.At(n);
      ASSERT_EQ(pick.sample, counts[pick.source_idx]++) << "sample " << n;
      for (size_t i = 0; i < weights.size(); ++i) {
        const double error =
            weights[i] / sum * static_cast<double>(n + 1) - static_cast<double>(counts[i]);
        // -1 by construction; above, H_K / 2 of K sources and what rounding to 2^20 parts adds.
        ASSERT_GT(error, -1.1) << "sample " << n << " source " << i;
        ASSERT_LT(error, 1.5) << "sample " << n << " source " << i;
      }
    }
  }
}

TEST(Blend, FindsTheExactPeriodOfDecimalWeightsAndRoundsOthers) {
  ASSERT_OK_AND_ASSIGN(const Blend decimal, Blend::Create(std::vector<double>{0.9, 0.05, 0.05}));
  EXPECT_EQ(decimal.period(), 20);
  ASSERT_OK_AND_ASSIGN(const Blend third, Blend::Create(std::vector<double>{1, 1.0 / 2}));
  EXPECT_EQ(third.period(), 3);
  const std::vector<double> weights = {std::sqrt(2.0), 1,
                                       M_PI};  // no common denominator below 2^20
  ASSERT_OK_AND_ASSIGN(const Blend irrational, Blend::Create(weights));
  EXPECT_NEAR(irrational.period(), 1 << 20, 2);
  for (int64_t i = 0; i < 3; ++i) {
    const double share = weights[i] / (weights[0] + weights[1] + weights[2]);
    EXPECT_NEAR(irrational.parts(i) / static_cast<double>(irrational.period()), share, 2e-6) << i;
  }
  ASSERT_OK_AND_ASSIGN(const Blend tiny, Blend::Create(std::vector<double>{1e-12, 1}));
  EXPECT_EQ(tiny.parts(0), 1) << "a source that was asked for is never left out";
}

TEST(Blend, RefusesWeightsThatCannotBe) {
  EXPECT_THAT(Blend::Create({}), HasStatus(StatusCode::kInvalidArgument, "no source given"));
  for (const double bad : {0.0, -1.0, std::nan(""), std::numeric_limits<double>::infinity()}) {
    EXPECT_THAT(Blend::Create(std::vector<double>{1, bad}),
                HasStatus(StatusCode::kInvalidArgument, "weight of source 1: found "));
  }
  constexpr double kMax = std::numeric_limits<double>::max();
  EXPECT_THAT(Blend::Create(std::vector<double>{kMax, kMax}),
              HasStatus(StatusCode::kInvalidArgument, "add up to more"));
}

}  // namespace
}  // namespace baleen
