// Stage split: small cases by hand, every small case against all splits, the sizes of the real
// model, and what is refused.
#include "parallel/stage_split.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <random>

#include "parallel/schedule.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using ::testing::ElementsAre;
using testing::HasStatus;
using testing::IsOk;
using Split = std::vector<int64_t>;

constexpr absl::StatusCode kConfig = absl::StatusCode::kInvalidArgument;

std::vector<int> OnePartARank(int num_ranks) {
  return PartRanks(SchedulePolicy::k1F1B, num_ranks, 1);
}
std::vector<int> V(int num_ranks) { return PartRanks(SchedulePolicy::kZbv, num_ranks, 2); }
std::vector<int> Looped(int num_ranks, int loops) {
  return PartRanks(SchedulePolicy::kInterleaved, num_ranks, loops);
}

Split MustSplit(const StageCosts& costs, const std::vector<int>& part_rank) {
  const auto split = SplitLayers(costs, part_rank);
  EXPECT_THAT(split.status(), IsOk());
  return split.ok() ? *split : Split();
}

std::vector<double> PartCosts(const StageCosts& costs, const Split& split) {
  std::vector<double> parts;
  auto layer = costs.layers.begin();
  for (const int64_t layers : split) {
    parts.push_back(std::accumulate(layer, layer + layers, 0.0));
    layer += layers;
  }
  parts.front() += costs.embedding;
  parts.back() += costs.head;
  return parts;
}

double LargestRank(const StageCosts& costs, const Split& split, const std::vector<int>& part_rank) {
  std::vector<double> ranks(part_rank.size(), 0);
  const std::vector<double> parts = PartCosts(costs, split);
  for (size_t part = 0; part < parts.size(); ++part) ranks[part_rank[part]] += parts[part];
  return *std::max_element(ranks.begin(), ranks.end());
}

// Calls body(split) for all splits of `layers` into `parts` that are allowed.
template <typename Body>
void ForAllSplits(int64_t layers, int parts, Split& split, Body body) {
  if (static_cast<int>(split.size()) == parts - 1) {
    split.push_back(layers);
    if (parts > 1 || layers > 0) body(split);
    split.pop_back();
    return;
  }
  for (int64_t here = 1; here <= layers; ++here) {
    split.push_back(here);
    ForAllSplits(layers - here, parts, split, body);
    split.pop_back();
  }
}

// The order that the header states, as numbers to compare.
std::vector<double> Order(const StageCosts& costs, const Split& split,
                          const std::vector<int>& part_rank) {
  const std::vector<double> parts = PartCosts(costs, split);
  std::vector<double> order = {LargestRank(costs, split, part_rank),
                               *std::max_element(parts.begin(), parts.end()),
                               std::inner_product(parts.begin(), parts.end(), parts.begin(), 0.0)};
  order.insert(order.end(), split.begin(), split.end());
  return order;
}

Split BestOfAll(const StageCosts& costs, const std::vector<int>& part_rank) {
  Split best, split;
  ForAllSplits(
      static_cast<int64_t>(costs.layers.size()), static_cast<int>(part_rank.size()), split,
      [&](const Split& candidate) {
        if (best.empty() || Order(costs, candidate, part_rank) < Order(costs, best, part_rank)) {
          best = candidate;
        }
      });
  return best;
}

// Whole numbers that sum to 1024, a power of two, so that the solver's units are exact.
StageCosts RandomCosts(int num_layers, bool equal_layers, std::mt19937& random) {
  const auto up_to = [&](int most) { return static_cast<double>(random() % (most + 1)); };
  StageCosts costs;
  const double common = 1 + up_to(99);
  for (int layer = 0; layer < num_layers; ++layer) {
    costs.layers.push_back(equal_layers ? common : 1 + up_to(99));
  }
  const double rest = 1024 - std::accumulate(costs.layers.begin(), costs.layers.end(), 0.0);
  costs.head = up_to(static_cast<int>(rest));
  costs.embedding = rest - costs.head;
  return costs;
}

StageCosts Uneven(double embedding, int64_t num_layers, double head) {
  return {.embedding = embedding, .layers = std::vector<double>(num_layers, 1), .head = head};
}

// Random costs for 1 .. 8 layers and as many parts as `part_rank` has.
template <typename Body>
void ForRandomCosts(const std::vector<int>& part_rank, bool equal_layers, Body body) {
  std::mt19937 random(static_cast<unsigned>(part_rank.size()));
  for (int layers = std::max<int>(1, static_cast<int>(part_rank.size()) - 1); layers <= 8;
       ++layers) {
    for (int repeat = 0; repeat < 50; ++repeat) {
      const StageCosts costs = RandomCosts(layers, equal_layers, random);
      SCOPED_TRACE(absl::StrCat(layers, " layers, ", part_rank.size(), " parts, repeat ", repeat,
                                ", embedding ", costs.embedding, " head ", costs.head));
      body(costs);
    }
  }
}

