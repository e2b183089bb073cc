// Damaged, missing and mismatched training states: each is found before use and named.
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <functional>

#include "absl/strings/str_cat.h"
#include "checkpoints/hdf5_file.h"
#include "checkpoints/state_inspect.h"
#include "checkpoints/state_writer.h"
#include "kernels/core/file.h"
#include "tests/checkpoints/state_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::CheckState;
using testing::EditManifest;
using testing::FilledPiece;
using testing::HasStatus;
using testing::IsOk;
using testing::ReadText;
using testing::SaveState;
using testing::SmallTensors;
using testing::TemporaryDirectory;
using testing::TestTensor;
using testing::WholeLayout;
using testing::WriteText;

constexpr auto kDataLoss = absl::StatusCode::kDataLoss;
constexpr auto kEnvironment = absl::StatusCode::kFailedPrecondition;

class StateDamage : public ::testing::Test {
 protected:
  void SetUp() override {
    std::mt19937_64 random(11);
    layout_ = testing::RandomLayout(SmallTensors(), 2, random);
    const absl::StatusOr<std::string> saved = SaveState(dir_.path(), 100, SmallTensors(), layout_);
    ASSERT_THAT(saved, IsOk());
    state_ = *saved;
  }
  std::string File(absl::string_view name) const { return JoinPath(state_, name); }
  // The first error of opening, hashing and reading everything.
  absl::Status Load() {
    ASSIGN_OR_RETURN(StateReader reader, StateReader::Open(state_));
    RETURN_IF_ERROR(reader.VerifyAllFiles());
    return CheckState(reader, 100, SmallTensors(), layout_);
  }

  TemporaryDirectory dir_;
  testing::Layout layout_;
  std::string state_;
};

TEST_F(StateDamage, EveryFlippedBitIsFound) {
  std::mt19937_64 random(5);
  for (const char* name : {"manifest.json", "rank-00000.h5", "rank-00001.h5"}) {
    const std::string good = ReadText(File(name));
    for (int flip = 0; flip < 1000; ++flip) {
      std::string bad = good;
      const size_t byte = random() % bad.size();
      bad[byte] = static_cast<char>(bad[byte] ^ (1 << random() % 8));
      WriteText(File(name), bad);
      absl::StatusOr<StateReader> opened = StateReader::Open(state_);
      absl::Status status = opened.status();
      if (opened.ok()) status = opened->VerifyAllFiles();
      ASSERT_THAT(status, HasStatus(kDataLoss, File(name))) << "byte " << byte;
    }
    WriteText(File(name), good);
  }
  EXPECT_THAT(Load(), IsOk());
}

TEST_F(StateDamage, EveryTruncationIsFound) {
  for (const char* name : {"manifest.json", "rank-00000.h5", "rank-00001.h5"}) {
    const std::string good = ReadText(File(name));
    for (size_t length = 0; length < good.size();
         length += std::max<size_t>(1, good.size() / 150)) {
      WriteText(File(name), good.substr(0, length));
      ASSERT_THAT(Load(), HasStatus(kDataLoss, File(name))) << length;
    }
    WriteText(File(name), good + "x");
    ASSERT_THAT(Load(), HasStatus(kDataLoss, File(name)));
    WriteText(File(name), good);
  }
  EXPECT_THAT(Load(), IsOk());
}

TEST_F(StateDamage, BitsThatFlipAfterTheHashWasCheckedGiveAnErrorAndNoWrongNumber) {
  // The second line: HDF5's own checksums, with the file hash taken as checked by another rank. In
  // a process of its own: HDF5 1.10 loses memory for each damaged object that it refuses.
  const auto flip_bits = [&] {
    std::mt19937_64 random(6);
    const std::string good = ReadText(File("rank-00000.h5"));
    int found = 0;
    for (int flip = 0; flip < 1000; ++flip) {
      std::string bad = good;
      const size_t byte = random() % bad.size();
      bad[byte] = static_cast<char>(bad[byte] ^ (1 << random() % 8));
      WriteText(File("rank-00000.h5"), bad);
      absl::StatusOr<StateReader> reader = StateReader::Open(state_);
      CHECK_OK(reader.status());
      for (int file = 0; file < reader->num_files(); ++file) reader->MarkVerified(file);
      const absl::Status status = CheckState(*reader, 100, SmallTensors(), layout_);
      CHECK(!absl::IsInternal(status)) << "silent: " << status << ", byte " << byte;
      found += !status.ok();
    }
    CHECK_GT(found, 500) << "unused space is harmless, but most bytes are not";
    ::_exit(0);
  };
  EXPECT_EXIT(flip_bits(), ::testing::ExitedWithCode(0), "");
}

