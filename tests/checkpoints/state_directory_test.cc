// Life of state directories: publishing, refusing, pruning, falling back.
#include "checkpoints/state_directory.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "checkpoints/state_writer.h"
#include "kernels/core/file.h"
#include "tests/checkpoints/state_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::CheckState;
using ::testing::ElementsAre;
using testing::FilledPiece;
using testing::HasStatus;
using testing::IsOk;
using testing::SaveState;
using testing::SmallTensors;
using testing::TemporaryDirectory;
using testing::TestMetadata;
using testing::TestTensor;
using testing::WholeLayout;

constexpr auto kDataLoss = absl::StatusCode::kDataLoss;
constexpr auto kEnvironment = absl::StatusCode::kFailedPrecondition;
const TestTensor kWeight = {"w", {4, 6}, DType::kF32};

std::vector<std::string> Names(const std::string& dir) { return ListNames(dir).value(); }

// One rank file per list of pieces, then PublishState.
absl::StatusOr<PublishedState> Publish(const std::string& dir,
                                       const std::vector<std::vector<StatePiece>>& ranks,
                                       StateMetadata metadata = TestMetadata(1)) {
  ASSIGN_OR_RETURN(const std::string temp, BeginState(dir, metadata.step, "x", 0));
  std::vector<RankFileRecord> records;
  for (size_t rank = 0; rank < ranks.size(); ++rank) {
    ASSIGN_OR_RETURN(records.emplace_back(),
                     WriteRankFile(temp, static_cast<int>(rank), ranks[rank]));
  }
  return PublishState(dir, temp, metadata, records);
}

TEST(StateName, KnowsOnlyItsOwnSpellings) {
  EXPECT_EQ(StateDirectoryName(7), "step-00000007");
  EXPECT_EQ(StateDirectoryName(1234567890), "step-1234567890");
  EXPECT_EQ(ParseStateName("step-00000007").step, 7);
  EXPECT_EQ(ParseStateName("step-1234567890").entry, StateEntry::kState);
  EXPECT_EQ(ParseStateName("step-00000007.tmp.12").entry, StateEntry::kTemporary);
  EXPECT_EQ(ParseStateName("step-00000007.corrupt.1").entry, StateEntry::kCorrupt);
  for (const char* name :
       {"step-7", "step-", "step-0000000x", "step-00000007x", "step-00000007.tmp", "latest",
        "step-99999999999999999999", "step--0000001", "xstep-00000007"}) {
    EXPECT_EQ(ParseStateName(name).entry, StateEntry::kOther) << name;
  }
}

TEST(StatePublish, RefusesHolesAndOverlapsNamingTheTensorAndLeavesNothing) {
  const TemporaryDirectory dir;
  const StatePiece upper = FilledPiece(kWeight, 1, {{0, 0}, {2, 6}}, 0, 12);
  const StatePiece lower = FilledPiece(kWeight, 1, {{2, 0}, {2, 6}}, 0, 12);
  const StatePiece lower_start = FilledPiece(kWeight, 1, {{2, 0}, {2, 6}}, 0, 11);
  const StatePiece left = FilledPiece(kWeight, 1, {{0, 0}, {4, 1}}, 0, 4);
  EXPECT_THAT(Publish(dir.path(), {{upper}, {lower_start}}),
              HasStatus(kDataLoss, "tensor w [4, 6]: 1 of 24 elements are in no piece"));
  EXPECT_THAT(Publish(dir.path(), {{upper}, {lower, left}}),
              HasStatus(kDataLoss, "tensor w [4, 6]: elements are in two pieces"));
  EXPECT_THAT(Publish(dir.path(), {{upper, lower}, {upper}}),
              HasStatus(kDataLoss, "(rank-00001.h5)"));
  // As many elements as there should be, but not the right ones.
  EXPECT_THAT(Publish(dir.path(), {{upper}, {upper}}), HasStatus(kDataLoss, "in two pieces"));
  StatePiece other_shape = lower;
  other_shape.global_shape = {5, 6};
  EXPECT_THAT(Publish(dir.path(), {{upper}, {other_shape}}),
              HasStatus(kDataLoss, "another rank has F32[4, 6]"));
  StateMetadata frozen = TestMetadata(1);
  frozen.sources = {{"hf", "00", {"w"}}};
  EXPECT_THAT(Publish(dir.path(), {{upper, lower}}, frozen),
              HasStatus(kDataLoss, "saved and also named as frozen"));
  EXPECT_THAT(Names(dir.path()), ElementsAre());
  EXPECT_THAT(Publish(dir.path(), {{upper}, {lower}}), IsOk());
  EXPECT_THAT(Names(dir.path()), ElementsAre("latest", "step-00000001"));
}

