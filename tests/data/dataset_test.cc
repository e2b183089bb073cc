// Packing: golden token ids in file order, epochs and tails, corner cases of documents, shuffled
// orders.
#include "data/dataset.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <set>

#include "tests/data/token_files.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using absl::StatusCode;
using ::testing::ElementsAre;
using testing::HasStatus;
using testing::NumberedDocuments;
using testing::OpenTokenSet;
using testing::TestDirectory;
using testing::WriteTokenSet;

constexpr int64_t kVocabulary = 1 << 20;

TEST(IndexOrder, IsABijectionOfEverySize) {
  for (int64_t size = 0; size <= 130; ++size) {
    for (uint64_t seed = 0; seed < 5; ++seed) {
      const IndexOrder order = IndexOrder::Shuffled(size, seed, 1, 0, 0);
      std::set<int64_t> seen;
      for (int64_t i = 0; i < size; ++i) seen.insert(order.At(i));
      ASSERT_EQ(std::ssize(seen), size);
      if (size > 0) {
        EXPECT_EQ(*seen.begin(), 0);
        EXPECT_EQ(*seen.rbegin(), size - 1);
      }
    }
  }
}

TEST(IndexOrder, DependsOnEachPartOfItsStream) {
  const auto list = [](const IndexOrder& order) {
    std::vector<int64_t> numbers;
    for (int64_t i = 0; i < order.size(); ++i) numbers.push_back(order.At(i));
    return numbers;
  };
  const auto base = list(IndexOrder::Shuffled(100, 1, 2, 3, 4));
  EXPECT_EQ(base, list(IndexOrder::Shuffled(100, 1, 2, 3, 4)));
  EXPECT_NE(base, list(IndexOrder::Shuffled(100, 9, 2, 3, 4)));
  EXPECT_NE(base, list(IndexOrder::Shuffled(100, uint64_t{1} << 32 | 1, 2, 3, 4)));
  EXPECT_NE(base, list(IndexOrder::Shuffled(100, 1, 9, 3, 4)));
  EXPECT_NE(base, list(IndexOrder::Shuffled(100, 1, 2, 9, 4)));
  EXPECT_NE(base, list(IndexOrder::Shuffled(100, 1, 2, 3, 9)));
  EXPECT_NE(base, list(IndexOrder::Identity(100)));
}

TEST(IndexOrder, SendsEveryNumberToEveryPlaceAboutEquallyOften) {
  // 4,000 orders of 5: each (place, number) is expected 800 times, standard deviation 25.
  std::map<std::pair<int64_t, int64_t>, int> counts;
  for (uint64_t seed = 0; seed < 4000; ++seed) {
    const IndexOrder order = IndexOrder::Shuffled(5, seed, 1, 0, 0);
    for (int64_t i = 0; i < 5; ++i) ++counts[{i, order.At(i)}];
  }
  ASSERT_EQ(counts.size(), 25u);
  for (const auto& [place, count] : counts) EXPECT_NEAR(count, 800, 130);
}

TEST(IndexOrder, LargeOrdersHaveNoRunsThatStayTogether) {
  // A random order of 10,000 keeps a neighbour pair next to each other twice on average.
  const IndexOrder order = IndexOrder::Shuffled(10000, 7, 1, 0, 0);
  int neighbours = 0, unmoved = 0;
  for (int64_t i = 0; i + 1 < order.size(); ++i) {
    neighbours += std::abs(order.At(i + 1) - order.At(i)) == 1;
    unmoved += order.At(i) == i;
  }
  EXPECT_LT(neighbours, 12);
  EXPECT_LT(unmoved, 10);
}

class DatasetTest : public ::testing::Test {
 protected:
  Dataset Open(const std::vector<int>& lengths, int64_t seq_length, SampleOrder order,
               uint64_t seed = 1) {
    WriteTokenSet(directory_.Path("set"), NumberedDocuments(lengths));
    auto dataset = Dataset::Create(OpenTokenSet(directory_.Path("set")),
                                   {.seq_length = seq_length, .seed = seed, .order = order});
    CHECK_OK(dataset.status());
    return *std::move(dataset);
  }
  static Sample Read(Dataset& dataset, int64_t sample) {
    auto result = dataset.ReadSample(sample, kVocabulary);
    CHECK_OK(result.status());
    return *std::move(result);
  }
  TestDirectory directory_;
};

