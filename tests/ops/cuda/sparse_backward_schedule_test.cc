// The order of work in a launch of the sparse attention backward: nothing is forgotten or done
// twice, nothing waits for what starts later, and so thread blocks on any number of places end.
#include <gtest/gtest.h>

#include <algorithm>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "kernels/ops/attention/sparse_attention_backward_schedule_cuda.h"

namespace baleen {
namespace {

// Slots of the ring that hold the rows of a chunk each: as few as there may be.
int Ring(const SparseBackwardSchedule& schedule) {
  return schedule.lag <= schedule.chunk ? SparseBackwardSchedule::kRing
                                        : FewestSlotsOfPacks(schedule.chunk, schedule.lag);
}

// Of a launch with 1 or 2 tiles: 8 or 16 queries a sum, a lag of up to a chunk. Of packs: 2, any.
void ForEachSchedule(const std::function<void(const SparseBackwardSchedule&)>& check) {
  for (const int queries : {1, 31, 32, 33, 257, 300, 1000}) {
    for (const int chunk : {32, 64, 256}) {
      for (const int a_sum : {2, 8, 16}) {
        for (const int lag : {0, 7, 32, 33, 160}) {
          SCOPED_TRACE(std::to_string(queries) + " queries, chunks of " + std::to_string(chunk) +
                       ", " + std::to_string(a_sum) + " a sum, lag " + std::to_string(lag));
          check({queries, chunk, a_sum, lag});
        }
      }
    }
  }
}

// The place of each query and of each sum in the order; -1 = it never comes.
struct Places {
  std::vector<int> query, sum;
};

Places PlacesOf(const SparseBackwardSchedule& schedule) {
  Places places;
  places.query.assign(schedule.num_queries, -1);
  places.sum.assign(schedule.NumChunks() * schedule.SumsAChunk(), -1);
  for (int i = 0; i < schedule.NumItems(); ++i) {
    const SparseBackwardItem item = schedule.Item(i);
    std::vector<int>& at = item.is_sum ? places.sum : places.query;
    if (item.index < 0 || item.index >= static_cast<int>(at.size())) {
      ADD_FAILURE() << "item " << i << " is the " << item.index << "th of " << at.size();
      continue;
    }
    EXPECT_EQ(at[item.index], -1) << "item " << i << " comes twice";
    at[item.index] = i;
  }
  return places;
}

TEST(SparseBackwardSchedule, HasEachQueryAndEachSumOnce) {
  ForEachSchedule([](const SparseBackwardSchedule& schedule) {
    const Places places = PlacesOf(schedule);
    EXPECT_EQ(std::count(places.query.begin(), places.query.end(), -1), 0);
    EXPECT_EQ(std::count(places.sum.begin(), places.sum.end(), -1), 0);
  });
}

TEST(SparseBackwardSchedule, WaitsForEarlierItemsOnly) {
  ForEachSchedule([](const SparseBackwardSchedule& schedule) {
    const Places places = PlacesOf(schedule);
    const int sums = schedule.SumsAChunk();
    const auto last_sum = [&](int chunk) {
      return *std::max_element(places.sum.begin() + chunk * sums,
                               places.sum.begin() + (chunk + 1) * sums);
    };
    for (int t = 0; t < schedule.num_queries; ++t) {
      const int reused = t / schedule.chunk - Ring(schedule);
      if (reused >= 0) EXPECT_LT(last_sum(reused), places.query[t]) << "query " << t;
    }
    for (int x = 0; x < static_cast<int>(places.sum.size()); ++x) {
      const int chunk = x / sums;
      const int last = chunk * schedule.chunk + schedule.QueriesOfChunk(chunk) - 1;
      EXPECT_LT(places.query[last], places.sum[x]) << "sum " << x;
      // The same keys of the chunk before.
      if (chunk > 0) EXPECT_LT(places.sum[x - sums], places.sum[x]) << "sum " << x;
    }
  });
}

// Thread blocks take places in the order of the items; each ends, in random order, once what it
// waits for has ended.
bool Ends(const SparseBackwardSchedule& schedule, int num_places, uint32_t seed) {
  std::minstd_rand random(seed);
  const int sums = schedule.SumsAChunk();
  std::vector<int> written(schedule.NumChunks()), summed(schedule.NumChunks()), running;
  std::vector<int> turns(sums);  // chunks of which this share of the keys is summed
  const auto may_end = [&](const SparseBackwardItem& item) {
    if (!item.is_sum) {
      const int reused = item.index / schedule.chunk - Ring(schedule);
      return reused < 0 || summed[reused] == sums;
    }
    const int chunk = item.index / sums;
    return written[chunk] == schedule.QueriesOfChunk(chunk) && turns[item.index % sums] >= chunk;
  };
  int next = 0;
  while (next < schedule.NumItems() || !running.empty()) {
    while (static_cast<int>(running.size()) < num_places && next < schedule.NumItems()) {
      running.push_back(next++);
    }
    std::shuffle(running.begin(), running.end(), random);
    const auto ended = std::find_if(running.begin(), running.end(),
                                    [&](int i) { return may_end(schedule.Item(i)); });
    if (ended == running.end()) return false;
    const SparseBackwardItem item = schedule.Item(*ended);
    ++(item.is_sum ? summed[item.index / sums] : written[item.index / schedule.chunk]);
    if (item.is_sum) ++turns[item.index % sums];
    running.erase(ended);
  }
  return true;
}

TEST(SparseBackwardSchedule, NeedsASlotMoreForEachChunkThatSumsLagBehind) {
  EXPECT_EQ(FewestSlotsOfPacks(96, 1), 3);
  EXPECT_EQ(FewestSlotsOfPacks(96, 96), 3);
  EXPECT_EQ(FewestSlotsOfPacks(96, 97), 4);
  EXPECT_EQ(FewestSlotsOfPacks(64, 160), 5);
}

TEST(SparseBackwardSchedule, EndsOnAnyNumberOfPlaces) {
  uint32_t seed = 1;
  ForEachSchedule([&](const SparseBackwardSchedule& schedule) {
    for (const int places : {1, 5, 132}) {
      EXPECT_TRUE(Ends(schedule, places, ++seed)) << places << " places";
    }
  });
}

}  // namespace
}  // namespace baleen