TEST(StatePublish, NeverWritesOverAStateThatExists) {
  const TemporaryDirectory dir;
  ASSERT_THAT(SaveState(dir.path(), 5, SmallTensors(), WholeLayout(SmallTensors())), IsOk());
  EXPECT_THAT(BeginState(dir.path(), 5, "x", 0), HasStatus(kEnvironment, "exists already"));
  // It may also appear between the beginning and the end of a save; even an empty directory stays.
  ASSERT_OK_AND_ASSIGN(const std::string temp, BeginState(dir.path(), 6, "x", 0));
  ASSERT_OK_AND_ASSIGN(const RankFileRecord record,
                       WriteRankFile(temp, 0, {FilledPiece(kWeight, 6, WholeBox({4, 6}), 0, 24)}));
  std::filesystem::create_directory(dir.path() + "/step-00000006");
  EXPECT_THAT(PublishState(dir.path(), temp, TestMetadata(6), {record}),
              HasStatus(kEnvironment, "exists already"));
  EXPECT_TRUE(Names(dir.path() + "/step-00000006").empty());
  EXPECT_FALSE(DirectoryExists(temp));
}

TEST(StatePublish, RefusesFilesThatAreNotTheOnesTheRanksWrote) {
  const TemporaryDirectory dir;
  const std::vector<StatePiece> pieces = {FilledPiece(kWeight, 6, WholeBox({4, 6}), 0, 24)};
  ASSERT_OK_AND_ASSIGN(std::string temp, BeginState(dir.path(), 6, "x", 0));
  ASSERT_OK_AND_ASSIGN(const RankFileRecord record, WriteRankFile(temp, 0, pieces));
  ASSERT_THAT(WriteRankFile(temp, 1, {}), IsOk());
  EXPECT_THAT(PublishState(dir.path(), temp, TestMetadata(6), {record}),
              HasStatus(kDataLoss, "rank-00001.h5, which no rank wrote"));
  ASSERT_OK_AND_ASSIGN(temp, BeginState(dir.path(), 6, "x", 0));
  EXPECT_THAT(PublishState(dir.path(), temp, TestMetadata(6), {record}),
              HasStatus(kDataLoss, "rank-00000.h5: the file is missing"));
  EXPECT_TRUE(Names(dir.path()).empty());
}

TEST(StateBegin, SaysHowManyBytesAreNeededAndFree) {
  const TemporaryDirectory dir;
  const absl::StatusOr<std::string> status = BeginState(dir.path(), 1, "x", int64_t{1} << 60);
  EXPECT_THAT(status, HasStatus(kEnvironment, "needs 1152921504606846976 bytes"));
  EXPECT_THAT(status, HasStatus(kEnvironment, "free are "));
  EXPECT_THAT(status, HasStatus(kEnvironment, "keep fewer states (checkpoint.keep; 0 keeps all"));
  EXPECT_TRUE(Names(dir.path()).empty());
}

TEST(StateSweep, RemovesWhatWasInterruptedAndNoState) {
  const TemporaryDirectory dir;
  ASSERT_THAT(SaveState(dir.path(), 1, {kWeight}, WholeLayout({kWeight})), IsOk());
  std::filesystem::create_directory(dir.path() + "/step-00000002.tmp.77");
  std::filesystem::create_directory(dir.path() + "/step-00000000.tmp.prune");
  testing::WriteText(dir.path() + "/step-00000000.tmp.prune/rank-00000.h5", "half");
  std::filesystem::create_directory(dir.path() + "/step-00000000.corrupt");
  ASSERT_OK_AND_ASSIGN(const std::vector<std::string> removed, SweepTemporary(dir.path()));
  EXPECT_EQ(removed.size(), 2);
  EXPECT_THAT(Names(dir.path()), ElementsAre("latest", "step-00000000.corrupt", "step-00000001"));
}

TEST(StatePrune, KeepsTheNewestThatVerifyAndSweepsWhatWasInterrupted) {
  const TemporaryDirectory dir;
  for (const int step : {1, 2, 3, 4, 5}) {
    ASSERT_THAT(SaveState(dir.path(), step, {kWeight}, WholeLayout({kWeight})), IsOk());
  }
  std::filesystem::create_directory(dir.path() + "/step-00000006.tmp.77");
  testing::WriteText(dir.path() + "/step-00000006.tmp.77/rank-00000.h5", "half");
  std::filesystem::create_directory(dir.path() + "/step-00000000.corrupt");
  testing::WriteText(dir.path() + "/step-00000005/manifest.json", "torn");
  // Step 5 does not verify, so it is not counted; at least two that do are kept.
  ASSERT_OK_AND_ASSIGN(const PruneResult result, PruneStates(dir.path(), 1));
  EXPECT_THAT(result.damaged, ElementsAre(dir.path() + "/step-00000005"));
  EXPECT_THAT(result.removed,
              ElementsAre(dir.path() + "/step-00000006.tmp.77", dir.path() + "/step-00000002",
                          dir.path() + "/step-00000001"));
  EXPECT_THAT(Names(dir.path()), ElementsAre("latest", "step-00000000.corrupt", "step-00000003",
                                             "step-00000004", "step-00000005"));
  EXPECT_THAT(PruneStates(dir.path() + "/none", 2), HasStatus(kDataLoss, "cannot list"));
}