TEST_F(StateDamage, NamesWhatIsBroken) {
  struct Case {
    const char* what;
    std::function<void()> damage;
    absl::StatusCode code;
    std::vector<std::string> parts;
  };
  const auto edit = [&](std::string from, std::string to) {
    return [=, this] { EditManifest(state_, from, to); };
  };
  const std::string rank0 = ReadText(File("rank-00000.h5")),
                    rank1 = ReadText(File("rank-00001.h5"));
  const std::string manifest = ReadText(File("manifest.json"));
  const std::vector<Case> cases = {
      {"no manifest",
       [&] { ::unlink(File("manifest.json").c_str()); },
       kDataLoss,
       {"manifest.json", "missing"}},
      {"empty manifest", [&] { WriteText(File("manifest.json"), ""); }, kDataLoss, {"no manifest"}},
      {"another file",
       [&] { WriteText(File("manifest.json"), "{\"a\": 1}"); },
       kDataLoss,
       {"no manifest"}},
      {"edited by hand",
       [&] { WriteText(File("manifest.json"), manifest + " "); },
       kDataLoss,
       {"changed since it was written", "hash to"}},
      {"no rank file",
       [&] { ::unlink(File("rank-00001.h5").c_str()); },
       kDataLoss,
       {"rank-00001.h5", "missing"}},
      {"zero-filled",
       [&] { WriteText(File("rank-00001.h5"), std::string(rank1.size(), '\0')); },
       kDataLoss,
       {"rank-00001.h5", "found hash", "the manifest says"}},
      {"swapped",
       [&] { WriteText(File("rank-00000.h5"), rank1), WriteText(File("rank-00001.h5"), rank0); },
       kDataLoss,
       {"rank-00000.h5", "the manifest says"}},
      {"a symbolic link",
       [&] {
         ::unlink(File("rank-00000.h5").c_str());
         ASSERT_EQ(::symlink("/etc/hostname", File("rank-00000.h5").c_str()), 0);
       },
       kDataLoss,
       {"rank-00000.h5", "found a symbolic link"}},
      {"newer version",
       edit("\"version\": 1", "\"version\": 2"),
       kEnvironment,
       {"format version 2", "reads up to 1", "newer Baleen"}},
      {"version zero", edit("\"version\": 1", "\"version\": 0"), kDataLoss, {"format version 0"}},
      {"other format",
       edit("baleen training state", "something else"),
       kDataLoss,
       {"something else", "expected"}},
      {"another step",
       edit("\"step\":100", "\"step\":50"),
       kDataLoss,
       {"step-00000100", "of step 50"}},
      {"path in a file name",
       edit("rank-00001.h5", "../rank-1.h5"),
       kDataLoss,
       {"../rank-1.h5", "plain file name"}},
      {"a file twice",
       edit("rank-00001.h5", "rank-00000.h5"),
       kDataLoss,
       {"rank-00000.h5", "twice"}},
      {"file number",
       edit("{\"file\":1,", "{\"file\":7,"),
       kDataLoss,
       {"file number 7", "there are 2"}},
      {"missing key",
       edit("\"config_hash\"", "\"config_hsah\""),
       kDataLoss,
       {"config_hash", "missing"}},
      {"wrong kind",
       edit("\"seed\":1234", "\"seed\":\"x\""),
       kDataLoss,
       {"seed", "expected an integer"}},
      {"dtype",
       edit("\"dtype\":\"I64\"", "\"dtype\":\"I65\""),
       kDataLoss,
       {"data/position", "I65"}},
      {"asked type",
       edit("\"dtype\":\"I64\"", "\"dtype\":\"F32\""),
       kDataLoss,
       {"data/position", "the state has F32, asked for I64"}},
      {"stored type",
       edit("norm.weight\",\"dtype\":\"F32\"", "norm.weight\",\"dtype\":\"BF16\""),
       kDataLoss,
       {"rank-0000", "dataset adam_v/model.norm.weight", "the elements are not BF16"}},
      {"repeated key", edit("\"seed\":1234", "\"seed\":1234,\"seed\":1"), kDataLoss, {"seed"}},
      {"huge shape",
       edit("\"shape\":[33]", "\"shape\":[4611686018427387905]"),
       kDataLoss,
       {"adam_v/model.norm.weight", "at most 2^62"}},
      {"negative extent",
       edit("\"shape\":[33]", "\"shape\":[-33]"),
       kDataLoss,
       {"adam_v/model.norm.weight"}},
      {"larger shape",
       edit("\"shape\":[33]", "\"shape\":[34]"),
       kDataLoss,
       {"adam_v/model.norm.weight", "1 of 34 elements are in no piece"}},
      {"other name",
       edit("\"name\":\"rng\"", "\"name\":\"r/../ng\""),
       kDataLoss,
       {"not a tensor's name"}},
  };
  for (const Case& test : cases) {
    SCOPED_TRACE(test.what);
    test.damage();
    const absl::Status status = Load();
    for (const std::string& part : test.parts) EXPECT_THAT(status, HasStatus(test.code, part));
    ::unlink(File("rank-00000.h5").c_str());
    WriteText(File("manifest.json"), manifest);
    WriteText(File("rank-00000.h5"), rank0);
    WriteText(File("rank-00001.h5"), rank1);
  }
  EXPECT_THAT(Load(), IsOk());
}

