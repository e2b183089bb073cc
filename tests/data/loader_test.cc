// The loader: which samples a rank gets, rows and masks of a microbatch, resume, faults met inside
// a step.
#include "data/loader.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "tests/data/token_files.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using absl::StatusCode;
using ::testing::ElementsAre;
using testing::HasStatus;
using testing::IsOk;
using testing::NumberedDocuments;
using testing::TestDirectory;
using testing::WriteTokenSet;

TEST(Microbatch, WithoutMaskEveryPositionButTheLastOfMtpHasATarget) {
  const Microbatch batch = MakeMicrobatch({{{1, 2, 3, 4, 5}, {0, 2}}}, /*document_mask=*/false);
  EXPECT_THAT(batch.tokens, ElementsAre(1, 2, 3, 4));
  EXPECT_THAT(batch.targets, ElementsAre(2, 3, 4, 5));
  EXPECT_THAT(batch.mtp_tokens, ElementsAre(2, 3, 4, 5));
  EXPECT_THAT(batch.mtp_targets, ElementsAre(3, 4, 5, -1));
  EXPECT_THAT(batch.positions, ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(batch.key_begin, ElementsAre(0, 0, 0, 0));
  EXPECT_THAT(batch.bounds, ElementsAre(0, 4));
  EXPECT_EQ(batch.num_targets, 4);
  EXPECT_EQ(batch.num_mtp_targets, 3);
}

TEST(Microbatch, WithMaskNoTargetCrossesADocumentBorder) {
  // Documents 1 2 3 | 4 5 | 6 7: the last token is only ever a target.
  const Microbatch batch =
      MakeMicrobatch({{{1, 2, 3, 4, 5, 6, 7}, {0, 3, 5}}}, /*document_mask=*/true);
  EXPECT_THAT(batch.tokens, ElementsAre(1, 2, 3, 4, 5, 6));
  EXPECT_THAT(batch.targets, ElementsAre(2, 3, -1, 5, -1, 7));
  EXPECT_THAT(batch.mtp_tokens, ElementsAre(2, 3, 4, 5, 6, 7));
  EXPECT_THAT(batch.mtp_targets, ElementsAre(3, -1, -1, -1, -1, -1));
  EXPECT_THAT(batch.positions, ElementsAre(0, 1, 2, 0, 1, 0));
  EXPECT_THAT(batch.key_begin, ElementsAre(0, 0, 0, 3, 3, 5));
  EXPECT_THAT(batch.bounds, ElementsAre(0, 3, 5, 6));
  EXPECT_EQ(batch.num_targets, 4);
  EXPECT_EQ(batch.num_mtp_targets, 1);
}

TEST(Microbatch, ABorderBeforeTheLastTokenTakesTheLastTarget) {
  const Microbatch batch = MakeMicrobatch({{{1, 2, 3}, {0, 2}}}, /*document_mask=*/true);
  EXPECT_THAT(batch.targets, ElementsAre(2, -1));
  EXPECT_THAT(batch.mtp_targets, ElementsAre(-1, -1));
  EXPECT_THAT(batch.bounds, ElementsAre(0, 2));
}

TEST(Microbatch, KeysOfTheSecondSampleBeginAtItsFirstRow) {
  const std::vector<Sample> samples = {{{1, 2, 3}, {0}}, {{4, 5, 6}, {0, 1}}};
  const Microbatch plain = MakeMicrobatch(samples, /*document_mask=*/false);
  EXPECT_THAT(plain.tokens, ElementsAre(1, 2, 4, 5));
  EXPECT_THAT(plain.targets, ElementsAre(2, 3, 5, 6));
  EXPECT_THAT(plain.mtp_targets, ElementsAre(3, -1, 6, -1));
  EXPECT_THAT(plain.positions, ElementsAre(0, 1, 0, 1));
  EXPECT_THAT(plain.key_begin, ElementsAre(0, 0, 2, 2));
  EXPECT_THAT(plain.bounds, ElementsAre(0, 2, 4));
  const Microbatch masked = MakeMicrobatch(samples, /*document_mask=*/true);
  EXPECT_THAT(masked.targets, ElementsAre(2, 3, -1, 6));
  EXPECT_THAT(masked.key_begin, ElementsAre(0, 0, 2, 3));
  EXPECT_THAT(masked.positions, ElementsAre(0, 1, 0, 0));
  EXPECT_THAT(masked.bounds, ElementsAre(0, 2, 3, 4));
  EXPECT_EQ(masked.num_targets, 3);
}

TEST(Microbatch, DocumentsOfOneTokenLeaveNoTargetAtAll) {
  const Microbatch batch = MakeMicrobatch({{{1, 2, 3}, {0, 1, 2}}}, /*document_mask=*/true);
  EXPECT_THAT(batch.targets, ElementsAre(-1, -1));
  EXPECT_EQ(batch.num_targets, 0);
  EXPECT_EQ(batch.num_mtp_targets, 0);
}

class LoaderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    WriteTokenSet(directory_.Path("a"), NumberedDocuments(std::vector<int>(40, 9)));
    testing::Documents other;
    for (int d = 0; d < 20; ++d) other.push_back(std::vector<int32_t>(13, 5000 + d));
    WriteTokenSet(directory_.Path("b"), other);
  }
  LoaderOptions Options() const {
    return {.sources = {{directory_.Path("a"), 0.75}, {directory_.Path("b"), 0.25}},
            .seq_length = 8,
            .seed = 1,
            .vocab_size = 6000};
  }
  static Loader Open(const LoaderOptions& options) {
    auto loader = Loader::Open(options);
    CHECK_OK(loader.status());
    return *std::move(loader);
  }
  // Rows of all microbatches of all ranks, sample by sample.
  static std::vector<std::vector<int32_t>> SamplesOfStep(const LoaderOptions& options,
                                                         int64_t consumed, int64_t global,
                                                         int64_t micro, int64_t dp_size) {
    std::vector<std::vector<int32_t>> samples;
    for (int64_t dp_rank = 0; dp_rank < dp_size; ++dp_rank) {
      Loader loader = Open(options);
      auto batches = loader.Step(consumed, global, micro, dp_rank, dp_size);
      CHECK_OK(batches.status());
      CHECK_EQ(std::ssize(*batches), global / (micro * dp_size));
      for (const Microbatch& batch : *batches) {
        CHECK_EQ(batch.num_samples, micro);
        for (int64_t b = 0; b < micro; ++b) {
          samples.emplace_back(batch.tokens.begin() + b * 8, batch.tokens.begin() + (b + 1) * 8);
        }
      }
    }
    return samples;
  }
  TestDirectory directory_;
};