TEST(StateNewest, FallsBackOverDamagedStatesAndSetsThemAside) {
  const TemporaryDirectory dir;
  for (const int step : {10, 20, 30}) {
    ASSERT_THAT(SaveState(dir.path(), step, SmallTensors(), WholeLayout(SmallTensors())), IsOk());
  }
  std::string bytes = testing::ReadText(dir.path() + "/step-00000030/rank-00000.h5");
  bytes[bytes.size() / 3] ^= 1;
  testing::WriteText(dir.path() + "/step-00000030/rank-00000.h5", bytes);
  std::filesystem::remove(dir.path() + "/step-00000020/manifest.json");
  // The hint is never believed.
  testing::WriteText(dir.path() + "/latest", "step-00000099\n");

  ASSERT_OK_AND_ASSIGN(const UsableState report,
                       FindNewestUsable(dir.path(), DamagePolicy::kReport));
  EXPECT_EQ(report.reader->metadata().step, 10);
  EXPECT_TRUE(DirectoryExists(dir.path() + "/step-00000030"));

  ASSERT_OK_AND_ASSIGN(UsableState usable, FindNewestUsable(dir.path(), DamagePolicy::kRename));
  ASSERT_TRUE(usable.reader.has_value());
  EXPECT_THAT(CheckState(*usable.reader, 10, SmallTensors(), WholeLayout(SmallTensors())), IsOk());
  ASSERT_EQ(usable.set_aside.size(), 2u);
  EXPECT_THAT(usable.set_aside[0], ::testing::HasSubstr("step 30 is damaged"));
  EXPECT_THAT(usable.set_aside[1], ::testing::HasSubstr("manifest.json: the file is missing"));
  EXPECT_THAT(Names(dir.path()), ElementsAre("latest", "step-00000010", "step-00000020.corrupt",
                                             "step-00000030.corrupt"));
}

TEST(StateNewest, NeverStartsOverWhenEveryStateIsDamaged) {
  const TemporaryDirectory dir;
  ASSERT_OK_AND_ASSIGN(const UsableState none, FindNewestUsable(dir.path(), DamagePolicy::kRename));
  EXPECT_FALSE(none.reader.has_value());
  ASSERT_THAT(SaveState(dir.path(), 1, {kWeight}, WholeLayout({kWeight})), IsOk());
  testing::WriteText(dir.path() + "/step-00000001/manifest.json", "");
  EXPECT_THAT(FindNewestUsable(dir.path(), DamagePolicy::kRename),
              HasStatus(kDataLoss, "none of the 1 training states is usable"));
  EXPECT_THAT(FindNewestUsable(dir.path(), DamagePolicy::kRename),
              HasStatus(kDataLoss, "set aside as damaged (step-00000001.corrupt)"));
}

TEST(StateNewest, ANewerFormatStopsTheSearchAndIsNotCalledDamaged) {
  const TemporaryDirectory dir;
  for (const int step : {1, 2}) {
    ASSERT_THAT(SaveState(dir.path(), step, {kWeight}, WholeLayout({kWeight})), IsOk());
  }
  testing::EditManifest(dir.path() + "/step-00000002", "\"version\": 1", "\"version\": 9");
  EXPECT_THAT(FindNewestUsable(dir.path(), DamagePolicy::kRename),
              HasStatus(kEnvironment, "format version 9"));
  EXPECT_TRUE(DirectoryExists(dir.path() + "/step-00000002"));
}

TEST(StateNewest, TheVerifierOfTheRanksDecides) {
  const TemporaryDirectory dir;
  for (const int step : {1, 2}) {
    ASSERT_THAT(SaveState(dir.path(), step, {kWeight}, WholeLayout({kWeight})), IsOk());
  }
  // This rank sees nothing wrong with step 2; another one did.
  const auto verifier = [](const absl::Status& opened, StateReader* reader) {
    return reader->metadata().step == 2 ? DataError("rank 3: bad hash") : opened;
  };
  ASSERT_OK_AND_ASSIGN(const std::vector<StateDirectory> states, ListStates(dir.path()));
  ASSERT_OK_AND_ASSIGN(const UsableState usable,
                       FindNewestUsable(states, verifier, DamagePolicy::kReport));
  EXPECT_EQ(usable.reader->metadata().step, 1);
  EXPECT_TRUE(DirectoryExists(dir.path() + "/step-00000002"));
}

}  // namespace
}  // namespace baleen