TEST_F(DatasetTest, CutsTheStreamIntoSamplesThatShareOneToken) {
  // Stream: 0 1 2 | 100 | 200 201 202 203 204 | 300 301, 11 tokens; L = 3 gives 3 samples, token
  // 301 is the tail.
  Dataset dataset = Open({3, 1, 5, 2}, 3, SampleOrder::kFileOrder);
  ASSERT_EQ(dataset.samples_per_epoch(), 3);
  EXPECT_THAT(Read(dataset, 0).tokens, ElementsAre(0, 1, 2, 100));
  EXPECT_THAT(Read(dataset, 0).document_begins, ElementsAre(0, 3));
  EXPECT_THAT(Read(dataset, 1).tokens, ElementsAre(100, 200, 201, 202));
  EXPECT_THAT(Read(dataset, 1).document_begins, ElementsAre(0, 1));
  EXPECT_THAT(Read(dataset, 2).tokens, ElementsAre(202, 203, 204, 300));
  EXPECT_THAT(Read(dataset, 2).document_begins, ElementsAre(0, 3));
  EXPECT_THAT(Read(dataset, 3).tokens, ElementsAre(0, 1, 2, 100))
      << "file order: the next epoch is the same";
}

TEST_F(DatasetTest, SkipsEmptyDocumentsWhereverTheyStand) {
  Dataset dataset =
      Open({0, 2, 0, 0, 1, 0, 2, 0}, 2, SampleOrder::kFileOrder);  // 100 101 | 400 | 600 601
  ASSERT_EQ(dataset.samples_per_epoch(), 2);
  EXPECT_THAT(Read(dataset, 0).tokens, ElementsAre(100, 101, 400));
  EXPECT_THAT(Read(dataset, 0).document_begins, ElementsAre(0, 2));
  EXPECT_THAT(Read(dataset, 1).tokens, ElementsAre(400, 600, 601));
  EXPECT_THAT(Read(dataset, 1).document_begins, ElementsAre(0, 1));
}

TEST_F(DatasetTest, CutsOneLongDocumentIntoManySamples) {
  Dataset dataset = Open({9}, 4, SampleOrder::kFileOrder);
  ASSERT_EQ(dataset.samples_per_epoch(), 2);
  EXPECT_THAT(Read(dataset, 1).tokens, ElementsAre(4, 5, 6, 7, 8));
  EXPECT_THAT(Read(dataset, 1).document_begins, ElementsAre(0));
}

TEST_F(DatasetTest, PacksManyDocumentsOfOneTokenIntoOneSample) {
  Dataset dataset = Open({1, 1, 1, 1}, 3, SampleOrder::kFileOrder);
  ASSERT_EQ(dataset.samples_per_epoch(), 1);
  EXPECT_THAT(Read(dataset, 0).tokens, ElementsAre(0, 100, 200, 300));
  EXPECT_THAT(Read(dataset, 0).document_begins, ElementsAre(0, 1, 2, 3));
}

TEST_F(DatasetTest, ASetOfExactlyOneSampleRepeatsItEachEpoch) {
  Dataset dataset = Open({4}, 3, SampleOrder::kShuffled);
  ASSERT_EQ(dataset.samples_per_epoch(), 1);
  for (int64_t n = 0; n < 5; ++n) EXPECT_THAT(Read(dataset, n).tokens, ElementsAre(0, 1, 2, 3));
}

TEST_F(DatasetTest, RefusesASetShorterThanOneSample) {
  for (const std::vector<int>& lengths : {std::vector<int>{2, 1}, {}, {0, 0}}) {
    WriteTokenSet(directory_.Path("set"), NumberedDocuments(lengths));
    EXPECT_THAT(
        Dataset::Create(OpenTokenSet(directory_.Path("set")), {.seq_length = 3}),
        HasStatus(StatusCode::kDataLoss, "expected at least one sample of seq_length + 1 = 4"));
  }
}

TEST_F(DatasetTest, ShuffledEpochsHaveGoldenTokenIds) {
  // The order is part of what a run is: a change of it must be seen here.
  Dataset dataset = Open({3, 1, 5, 2, 4}, 4, SampleOrder::kShuffled, /*seed=*/1234);
  ASSERT_EQ(dataset.samples_per_epoch(), 3);
  EXPECT_THAT(Read(dataset, 0).tokens, ElementsAre(2, 300, 301, 400, 401));
  EXPECT_THAT(Read(dataset, 1).tokens, ElementsAre(203, 204, 0, 1, 2));
  EXPECT_THAT(Read(dataset, 2).tokens, ElementsAre(100, 200, 201, 202, 203));
  EXPECT_THAT(Read(dataset, 3).tokens, ElementsAre(400, 401, 402, 403, 300));
}

