#include "checkpoints/hf_writer.h"

#include <sys/resource.h>
#include <unistd.h>

#include <csignal>
#include <filesystem>
#include <limits>

#include "checkpoints/safetensors.h"
#include "tests/checkpoints/hf_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::ReadAll;
using testing::ReadText;
using testing::ScratchDirectory;
using testing::WriteText;

constexpr absl::StatusCode kConfig = absl::StatusCode::kInvalidArgument;
constexpr absl::StatusCode kEnvironment = absl::StatusCode::kFailedPrecondition;
constexpr absl::StatusCode kNumerics = absl::StatusCode::kOutOfRange;

const std::vector<PlannedTensor>& SomeTensors() {
  static const auto* tensors = new std::vector<PlannedTensor>{
      {"a.weight", {130, 129}, DType::kF8E4M3}, {"a.weight_scale_inv", {2, 2}, DType::kF32},
      {"b.weight", {40, 10}, DType::kBF16},     {"c.weight", {7}, DType::kF32},
      {"d.weight", {3}, DType::kF64},
  };
  return *tensors;
}

ShardPlan PlanOf(const std::vector<PlannedTensor>& tensors, int64_t shard_bytes) {
  auto plan = PlanShards(tensors, shard_bytes);
  CHECK_OK(plan.status());
  return *std::move(plan);
}

std::vector<float> Ramp(size_t count) {
  std::vector<float> values(count);
  for (size_t i = 0; i < count; ++i) values[i] = 0.01f * static_cast<float>(i) - 1;
  return values;
}

absl::Status WriteSome(HfWriter& writer) {
  RETURN_IF_ERROR(writer.WriteValues("a.weight", Ramp(130 * 129)));
  RETURN_IF_ERROR(writer.WriteValues("b.weight", Ramp(400)));
  RETURN_IF_ERROR(writer.WriteValues("c.weight", Ramp(7)));
  return writer.WriteValues("d.weight", absl::Span<const double>({1.0, -2.5, 1e300}));
}