TEST(StageSplit, CountsEmbeddingAndHeadAndGivesEarlierPartsFewerLayers) {
  // 13 in all: one part of 4 and three of 3. The part of 4 is the last, as earlier ranks hold more
  // microbatches.
  EXPECT_THAT(MustSplit(Uneven(1, 10, 2), OnePartARank(4)), ElementsAre(2, 3, 3, 2));
  EXPECT_THAT(MustSplit(Uneven(0, 7, 0), OnePartARank(3)), ElementsAre(2, 2, 3));
  EXPECT_THAT(MustSplit(Uneven(5, 4, 7), OnePartARank(1)), ElementsAre(4));
}

TEST(StageSplit, LeavesTheHeadAloneWhereThatIsBestOrNoLayerIsLeft) {
  EXPECT_THAT(MustSplit(Uneven(0, 6, 3), OnePartARank(3)), ElementsAre(3, 3, 0));
  EXPECT_THAT(MustSplit(Uneven(0, 6, 2), OnePartARank(3)), ElementsAre(2, 3, 1));
  EXPECT_THAT(MustSplit(Uneven(9, 3, 0), OnePartARank(4)), ElementsAre(1, 1, 1, 0));
}

TEST(StageSplit, KeepsALayerInTheFirstPartHoweverDearTheEmbedding) {
  EXPECT_THAT(MustSplit(Uneven(9, 6, 0), OnePartARank(3)), ElementsAre(1, 2, 3));
}

TEST(StageSplit, WeighsLayersOfDifferentCost) {
  // Dense layers at 1, MoE layers at 2: sums 6, 6, 6.
  StageCosts costs = Uneven(0, 10, 0);
  for (int layer = 2; layer < 10; ++layer) costs.layers[layer] = 2;
  EXPECT_THAT(MustSplit(costs, OnePartARank(3)), ElementsAre(4, 3, 3));
}

TEST(StageSplit, EvensLayersWhereNothingCosts) {
  EXPECT_THAT(MustSplit({.layers = std::vector<double>(7, 0)}, OnePartARank(2)), ElementsAre(3, 4));
}

TEST(StageSplit, EvensTheRanksOfAV) {
  // Rank 0 holds the first part and the last one with the head of 4: 12 in all, 6 a rank.
  const StageCosts costs = Uneven(0, 8, 4);
  const Split split = MustSplit(costs, V(2));
  EXPECT_EQ(LargestRank(costs, split, V(2)), 6);
  EXPECT_THAT(split, ElementsAre(2, 3, 3, 0));
}

TEST(StageSplit, EvensTheRanksOfALoop) {
  // Parts 1 and 3 with the head of 3 on rank 1: 11 in all, 6 and 5.
  const StageCosts costs = Uneven(0, 8, 3);
  EXPECT_EQ(LargestRank(costs, MustSplit(costs, Looped(2, 2)), Looped(2, 2)), 6);
}

TEST(StageSplit, IsTheBestOfAllSplitsWithOnePartARank) {
  for (int ranks = 1; ranks <= 4; ++ranks) {
    for (const bool equal_layers : {true, false}) {
      ForRandomCosts(OnePartARank(ranks), equal_layers, [&](const StageCosts& costs) {
        EXPECT_EQ(MustSplit(costs, OnePartARank(ranks)), BestOfAll(costs, OnePartARank(ranks)));
      });
    }
  }
}

TEST(StageSplit, HasTheLeastLargestRankWithTwoPartsARank) {
  for (const std::vector<int>& part_rank : {V(1), V(2), Looped(2, 2)}) {
    for (const bool equal_layers : {true, false}) {
      ForRandomCosts(part_rank, equal_layers, [&](const StageCosts& costs) {
        EXPECT_EQ(LargestRank(costs, MustSplit(costs, part_rank), part_rank),
                  LargestRank(costs, BestOfAll(costs, part_rank), part_rank));
      });
    }
  }
}

TEST(StageSplit, EvensThePartsOfRanksThatAreEven) {
  // Ranks of 6.6 and 6.5: so has 2, 1, 6, 3, with parts of 1 and 6 on one rank.
  StageCosts costs = Uneven(0.1, 12, 2.5);
  for (int layer = 0; layer < 3; ++layer) costs.layers[layer] = 0.5;
  EXPECT_THAT(MustSplit(costs, V(2)), ElementsAre(2, 4, 3, 3));
}