TEST_F(StateDamage, ADirectoryThatIsNotThereIsAnError) {
  EXPECT_THAT(StateReader::Open(dir_.path() + "/step-00000999"),
              HasStatus(kDataLoss, "no such training state"));
}

TEST_F(StateDamage, AModelThatDiffersGetsOneTableOfAllDifferences) {
  ASSERT_OK_AND_ASSIGN(const StateReader reader, StateReader::Open(state_));
  std::vector<ExpectedTensor> expected;
  for (const TestTensor& tensor : SmallTensors())
    expected.push_back({tensor.name, tensor.shape, tensor.dtype});
  EXPECT_THAT(reader.CheckTensors(expected), IsOk());
  expected[1].shape = {34};
  expected[2].dtype = DType::kF32;
  expected[7].name = "rng2";
  const absl::Status status = reader.CheckTensors(expected);
  for (const char* part :
       {"4 tensors differ", "adam_v/model.norm.weight: this run F32[34], state F32[33]",
        "model.embed_tokens.weight: this run F32[19, 8], state F64[19, 8]",
        "rng2: this run U8[64], state has none", "rng: this run has none, state U8[64]"}) {
    EXPECT_THAT(status, HasStatus(kDataLoss, part));
  }
}

TEST_F(StateDamage, ReadingWhatIsNotThereSaysSo) {
  ASSERT_OK_AND_ASSIGN(StateReader reader, StateReader::Open(state_));
  EXPECT_THAT(reader.Read(FilledPiece({"no.such", {2}, DType::kF32}, 1, WholeBox({2}), 0, 2)),
              HasStatus(kDataLoss, "no.such: the state has no such tensor"));
  EXPECT_THAT(reader.Read(FilledPiece({"rng", {65}, DType::kU8}, 1, WholeBox({65}), 0, 65)),
              HasStatus(kDataLoss, "rng: the state has shape [64], the model expects [65]"));
  EXPECT_THAT(reader.Read("rng", WholeBox({65}), 0, 65, DType::kU8, nullptr),
              HasStatus(kDataLoss, "is not inside the shape [64]"));
}

