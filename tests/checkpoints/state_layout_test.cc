// Training state saved under one layout and read under another: every element, bit for bit.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "checkpoints/state_ranges.h"
#include "checkpoints/state_writer.h"
#include "tests/checkpoints/state_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::CheckState;
using testing::EmptyPiece;
using testing::FilledPiece;
using testing::HasStatus;
using testing::IsOk;
using testing::Layout;
using testing::RandomLayout;
using testing::SaveState;
using testing::SmallTensors;
using testing::TemporaryDirectory;
using testing::TestTensor;
using testing::WholeLayout;

constexpr auto kDataLoss = absl::StatusCode::kDataLoss;

TEST(StateRanges, CutsAFlatRangeIntoTheRestOfARowWholeRowsAndTheStartOfARow) {
  // Elements 5 to 26 of a 3 x 10 box that begins at [2, 4].
  const std::vector<Box> boxes = RangeBoxes({{2, 4}, {3, 10}}, 5, 21);
  ASSERT_EQ(boxes.size(), 3u);
  EXPECT_EQ(boxes[0], (Box{{2, 9}, {1, 5}}));
  EXPECT_EQ(boxes[1], (Box{{3, 4}, {1, 10}}));
  EXPECT_EQ(boxes[2], (Box{{4, 4}, {1, 6}}));
}

TEST(StateRanges, BoxesOfARangeHoldItsElementsInOrder) {
  std::mt19937_64 random(7);
  for (int round = 0; round < 2000; ++round) {
    Box box;
    for (int d = static_cast<int>(random() % 5); d > 0; --d) {
      box.offset.push_back(static_cast<int64_t>(random() % 3));
      box.extent.push_back(1 + static_cast<int64_t>(random() % 4));
    }
    const int64_t count = NumElements(box.extent);
    const int64_t begin = static_cast<int64_t>(random() % static_cast<uint64_t>(count));
    const int64_t length =
        1 + static_cast<int64_t>(random() % static_cast<uint64_t>(count - begin));
    int64_t next = begin;
    const std::vector<Box> boxes = RangeBoxes(box, begin, length);
    for (const Box& part : boxes) {
      ASSERT_EQ(FlatIndex(box, part.offset), next);
      Shape last = part.offset;
      for (size_t d = 0; d < last.size(); ++d) last[d] += part.extent[d] - 1;
      next += NumElements(part.extent);
      ASSERT_EQ(FlatIndex(box, last),
                next - 1);  // ends where a contiguous run of that many elements ends
    }
    ASSERT_EQ(next, begin + length);
    ASSERT_LE(boxes.size(), std::max<size_t>(1, 2 * box.extent.size()));
  }
}

TEST(StateLayout, ReturnsTheBitsThatWereSavedOnTheSameLayout) {
  const TemporaryDirectory dir;
  std::mt19937_64 random(1);
  const Layout layout = RandomLayout(SmallTensors(), 3, random);
  ASSERT_OK_AND_ASSIGN(const std::string saved, SaveState(dir.path(), 40, SmallTensors(), layout));
  EXPECT_EQ(saved, dir.path() + "/step-00000040");
  ASSERT_OK_AND_ASSIGN(StateReader reader, StateReader::Open(saved));
  EXPECT_EQ(reader.metadata(), testing::TestMetadata(40));
  EXPECT_THAT(CheckState(reader, 40, SmallTensors(), layout), IsOk());
  EXPECT_EQ(testing::ReadText(dir.path() + "/latest"), "step-00000040\n");
}

TEST(StateLayout, ReadsAnyLayoutFromAnyOther) {
  std::mt19937_64 random(20240607);
  for (int round = 0; round < 30; ++round) {
    SCOPED_TRACE(round);
    const TemporaryDirectory dir;
    const int saving_ranks = 1 + static_cast<int>(random() % 5);
    const Layout saving = RandomLayout(SmallTensors(), saving_ranks, random);
    ASSERT_OK_AND_ASSIGN(const std::string saved,
                         SaveState(dir.path(), round, SmallTensors(), saving));
    for (const int ranks : {1, 2, 4}) {
      ASSERT_OK_AND_ASSIGN(StateReader reader, StateReader::Open(saved));
      ASSERT_THAT(
          CheckState(reader, round, SmallTensors(), RandomLayout(SmallTensors(), ranks, random)),
          IsOk());
    }
    ASSERT_OK_AND_ASSIGN(StateReader reader, StateReader::Open(saved));
    ASSERT_THAT(CheckState(reader, round, SmallTensors(), WholeLayout(SmallTensors())), IsOk());
  }
}