TEST(StageSplit, HasTheLeastLargestRankWithMoreEqualPartsARankAndNearlyWithUnevenOnes) {
  for (const std::vector<int>& part_rank : {Looped(1, 3), Looped(1, 4), Looped(2, 3)}) {
    for (const bool equal_layers : {true, false}) {
      ForRandomCosts(part_rank, equal_layers, [&](const StageCosts& costs) {
        const double least = LargestRank(costs, BestOfAll(costs, part_rank), part_rank);
        const double missed = LargestRank(costs, MustSplit(costs, part_rank), part_rank) - least;
        const double dearest = *std::max_element(costs.layers.begin(), costs.layers.end());
        EXPECT_LT(missed, equal_layers ? 1e-9 : dearest);
      });
    }
  }
}

TEST(StageSplit, SplitsTheRealModelEvenly) {
  // 61 layers of V3.1, in units of a MoE layer: 3 dense ones, head and MTP of two and a half.
  StageCosts costs = Uneven(0.1, 61, 2.5);
  for (int layer = 0; layer < 3; ++layer) costs.layers[layer] = 0.7;
  for (const std::vector<int>& part_rank :
       {OnePartARank(16), V(8), V(16), Looped(8, 3), Looped(16, 2)}) {
    const Split split = MustSplit(costs, part_rank);
    EXPECT_THAT(CheckLayerSplit(split, static_cast<int>(part_rank.size()), 61), IsOk());
    const int ranks = 1 + *std::max_element(part_rank.begin(), part_rank.end());
    const double even = (0.1 + 3 * 0.7 + 58 + 2.5) / ranks;
    // No rank has a whole layer more than its even share.
    EXPECT_LT(LargestRank(costs, split, part_rank), even + 1) << part_rank.size();
  }
}

TEST(StageSplit, RefusesTooFewLayersAndSaysWhatFits) {
  EXPECT_THAT(SplitLayers(Uneven(0, 2, 0), OnePartARank(4)),
              HasStatus(kConfig,
                        "splitting 2 layers into 4 pipeline parts (pipeline 4 x 1 on a "
                        "rank): every part but the last needs a layer; at most 3 parts "
                        "fit: pipeline 3 x 1"));
  EXPECT_THAT(SplitLayers(Uneven(0, 4, 0), V(4)),
              HasStatus(kConfig, "at most 5 parts fit: pipeline 2 x 2, or pipeline 4 x 1"));
  EXPECT_THAT(SplitLayers(Uneven(1, 0, 1), OnePartARank(1)),
              HasStatus(kConfig, "splitting 0 layers into 1 pipeline parts"));
}

TEST(StageSplit, ChecksAUsersNumbers) {
  EXPECT_THAT(CheckLayerSplit({2, 3, 0}, 3, 5), IsOk());
  EXPECT_THAT(CheckLayerSplit({5}, 1, 5), IsOk());
  EXPECT_THAT(CheckLayerSplit({2, 3}, 3, 5),
              HasStatus(kConfig, "parallelism.layer_split = [2, 3]: has 2 numbers, expected 3"));
  EXPECT_THAT(CheckLayerSplit({2, 2, 2}, 3, 5),
              HasStatus(kConfig, "the sum is 6, expected the model's 5 layers"));
  EXPECT_THAT(CheckLayerSplit({3, 0, 2}, 3, 5),
              HasStatus(kConfig, "part 1 has no layers; only the last, part 2, may have none"));
  EXPECT_THAT(CheckLayerSplit({-1, 6}, 2, 5),
              HasStatus(kConfig, "part 0 has -1 layers of 5; part 1 has 6 layers of 5"));
  EXPECT_THAT(CheckLayerSplit({INT64_MAX, INT64_MAX, 2}, 3, 5),
              HasStatus(kConfig, "part 1 has 9223372036854775807 layers of 5"));
  EXPECT_THAT(CheckLayerSplit({0, 2}, 3, 5), HasStatus(kConfig,
                                                       "has 2 numbers, expected 3, one "
                                                       "for each pipeline part; part 0 "
                                                       "has no layers"));
}

TEST(StageSplit, PrintsOneLineAPart) {
  EXPECT_EQ(LayerSplitTable({2, 1, 1}, Uneven(1, 4, 3), OnePartARank(3)),
            "part 0  rank 0  embedding, layers 0..1  37.5 %\n"
            "part 1  rank 1  layer 2                 12.5 %\n"
            "part 2  rank 2  layer 3, head           50.0 %\n");
  EXPECT_EQ(LayerSplitTable({2, 3, 3, 0}, Uneven(0, 8, 2), V(2)),
            "part 0  rank 0  embedding, layers 0..1  20.0 %  rank  40.0 %\n"
            "part 1  rank 1  layers 2..4             30.0 %  rank  60.0 %\n"
            "part 2  rank 1  layers 5..7             30.0 %  rank  60.0 %\n"
            "part 3  rank 0  no layers, head         20.0 %  rank  40.0 %\n");
}

}  // namespace
}  // namespace baleen