TEST(StateSources, AFrozenSourceGoneOrChangedIsOneClearError) {
  const TemporaryDirectory dir;
  StateMetadata metadata = testing::TestMetadata(3);
  metadata.sources = {{"checkpoints/v31", "aaaa", {"model.embed_tokens.weight", "lm_head.weight"}},
                      {"checkpoints/other", "bbbb", {}}};
  const TestTensor tensor = {"indexer.wk", {2}, DType::kF32};
  ASSERT_OK_AND_ASSIGN(const std::string temp, BeginState(dir.path(), 3, "x", 0));
  ASSERT_OK_AND_ASSIGN(const RankFileRecord record,
                       WriteRankFile(temp, 0, {FilledPiece(tensor, 3, WholeBox({2}), 0, 2)}));
  ASSERT_OK_AND_ASSIGN(const PublishedState state,
                       PublishState(dir.path(), temp, metadata, {record}));
  ASSERT_OK_AND_ASSIGN(StateReader reader, StateReader::Open(state.directory));
  EXPECT_EQ(reader.metadata(), metadata);
  const auto same = [](const std::string& path) -> absl::StatusOr<std::string> {
    return path == "checkpoints/v31" ? "aaaa" : "bbbb";
  };
  EXPECT_THAT(reader.CheckSources(same), IsOk());
  // The state is of a version that did not hash the data: what it knows is the same.
  const auto with_data = [](const std::string& path) -> absl::StatusOr<std::string> {
    return path == "checkpoints/v31" ? "aaaa+dddd" : "bbbb+dddd";
  };
  EXPECT_THAT(reader.CheckSources(with_data), IsOk());
  const auto longer = [](const std::string& path) -> absl::StatusOr<std::string> {
    return path == "checkpoints/v31" ? "aaaadddd" : "bbbb";
  };
  EXPECT_THAT(reader.CheckSources(longer), HasStatus(kDataLoss, "found hash aaaadddd"));
  const auto changed = [](const std::string& path) -> absl::StatusOr<std::string> {
    if (path == "checkpoints/v31") return "cccc";
    return DataError(path, ": no such directory");
  };
  const absl::Status status = reader.CheckSources(changed);
  EXPECT_THAT(status,
              HasStatus(kDataLoss,
                        "checkpoints/v31: changed since the state was saved: found hash cccc, "
                        "expected aaaa (2 frozen tensors"));
  EXPECT_THAT(status, HasStatus(kDataLoss, "checkpoints/other: "));
  float values[2];
  EXPECT_THAT(reader.Read("lm_head.weight", WholeBox({2}), 0, 2, DType::kF32, values),
              HasStatus(kDataLoss, "it was frozen; read it from checkpoints/v31"));
}

TEST_F(StateDamage, InspectTellsWholeFromDamagedAndCountsWhatIsNotFinite) {
  ASSERT_OK_AND_ASSIGN(const StateReport quick, InspectState(state_, StateDepth::kManifest));
  EXPECT_TRUE(quick.healthy) << quick.text;
  // Random bits of floats are NaN now and then.
  ASSERT_OK_AND_ASSIGN(const StateReport deep, InspectState(state_, StateDepth::kContents));
  EXPECT_NE(deep.text.find("are NaN or infinite"), std::string::npos) << deep.text;
  EXPECT_FALSE(deep.healthy);
  for (const char* part :
       {"step 100", "indexer-warmup", "tp2 dp2", "adam_m F32", "rank-00001.h5"}) {
    EXPECT_NE(deep.text.find(part), std::string::npos) << part << " in\n" << deep.text;
  }
  std::string bytes = ReadText(File("rank-00001.h5"));
  bytes[bytes.size() / 2] ^= 4;
  WriteText(File("rank-00001.h5"), bytes);
  ASSERT_OK_AND_ASSIGN(const StateReport all, InspectState(dir_.path(), StateDepth::kContents));
  EXPECT_FALSE(all.healthy);
  EXPECT_NE(all.text.find("rank-00001.h5: the contents changed"), std::string::npos) << all.text;
  EXPECT_THAT(InspectState(dir_.path() + "/nowhere", StateDepth::kManifest),
              HasStatus(kDataLoss, "nowhere"));
}

}  // namespace
}  // namespace baleen