TEST(StateLayout, ReadsAcrossManyChunksWithoutHoldingThem) {
  // 15 MB and 4 chunks of 4 MiB, in rows that no chunk ends with; read by columns and by a flat
  // range.
  const std::vector<TestTensor> tensors = {{"model.w", {1301, 2999}, DType::kF32}};
  const TemporaryDirectory dir;
  ASSERT_OK_AND_ASSIGN(const std::string saved,
                       SaveState(dir.path(), 1, tensors, WholeLayout(tensors)));
  ASSERT_OK_AND_ASSIGN(StateReader reader, StateReader::Open(saved));
  const Layout columns = {{{0, {{0, 0}, {1301, 17}}, 0, 1301 * 17}},
                          {{0, {{0, 17}, {1301, 2982}}, 2982 * 100 + 5, 2982 * 700}}};
  EXPECT_THAT(CheckState(reader, 1, tensors, columns), IsOk());
  EXPECT_THAT(CheckState(reader, 1, tensors, WholeLayout(tensors)), IsOk());
}

TEST(StateLayout, EqualStatesGiveEqualFiles) {
  const TemporaryDirectory a, b;
  std::mt19937_64 random(3);
  const Layout layout = RandomLayout(SmallTensors(), 2, random);
  ASSERT_OK_AND_ASSIGN(const std::string first, SaveState(a.path(), 5, SmallTensors(), layout));
  ASSERT_OK_AND_ASSIGN(const std::string second, SaveState(b.path(), 5, SmallTensors(), layout));
  for (const char* name : {"/manifest.json", "/rank-00000.h5", "/rank-00001.h5"}) {
    EXPECT_EQ(testing::ReadText(first + name), testing::ReadText(second + name)) << name;
  }
}

TEST(StateLayout, WidensExactlyAndRefusesToNarrow) {
  const TemporaryDirectory dir;
  const std::vector<TestTensor> tensors = {{"w32", {3}, DType::kF32}, {"w64", {3}, DType::kF64}};
  std::vector<StatePiece> pieces;
  for (const TestTensor& tensor : tensors)
    pieces.push_back(FilledPiece(tensor, 1, WholeBox({3}), 0, 3));
  float* values = pieces[0].data.data<float>();
  values[0] = 0.1f, values[1] = -std::numeric_limits<float>::infinity(), values[2] = 1e-42f;
  ASSERT_OK_AND_ASSIGN(const std::string temp, BeginState(dir.path(), 1, "x", 0));
  ASSERT_OK_AND_ASSIGN(const RankFileRecord record, WriteRankFile(temp, 0, pieces));
  ASSERT_OK_AND_ASSIGN(const PublishedState state,
                       PublishState(dir.path(), temp, testing::TestMetadata(1), {record}));
  ASSERT_OK_AND_ASSIGN(StateReader reader, StateReader::Open(state.directory));
  const StatePiece wide = EmptyPiece(tensors[0], WholeBox({3}), 0, 3, DType::kF64);
  ASSERT_THAT(reader.Read(wide), IsOk());
  for (int i = 0; i < 3; ++i)
    EXPECT_EQ(wide.data.data<double>()[i], static_cast<double>(values[i]));
  const StatePiece narrow = EmptyPiece(tensors[1], WholeBox({3}), 0, 3, DType::kF32);
  EXPECT_THAT(reader.Read(narrow), HasStatus(kDataLoss, "w64: the state has F64, asked for F32"));
}

TEST(StateLayout, PiecesWithoutElementsAreLeftOut) {
  const TemporaryDirectory dir;
  const TestTensor tensor = {"w", {4}, DType::kF32};
  ASSERT_OK_AND_ASSIGN(const std::string temp, BeginState(dir.path(), 1, "x", 0));
  const StatePiece nothing = {tensor.name, tensor.shape, WholeBox({4}), 4, 0, Tensor()};
  ASSERT_OK_AND_ASSIGN(const RankFileRecord full,
                       WriteRankFile(temp, 0, {FilledPiece(tensor, 1, WholeBox({4}), 0, 4)}));
  ASSERT_OK_AND_ASSIGN(const RankFileRecord empty, WriteRankFile(temp, 1, {nothing}));
  EXPECT_TRUE(empty.tensors.empty());
  ASSERT_OK_AND_ASSIGN(const PublishedState state,
                       PublishState(dir.path(), temp, testing::TestMetadata(1), {full, empty}));
  ASSERT_OK_AND_ASSIGN(StateReader reader, StateReader::Open(state.directory));
  EXPECT_THAT(CheckState(reader, 1, {tensor}, WholeLayout({tensor})), IsOk());
}

TEST(StateLayout, BytesAreForeseenToWithinAFewPercent) {
  const TemporaryDirectory dir;
  const TestTensor tensor = {"w", {3000, 1000}, DType::kF32};
  const std::vector<StatePiece> pieces = {
      FilledPiece(tensor, 1, WholeBox(tensor.shape), 0, 3000000)};
  ASSERT_OK_AND_ASSIGN(const std::string temp, BeginState(dir.path(), 1, "x", 0));
  ASSERT_OK_AND_ASSIGN(const RankFileRecord record, WriteRankFile(temp, 0, pieces));
  EXPECT_LE(record.file.bytes, StateBytes(pieces));
  EXPECT_GE(record.file.bytes, 3000000 * 4);
}

}  // namespace
}  // namespace baleen