TEST(HfWriter, PlanFillsShardsInOrderAndKnowsEveryOffset) {
  const ShardPlan plan = PlanOf(SomeTensors(), 17'000);
  // a alone exceeds nothing (16,770); its scale still fits (16,786); b (800) opens the next.
  ASSERT_EQ(plan.shards.size(), 2u);
  EXPECT_EQ(plan.shards[0].file, "model-00001-of-00002.safetensors");
  EXPECT_EQ(plan.places.at("a.weight_scale_inv").shard, 0);
  EXPECT_EQ(plan.places.at("b.weight").shard, 1);
  EXPECT_EQ(plan.total_bytes, 130 * 129 + 16 + 800 + 28 + 24);
  for (const ShardPlan::Shard& shard : plan.shards) {
    ASSERT_OK_AND_ASSIGN(const SafetensorsHeader header,
                         ParseSafetensors(
                             [&] {
                               static std::string file;
                               file = shard.header;
                               file.resize(static_cast<size_t>(shard.file_bytes));
                               return absl::MakeConstSpan(
                                   reinterpret_cast<const uint8_t*>(file.data()), file.size());
                             }(),
                             shard.file));
    for (const SafetensorsEntry& entry : header.entries) {
      EXPECT_EQ(plan.places.at(entry.name).offset, header.header_bytes + entry.begin) << entry.name;
    }
  }
  // A tensor larger than a shard gets one of its own.
  EXPECT_EQ(PlanOf(SomeTensors(), 1).shards.size(), 5u);
}

TEST(HfWriter, PlanRefusesDoubledNamesAndFp8WithoutItsScale) {
  std::vector<PlannedTensor> tensors = SomeTensors();
  tensors.push_back(tensors[2]);
  EXPECT_THAT(PlanShards(tensors, 1000), HasStatus(kConfig, "b.weight is listed twice"));
  tensors = SomeTensors();
  tensors.erase(tensors.begin() + 1);
  EXPECT_THAT(PlanShards(tensors, 1000), HasStatus(kConfig, "a.weight[130, 129] has no F32 scale"));
  tensors = SomeTensors();
  tensors[1].shape = {2, 1};
  EXPECT_THAT(PlanShards(tensors, 1000), HasStatus(kConfig, "has no F32 scale"));
}

TEST(HfWriter, WritesFilesThatReadBackAndCopiesTheTokenizer) {
  ScratchDirectory scratch;
  const std::string source = scratch.File("source");
  std::filesystem::create_directory(source);
  for (const char* name : {"tokenizer.json", "tokenizer_config.json", "generation_config.json",
                           "modeling_x.py", "config.json", "notes.txt"}) {
    WriteText(JoinPath(source, name), name);
  }
  const std::string target = scratch.File("deep/er/out/");
  ASSERT_OK_AND_ASSIGN(HfWriter writer,
                       HfWriter::Create(target, PlanOf(SomeTensors(), 17'000),
                                        {.config_json = "{}", .copy_from = source}));
  EXPECT_FALSE(std::filesystem::exists(scratch.File("deep/er/out")));
  ASSERT_THAT(WriteSome(writer), IsOk());
  ASSERT_THAT(writer.Finish(), IsOk());
  EXPECT_FALSE(std::filesystem::exists(writer.staging_directory()));

  const auto files = ReadAll(target);
  EXPECT_EQ(files.size(), 2u + 2u + 3u);
  EXPECT_EQ(files.at("tokenizer.json"), "tokenizer.json");
  EXPECT_EQ(files.at("config.json"), "{}");
  EXPECT_EQ(files.count("modeling_x.py"), 0u);
  ASSERT_OK_AND_ASSIGN(const CheckpointIndex index,
                       ParseIndex(files.at("model.safetensors.index.json"), "index"));
  EXPECT_EQ(index.total_size, writer.plan().total_bytes);
  EXPECT_EQ(index.weight_map.size(), 5u);
  ASSERT_OK_AND_ASSIGN(const SafetensorsFile second,
                       SafetensorsFile::Open(JoinPath(target, "model-00002-of-00002.safetensors")));
  ASSERT_EQ(second.entries()[0].name, "d.weight");  // larger alignment first
  double value = 0;
  std::memcpy(&value, second.Data(16, 24).data(), 8);
  EXPECT_EQ(value, 1e300);
  ASSERT_EQ(second.entries()[2].name, "b.weight");
  BFloat16 first;
  std::memcpy(&first, second.Data(second.entries()[2].begin, second.entries()[2].end).data(), 2);
  EXPECT_EQ(first.ToFloat(), -1);
}

TEST(HfWriter, TheOrderAndTheRankThatWritesDoNotShow) {
  ScratchDirectory scratch;
  const ShardPlan plan = PlanOf(SomeTensors(), 17'000);
  {
    ASSERT_OK_AND_ASSIGN(HfWriter writer, HfWriter::Create(scratch.File("one"), plan, {}));
    ASSERT_THAT(WriteSome(writer), IsOk());
    ASSERT_THAT(writer.Finish(), IsOk());
  }
  ASSERT_OK_AND_ASSIGN(HfWriter first, HfWriter::Create(scratch.File("two"), plan, {}));
  {
    ASSERT_OK_AND_ASSIGN(HfWriter second, HfWriter::Attach(first.staging_directory(), plan));
    ASSERT_THAT(second.WriteValues("c.weight", Ramp(7)), IsOk());
    ASSERT_THAT(second.WriteValues("a.weight", Ramp(130 * 129)), IsOk());
    ASSERT_THAT(second.Sync(), IsOk());
    first.AddWritten(second.written());
  }
  ASSERT_THAT(first.WriteValues("d.weight", absl::Span<const double>({1.0, -2.5, 1e300})), IsOk());
  ASSERT_THAT(first.WriteValues("b.weight", Ramp(400)), IsOk());
  ASSERT_THAT(first.Finish(), IsOk());
  EXPECT_EQ(ReadAll(scratch.File("one")), ReadAll(scratch.File("two")));
}

TEST(HfWriter, RowBandsCoverATensorInWholeBlocks) {
  const auto rows = [](const Shape& shape, int64_t most) {
    std::vector<int64_t> extents;
    int64_t next = 0;
    for (const Box& band : RowBands(shape, most)) {
      EXPECT_EQ(band.offset[0], next);
      next += band.extent[0];
      extents.push_back(band.extent[0]);
      if (shape.size() == 2) {
        EXPECT_EQ(band.offset[1], 0);
        EXPECT_EQ(band.extent[1], shape[1]);
      }
    }
    EXPECT_EQ(next, shape[0]);
    return extents;
  };
  using Extents = std::vector<int64_t>;
  EXPECT_EQ(rows({300, 10}, 1280), (Extents{128, 128, 44}));
  EXPECT_EQ(rows({300, 10}, 2600), (Extents{256, 44}));
  EXPECT_EQ(rows({300, 4096}, 1280), (Extents{128, 128, 44}));  // 128 rows are the least
  EXPECT_EQ(rows({300, 10}, 3000),
            (Extents{256, 44}));  // all of it would fit, but is cut at a block
  EXPECT_EQ(rows({256, 10}, 2560), Extents{256});
  EXPECT_EQ(rows({1000}, 400), (Extents{384, 384, 232}));
  EXPECT_EQ(rows({0, 5}, 400), Extents{0});
  EXPECT_EQ(RowBands({}), std::vector<Box>{Box{}});
  EXPECT_EQ(RowBands({129280, 7168}).front().extent, (Shape{256, 7168}));
}

TEST(HfWriter, BandsGiveTheBytesOfTheWholeTensor) {
  ScratchDirectory scratch;
  const ShardPlan plan = PlanOf({{"a.weight", {300, 129}, DType::kF8E4M3},
                                 {"a.weight_scale_inv", {3, 2}, DType::kF32},
                                 {"b.weight", {300, 7}, DType::kBF16},
                                 {"c.weight", {300}, DType::kF32},
                                 {"d.weight", {300, 2}, DType::kF64}},
                                1 << 20);
  const std::vector<std::pair<std::string, int64_t>> widths = {
      {"a.weight", 129}, {"b.weight", 7}, {"c.weight", 1}, {"d.weight", 2}};
  ASSERT_OK_AND_ASSIGN(HfWriter whole, HfWriter::Create(scratch.File("whole"), plan, {}));
  ASSERT_OK_AND_ASSIGN(HfWriter bands, HfWriter::Create(scratch.File("bands"), plan, {}));
  for (const auto& [name, width] : widths) {
    const std::vector<float> values = Ramp(static_cast<size_t>(300 * width));
    ASSERT_THAT(whole.WriteValues(name, values), IsOk());
    for (const auto& [first, last] : {std::pair{0, 128}, {128, 256}, {256, 300}}) {
      EXPECT_EQ(bands.written().count(name), 0u);
      ASSERT_THAT(bands.WriteRows(name, first,
                                  absl::MakeConstSpan(values).subspan(
                                      static_cast<size_t>(first * width),
                                      static_cast<size_t>((last - first) * width))),
                  IsOk());
    }
  }
  EXPECT_EQ(bands.written(), whole.written());
  ASSERT_THAT(whole.Finish(), IsOk());
  ASSERT_THAT(bands.Finish(), IsOk());
  EXPECT_EQ(ReadAll(scratch.File("whole")), ReadAll(scratch.File("bands")));
}

TEST(HfWriterDeathTest, ABandOutOfOrderOrThroughABlockIsAProgrammersError) {
  ScratchDirectory scratch;
  ASSERT_OK_AND_ASSIGN(HfWriter writer,
                       HfWriter::Create(scratch.File("out"), PlanOf(SomeTensors(), 17'000), {}));
  EXPECT_DEATH(writer.WriteRows("b.weight", 20, Ramp(200)).IgnoreError(), "b.weight");
  EXPECT_DEATH(writer.WriteRows("a.weight", 0, Ramp(100 * 129)).IgnoreError(), "cut a block");
}

TEST(HfWriter, RefusesATargetThatHoldsAnything) {
  ScratchDirectory scratch;
  WriteText(scratch.File("file"), "precious");
  std::filesystem::create_directory(scratch.File("full"));
  WriteText(scratch.File("full/x"), "precious");
  std::filesystem::create_directory(scratch.File("empty"));
  std::filesystem::create_directory_symlink("empty", scratch.File("link"));
  const ShardPlan plan = PlanOf(SomeTensors(), 17'000);
  for (const char* name : {"file", "full", "link"}) {
    EXPECT_THAT(HfWriter::Create(scratch.File(name), plan, {}),
                HasStatus(kConfig, "exists and is not an empty directory"))
        << name;
  }
  EXPECT_EQ(ReadText(scratch.File("full/x")), "precious");
  ASSERT_OK_AND_ASSIGN(HfWriter writer, HfWriter::Create(scratch.File("empty"), plan, {}));
  ASSERT_THAT(WriteSome(writer), IsOk());
  ASSERT_THAT(writer.Finish(), IsOk());
  EXPECT_EQ(scratch.List(), (std::vector<std::string>{"empty", "file", "full", "link"}));
}

TEST(HfWriter, AnUnwrittenTensorStopsTheExportAndLeavesNothing) {
  ScratchDirectory scratch;
  ASSERT_OK_AND_ASSIGN(HfWriter writer,
                       HfWriter::Create(scratch.File("out"), PlanOf(SomeTensors(), 17'000), {}));
  ASSERT_THAT(writer.WriteValues("b.weight", Ramp(400)), IsOk());
  EXPECT_THAT(writer.Finish(),
              HasStatus(absl::StatusCode::kInternal, "a.weight was never written"));
  EXPECT_TRUE(scratch.List().empty());
}

TEST(HfWriter, LeavesNothingWhenItIsDroppedHalfway) {
  ScratchDirectory scratch;
  {
    ASSERT_OK_AND_ASSIGN(HfWriter writer,
                         HfWriter::Create(scratch.File("out"), PlanOf(SomeTensors(), 17'000), {}));
    EXPECT_EQ(scratch.List().size(), 1u);
    ASSERT_THAT(writer.WriteValues("b.weight", Ramp(400)), IsOk());
  }
  EXPECT_TRUE(scratch.List().empty());
}

TEST(HfWriter, WhatAKilledExportLeftIsNamed) {
  ScratchDirectory scratch;
  const std::string staging = absl::StrCat("out.tmp.", ::getpid());
  std::filesystem::create_directory(scratch.File(staging));
  EXPECT_THAT(HfWriter::Create(scratch.File("out"), PlanOf(SomeTensors(), 17'000), {}),
              HasStatus(kEnvironment, "left by an export that was killed"));
  EXPECT_EQ(scratch.List(), std::vector<std::string>{staging});
}

TEST(HfWriter, ATargetThatFillsUpMeanwhileIsNotOverwritten) {
  ScratchDirectory scratch;
  ASSERT_OK_AND_ASSIGN(HfWriter writer,
                       HfWriter::Create(scratch.File("out"), PlanOf(SomeTensors(), 17'000), {}));
  ASSERT_THAT(WriteSome(writer), IsOk());
  std::filesystem::create_directory(scratch.File("out"));
  WriteText(scratch.File("out/x"), "precious");
  EXPECT_THAT(writer.Finish(), HasStatus(kEnvironment, "rename into place"));
  EXPECT_EQ(ReadText(scratch.File("out/x")), "precious");
  EXPECT_EQ(scratch.List(), std::vector<std::string>{"out"});
}

// A file size limit stands for a full disk: the reservation fails and nothing is left.
TEST(HfWriter, AFullDiskIsFoundBeforeTheWorkAndLeavesNothing) {
  ScratchDirectory scratch;
  rlimit old, small;
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &old), 0);
  const auto old_handler = std::signal(SIGXFSZ, SIG_IGN);
  small = {.rlim_cur = 8192, .rlim_max = old.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &small), 0);
  const auto result = HfWriter::Create(scratch.File("out"), PlanOf(SomeTensors(), 17'000), {});
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &old), 0);
  std::signal(SIGXFSZ, old_handler);
  EXPECT_THAT(result, HasStatus(kEnvironment, "model-00001-of-00002.safetensors: cannot reserve"));
  EXPECT_TRUE(scratch.List().empty());
}

TEST(HfWriter, RefusesNumbersThatAreNotFinite) {
  ScratchDirectory scratch;
  ASSERT_OK_AND_ASSIGN(HfWriter writer,
                       HfWriter::Create(scratch.File("out"), PlanOf(SomeTensors(), 17'000), {}));
  std::vector<float> values = Ramp(400);
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity(),
                          std::numeric_limits<float>::max()}) {  // the last rounds to infinity
    values[123] = bad;
    EXPECT_THAT(writer.WriteValues("b.weight", values),
                HasStatus(kNumerics, "b.weight: element 123"));
  }
  // The element is counted in the tensor, not in the band.
  ASSERT_THAT(writer.WriteRows("a.weight", 0, Ramp(128 * 129)), IsOk());
  std::vector<float> band = Ramp(2 * 129);
  band[1] = std::nanf("");
  EXPECT_THAT(writer.WriteRows("a.weight", 128, band),
              HasStatus(kNumerics, "a.weight: element 16513"));
  std::vector<double> wide(130 * 129, 0.5);
  wide[7] = 1e39;
  EXPECT_THAT(writer.WriteValues("a.weight", wide), HasStatus(kNumerics, "a.weight: element 7"));
  std::vector<double> seven(7, 1e39);
  EXPECT_THAT(writer.WriteValues("c.weight", seven), HasStatus(kNumerics, "c.weight: element 0"));
  EXPECT_TRUE(writer.written().empty());
}

}  // namespace
}  // namespace baleen