TEST_F(DatasetTest, EachEpochTrainsOnEveryPackedTokenOnceInAnotherOrder) {
  // 40 documents of 7 tokens, L = 9: 31 samples of 280 tokens, none left out (279 = 31 * 9).
  Dataset dataset = Open(std::vector<int>(40, 7), 9, SampleOrder::kShuffled);
  ASSERT_EQ(dataset.samples_per_epoch(), 31);
  std::vector<std::vector<int32_t>> epochs;
  for (int64_t epoch = 0; epoch < 3; ++epoch) {
    std::vector<int32_t> targets;
    for (int64_t n = 31 * epoch; n < 31 * (epoch + 1); ++n) {
      const Sample sample = Read(dataset, n);
      targets.insert(targets.end(), sample.tokens.begin() + 1, sample.tokens.end());
    }
    EXPECT_EQ(std::set<int32_t>(targets.begin(), targets.end()).size(), 279u)
        << "every target once";
    epochs.push_back(targets);
  }
  EXPECT_NE(epochs[0], epochs[1]);
  EXPECT_NE(epochs[1], epochs[2]);
}

TEST_F(DatasetTest, ReadsDocumentsWholeAndInOrderAcrossBlocksOfThePlan) {
  // 1,500 documents: several blocks of the plan. Put back together by the shared tokens, the stream
  // is a permutation of whole documents.
  std::vector<int> lengths;
  for (int d = 0; d < 1500; ++d) lengths.push_back(d * 7 % 11);
  Dataset dataset = Open(lengths, 64, SampleOrder::kShuffled);
  std::map<int32_t, std::vector<int32_t>> by_first;
  for (int64_t n = 0; n < dataset.samples_per_epoch(); ++n) {
    const Sample sample = Read(dataset, n);
    by_first[sample.tokens.front()] = sample.tokens;
    for (size_t i = 1; i < sample.tokens.size(); ++i) {
      const bool begins =
          std::count(sample.document_begins.begin(), sample.document_begins.end(), i) == 1;
      const int32_t previous = sample.tokens[i - 1], token = sample.tokens[i];
      if (begins) {
        EXPECT_EQ(token % 100, 0);
        EXPECT_EQ(previous % 100, lengths[previous / 100] - 1) << "the document before it ended";
      } else {
        EXPECT_EQ(token, previous + 1);
      }
    }
  }
  ASSERT_EQ(std::ssize(by_first), dataset.samples_per_epoch());
  int64_t joined = 0;
  for (const auto& [first, tokens] : by_first) joined += by_first.count(tokens.back());
  EXPECT_GE(joined, dataset.samples_per_epoch() - 1)
      << "each sample but the last begins with another's last token";
}

TEST_F(DatasetTest, ReadingOutOfOrderGivesTheSameSamples) {
  Dataset forward = Open(std::vector<int>(30, 5), 8, SampleOrder::kShuffled);
  Dataset backward = Open(std::vector<int>(30, 5), 8, SampleOrder::kShuffled);
  std::vector<std::vector<int32_t>> samples;
  for (int64_t n = 0; n < 100; ++n) samples.push_back(Read(forward, n).tokens);
  for (int64_t n = 99; n >= 0; --n) EXPECT_EQ(Read(backward, n).tokens, samples[n]) << n;
}

TEST_F(DatasetTest, SeedAndPlaceInTheBlendChangeTheOrder) {
  const std::vector<int> lengths(30, 5);
  const auto order_of = [&](uint64_t seed, uint32_t source_idx) {
    WriteTokenSet(directory_.Path("set"), NumberedDocuments(lengths));
    auto dataset = Dataset::Create(OpenTokenSet(directory_.Path("set")),
                                   {.seq_length = 8, .seed = seed, .source_idx = source_idx});
    CHECK_OK(dataset.status());
    std::vector<int32_t> tokens;
    for (int64_t n = 0; n < dataset->samples_per_epoch(); ++n) {
      const Sample sample = Read(*dataset, n);
      tokens.insert(tokens.end(), sample.tokens.begin(), sample.tokens.end());
    }
    return tokens;
  };
  EXPECT_EQ(order_of(1, 0), order_of(1, 0));
  EXPECT_NE(order_of(1, 0), order_of(2, 0));
  EXPECT_NE(order_of(1, 0), order_of(1, 1));
}

TEST_F(DatasetTest, AnIdOutsideTheVocabularyStopsTheRead) {
  Dataset dataset = Open({3, 4}, 6, SampleOrder::kFileOrder);
  EXPECT_THAT(
      dataset.ReadSample(0, 103),
      HasStatus(StatusCode::kDataLoss, "document 1, token 3 (token 6 of the file): found id 103"));
}

}  // namespace
}  // namespace baleen