TEST_F(LoaderTest, FirstSampleIsWhereTheRunBegins) {
  LoaderOptions later = Options();
  later.first_sample = 12;
  EXPECT_EQ(SamplesOfStep(later, 4, 16, 2, 2), SamplesOfStep(Options(), 16, 16, 2, 2));
  EXPECT_NE(SamplesOfStep(later, 4, 16, 2, 2), SamplesOfStep(Options(), 4, 16, 2, 2));
  later.first_sample = -1;
  EXPECT_THAT(Loader::Open(later),
              HasStatus(absl::StatusCode::kInvalidArgument, "data.first_sample: found -1"));
}

TEST_F(LoaderTest, ContentsTellSetsOfOnePathApart) {
  const auto contents = [&](const testing::Documents& documents) {
    WriteTokenSet(directory_.Path("c"), documents);
    const auto result = testing::OpenTokenSet(directory_.Path("c")).Contents();
    CHECK_OK(result.status());
    return *result;
  };
  const testing::Documents documents(3, std::vector<int32_t>(100'000, 7));
  const std::string before = contents(documents);
  EXPECT_THAT(before, ::testing::StartsWith("3 documents, 300000 tokens, samples "));
  EXPECT_EQ(contents(documents), before);
  testing::Documents other = documents;
  other[2].back() = 8;
  EXPECT_NE(contents(other), before);
  other = documents;
  other[0].push_back(other[1].back());
  other[1].pop_back();
  EXPECT_NE(contents(other), before);  // the same tokens, another border
  EXPECT_THAT(contents({{1}}), ::testing::StartsWith("1 documents, 1 tokens, samples "));
}

TEST_F(LoaderTest, TheUnionOverRanksIsTheSameForEveryDataParallelSize) {
  for (const int64_t consumed : {0, 16, 80}) {
    auto expected = SamplesOfStep(Options(), consumed, 16, 1, 1);
    std::sort(expected.begin(), expected.end());
    for (const auto& [micro, dp_size] :
         {std::pair{1, 2}, {2, 2}, {1, 4}, {2, 4}, {4, 4}, {2, 8}, {1, 16}, {16, 1}}) {
      auto found = SamplesOfStep(Options(), consumed, 16, micro, dp_size);
      std::sort(found.begin(), found.end());
      EXPECT_EQ(found, expected) << "micro " << micro << " dp " << dp_size;
    }
  }
}

TEST_F(LoaderTest, MicrobatchMOfRankDHoldsTheSamplesItsRuleSays) {
  const auto in_order = SamplesOfStep(Options(), 32, 16, 1, 1);
  for (int64_t dp_rank = 0; dp_rank < 2; ++dp_rank) {
    Loader loader = Open(Options());
    ASSERT_OK_AND_ASSIGN(const auto batches, loader.Step(32, 16, 2, dp_rank, 2));
    for (int64_t m = 0; m < 4; ++m) {
      for (int64_t b = 0; b < 2; ++b) {
        const std::vector<int32_t> sample(batches[m].tokens.begin() + b * 8,
                                          batches[m].tokens.begin() + b * 8 + 8);
        EXPECT_EQ(sample, in_order[(m * 2 + dp_rank) * 2 + b]);
      }
    }
  }
}

TEST_F(LoaderTest, AFreshLoaderContinuesWhereAnotherStopped) {
  // 59 samples an epoch of a blend: the steps cross epoch borders of both sources several times.
  Loader unbroken = Open(Options());
  for (int64_t step = 0; step < 30; ++step) {
    ASSERT_OK_AND_ASSIGN(const auto expected, unbroken.Step(step * 8, 8, 2, 1, 2));
    Loader fresh = Open(Options());
    ASSERT_OK_AND_ASSIGN(const auto found, fresh.Step(step * 8, 8, 2, 1, 2));
    for (size_t m = 0; m < expected.size(); ++m)
      EXPECT_EQ(found[m].tokens, expected[m].tokens) << step;
  }
}

TEST_F(LoaderTest, ResumingExactlyAtAnEpochEndNeitherRepeatsNorSkips) {
  LoaderOptions options = Options();
  options.sources = {{directory_.Path("a"), 1}};
  const int64_t epoch = Open(options).Summary()[0].samples_per_epoch;
  ASSERT_EQ(epoch, (40 * 9 - 1) / 8);
  auto first = SamplesOfStep(options, 0, epoch, 1, 1);
  auto second = SamplesOfStep(options, epoch, epoch, 1, 1);
  const auto both = SamplesOfStep(options, 0, 2 * epoch, 1, 1);
  first.insert(first.end(), second.begin(), second.end());
  EXPECT_EQ(first, both);
  std::sort(second.begin(), second.end());
  EXPECT_EQ(std::unique(second.begin(), second.end()), second.end());
}

TEST_F(LoaderTest, ABatchLargerThanTheSetRunsIntoTheNextEpochs) {
  WriteTokenSet(directory_.Path("small"), {{1, 2, 3, 4, 5, 6, 7, 8, 9}});
  LoaderOptions options = Options();
  options.sources = {{directory_.Path("small"), 1}};
  for (const auto& sample : SamplesOfStep(options, 5, 8, 2, 2)) {
    EXPECT_THAT(sample, ElementsAre(1, 2, 3, 4, 5, 6, 7, 8));
  }
}

TEST_F(LoaderTest, SourcesAreDrawnByTheirWeights) {
  int from_b = 0;
  for (const auto& sample : SamplesOfStep(Options(), 0, 40, 1, 1)) from_b += sample[0] >= 5000;
  EXPECT_EQ(from_b, 10);
  const auto summary = Open(Options()).Summary();
  ASSERT_EQ(summary.size(), 2u);
  EXPECT_EQ(summary[1].share, 0.25);
  EXPECT_EQ(summary[1].num_documents, 20);
  EXPECT_EQ(summary[1].num_tokens, 260);
}

TEST_F(LoaderTest, FileOrderReadsTheSetAsItStands) {
  LoaderOptions options = Options();
  options.sources = {{directory_.Path("a"), 1}};
  options.order = SampleOrder::kFileOrder;
  const auto samples = SamplesOfStep(options, 0, 2, 1, 1);
  EXPECT_THAT(samples[0], ElementsAre(0, 1, 2, 3, 4, 5, 6, 7));
  EXPECT_THAT(samples[1], ElementsAre(8, 100, 101, 102, 103, 104, 105, 106));
}

TEST_F(LoaderTest, TheDocumentMaskFollowsThePacking) {
  LoaderOptions options = Options();
  options.sources = {{directory_.Path("a"), 1}};
  options.order = SampleOrder::kFileOrder;
  options.document_mask = true;
  Loader loader = Open(options);
  ASSERT_OK_AND_ASSIGN(const auto batches, loader.Step(0, 2, 2, 0, 1));
  // Rows 0-7 are document 0 without its last token, row 8 is that token, rows 9-15 begin
  // document 1.
  EXPECT_THAT(batches[0].targets,
              ElementsAre(1, 2, 3, 4, 5, 6, 7, 8, -1, 101, 102, 103, 104, 105, 106, 107));
  EXPECT_THAT(batches[0].mtp_targets,
              ElementsAre(2, 3, 4, 5, 6, 7, 8, -1, -1, 102, 103, 104, 105, 106, 107, -1));
  EXPECT_THAT(batches[0].bounds, ElementsAre(0, 8, 9, 16));
  EXPECT_EQ(batches[0].num_targets, 15);
  EXPECT_EQ(batches[0].num_mtp_targets, 13);
}

TEST_F(LoaderTest, RefusesSizesThatDoNotDivide) {
  Loader loader = Open(Options());
  EXPECT_THAT(loader.Step(0, 10, 2, 0, 2),
              HasStatus(StatusCode::kInvalidArgument,
                        "global_batch_size: found 10, expected a multiple of "
                        "micro_batch_size x data parallel size = 2 x 2 = 4"));
  EXPECT_THAT(loader.Step(0, 0, 1, 0, 1),
              HasStatus(StatusCode::kInvalidArgument, "global_batch_size: found 0"));
  EXPECT_THAT(loader.Step(0, 8, 0, 0, 1),
              HasStatus(StatusCode::kInvalidArgument, "micro_batch_size: found 0"));
  EXPECT_THAT(loader.Step(0, int64_t{1} << 40, int64_t{1} << 40, 0, 1),
              HasStatus(StatusCode::kInvalidArgument, "micro_batch_size: found 1099511627776"));
}

TEST_F(LoaderTest, RefusesOptionsAndReportsTheFaultsOfAllSources) {
  LoaderOptions options = Options();
  options.seq_length = 0;
  EXPECT_THAT(Loader::Open(options),
              HasStatus(StatusCode::kInvalidArgument, "data.seq_length: found 0"));
  options = Options();
  options.sources.clear();
  EXPECT_THAT(Loader::Open(options), HasStatus(StatusCode::kInvalidArgument, "no source given"));
  options = Options();
  options.sources[0].path = directory_.Path("none");
  options.seq_length = 1000;
  const auto loader = Loader::Open(options);
  EXPECT_THAT(loader, HasStatus(StatusCode::kDataLoss, "none: no token file of this name"));
  EXPECT_THAT(loader,
              HasStatus(StatusCode::kDataLoss, "b: the set has 260 tokens in 20 documents"));
}

TEST_F(LoaderTest, AnIdOutsideTheVocabularyIsFoundByTheStepThatReadsItAndByTheScan) {
  LoaderOptions options = Options();
  options.vocab_size = 5019;
  Loader loader = Open(options);
  EXPECT_THAT(loader.CheckVocabulary(),
              HasStatus(StatusCode::kDataLoss,
                        "b: document 19, token 0 (token 247 of the file): found id 5019"));
  EXPECT_THAT(loader.Step(0, 200, 1, 0, 1), HasStatus(StatusCode::kDataLoss, "b: document 19"));
}

TEST_F(LoaderTest, AFileThatChangesUnderTheRunStopsTheStep) {
  for (const char* ending : {".bin", ".idx"}) {
    SetUp();
    Loader loader = Open(Options());
    EXPECT_THAT(loader.Step(0, 8, 1, 0, 1), IsOk());
    std::filesystem::resize_file(directory_.Path("a") + ending, 4);
    EXPECT_THAT(loader.Step(8, 8, 1, 0, 1),
                HasStatus(StatusCode::kDataLoss, "while it was in use"));
  }
}

}  // namespace
}  // namespace baleen
