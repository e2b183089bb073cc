#include "checkpoints/hf_checkpoint.h"

#include <sys/stat.h>
#include <unistd.h>

#include <filesystem>
#include <functional>
#include <set>

#include "checkpoints/fp8_blocks.h"
#include "tests/checkpoints/hf_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::MakeCheckpoint;
using testing::ReadFloats;
using testing::ReadText;
using testing::Replaced;
using testing::ScratchDirectory;
using testing::WriteText;

constexpr absl::StatusCode kBad = absl::StatusCode::kDataLoss;
constexpr char kIndex[] = "model.safetensors.index.json";
constexpr char kQA[] = "model.layers.0.self_attn.q_a_proj.weight";  // [48, 160]: two column blocks

// A valid V3.1 FP8 checkpoint in a directory of its own, to be broken.
struct Fixture {
  ScratchDirectory scratch;
  std::string directory = scratch.File("hf");
  explicit Fixture(ExportDType dtype = ExportDType::kFp8,
                   HfArchitecture architecture = HfArchitecture::kV31) {
    MakeCheckpoint(directory, dtype, architecture);
  }
  std::string File(absl::string_view name) const { return JoinPath(directory, name); }
  void Edit(absl::string_view file, absl::string_view from, absl::string_view to) const {
    WriteText(File(file), Replaced(ReadText(File(file)), from, to));
  }
  // The shard that holds a tensor.
  std::string ShardOf(absl::string_view name) const {
    const auto checkpoint = HfCheckpoint::Open(directory);
    CHECK_OK(checkpoint.status());
    return checkpoint->Find(name)->shard;
  }
};

// Same length: the header's length word stays right.
void RenameInHeader(const Fixture& fixture, const std::string& shard, absl::string_view from,
                    absl::string_view to) {
  CHECK_EQ(from.size(), to.size());
  fixture.Edit(shard, from, to);
}

TEST(HfCheckpoint, ReadsWholeTensorsAndBoxesOfEveryStorage) {
  Fixture fixture;
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint checkpoint, HfCheckpoint::Open(fixture.directory));
  EXPECT_GT(checkpoint.ShardNames().size(), 2u);
  EXPECT_TRUE(checkpoint.hf_config().fp8);
  for (const absl::string_view name :
       {absl::string_view(kQA), absl::string_view("model.embed_tokens.weight"),
        absl::string_view("model.norm.weight"),
        absl::string_view("model.layers.2.self_attn.kv_a_proj_with_mqa.weight")}) {
    const CheckpointTensor* tensor = checkpoint.Find(name);
    ASSERT_NE(tensor, nullptr) << name;
    const std::vector<float> whole = ReadFloats(checkpoint, std::string(name));
    Box box = WholeBox(tensor->shape);
    for (size_t d = 0; d < box.offset.size(); ++d) {
      box.offset[d] = 1;
      box.extent[d] = tensor->shape[d] - 3;
    }
    std::vector<double> part(static_cast<size_t>(NumElements(box.extent)));
    ASSERT_THAT(checkpoint.Read(name, box, DType::kF64, part.data()), IsOk());
    const int64_t cols = box.extent.back(), all_cols = tensor->shape.back();
    for (size_t i = 0; i < part.size(); ++i) {
      const int64_t row = static_cast<int64_t>(i) / cols, col = static_cast<int64_t>(i) % cols;
      const int64_t from = box.offset.size() == 1 ? 1 + col : (1 + row) * all_cols + 1 + col;
      ASSERT_EQ(part[i], whole[static_cast<size_t>(from)]) << name << " " << i;
    }
  }
}

TEST(HfCheckpoint, Fp8IsTheBytesTimesTheirScale) {
  Fixture fixture;
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint checkpoint, HfCheckpoint::Open(fixture.directory));
  ASSERT_OK_AND_ASSIGN(const auto bytes, checkpoint.RawBytes(kQA));
  ASSERT_OK_AND_ASSIGN(const std::vector<float> scales, checkpoint.Scales(kQA));
  ASSERT_EQ(scales.size(), 2u);
  const std::vector<float> values = ReadFloats(checkpoint, kQA);
  for (size_t i = 0; i < values.size(); ++i) {
    const size_t column = i % 160;
    ASSERT_EQ(values[i], Float8E4M3{bytes[i]}.ToFloat() * scales[column / 128]) << i;
  }
}

TEST(HfCheckpoint, AskingForWhatIsNotThereIsAnErrorByName) {
  Fixture fixture;
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint checkpoint, HfCheckpoint::Open(fixture.directory));
  std::vector<float> out(1 << 16);
  EXPECT_EQ(checkpoint.Find("model.nothing"), nullptr);
  EXPECT_THAT(checkpoint.RawBytes("model.nothing"), HasStatus(kBad, "no tensor model.nothing"));
  EXPECT_THAT(checkpoint.Read("model.nothing", {{0}, {1}}, DType::kF32, out.data()),
              HasStatus(kBad, "no tensor model.nothing"));
  EXPECT_THAT(checkpoint.Read(kQA, {{0, 0}, {49, 160}}, DType::kF32, out.data()),
              HasStatus(kBad, "found [48, 160], asked for [49, 160] at [0, 0]"));
  EXPECT_THAT(checkpoint.Read(kQA, {{0}, {48}}, DType::kF32, out.data()), HasStatus(kBad, kQA));
}

TEST(HfCheckpoint, AcceptsASingleFileAndASymlinkedShardAndEmptyMetadata) {
  ScratchDirectory scratch;
  const std::string directory = scratch.File("hf");
  ASSERT_THAT(InitHfCheckpoint({.model = testing::TinyModel()}, directory), IsOk());
  const std::string only = JoinPath(directory, "model-00001-of-00001.safetensors");
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint indexed, HfCheckpoint::Open(directory));

  // As in the hub's cache: the name is a link into a folder of blobs.
  std::filesystem::rename(only, scratch.File("blob"));
  std::filesystem::create_symlink("../blob", only);
  const std::string index = ReadText(JoinPath(directory, kIndex));
  const size_t from = index.find("{", 1), to = index.find("}", from);
  WriteText(JoinPath(directory, kIndex), index.substr(0, from) + "{" + index.substr(to));
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint linked, HfCheckpoint::Open(directory));
  EXPECT_EQ(linked.TensorNames(), indexed.TensorNames());
  EXPECT_EQ(linked.index_note(), "");

  std::filesystem::remove(JoinPath(directory, kIndex));
  std::filesystem::remove(only);
  std::filesystem::copy(scratch.File("blob"), JoinPath(directory, "model.safetensors"));
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint lone, HfCheckpoint::Open(directory));
  EXPECT_EQ(lone.TensorNames(), indexed.TensorNames());
}

TEST(HfCheckpoint, ShardNamesArePlain) {
  EXPECT_TRUE(IsShardName("model-00001-of-00163.safetensors"));
  EXPECT_TRUE(IsShardName("A.b_c-9.safetensors"));
  for (const absl::string_view name :
       {"../a.safetensors", "/etc/a.safetensors", "a/b.safetensors", ".safetensors",
        ".a.safetensors", "a.safetensors ", "a.bin", "", "a\\b.safetensors", "\xc3\xa9.safetensors",
        "a\n.safetensors", "..safetensors"}) {
    EXPECT_FALSE(IsShardName(name)) << name;
  }
  EXPECT_FALSE(IsShardName(absl::string_view("a\0.safetensors", 14)));
  EXPECT_FALSE(IsShardName(std::string(250, 'a') + ".safetensors"));
}

TEST(HfCheckpoint, RefusesEveryBrokenIndexText) {
  struct Case {
    absl::string_view text;
    const char* part;
  };
  const Case cases[] = {
      {"", "not valid JSON"},
      {"[]", "expected an object at the top"},
      {"7", "expected an object, found an integer"},
      {"{}", "\"weight_map\" is missing"},
      {R"({"weight_map": []})", "weight_map: expected an object"},
      {R"({"weight_map": "x"})", "weight_map: expected an object"},
      {R"({"weight_map": {"a": 1}})", "tensor \"a\": expected a file name, found an integer"},
      {R"({"weight_map": {"a": null}})", "found null"},
      {R"({"weight_map": {"a": ["x.safetensors"]}})", "found a list or an object"},
      {R"({"weight_map": {"a": "../x.safetensors"}})", "is not a plain name"},
      {R"({"weight_map": {"a": "/x.safetensors"}})", "is not a plain name"},
      {R"({"weight_map": {"a": "d/x.safetensors"}})", "is not a plain name"},
      {R"({"weight_map": {"a": "x\u0000.safetensors"}})", "is not a plain name"},
      {R"({"weight_map": {"a": "x.bin"}})", "is not a plain name"},
      {R"({"weight_map": {"": "x.safetensors"}})", "a tensor name of 0 bytes"},
      {R"({"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}})", "stands twice"},
      {R"({"weight_map": {}, "weight_map": {}})", "stands twice"},
      {R"({"metadata": {"total_size": -1}, "weight_map": {}})", "metadata.total_size"},
      {R"({"metadata": {"total_size": "9"}, "weight_map": {}})", "metadata.total_size"},
      {R"({"weight_map": {}} trailing)", "not valid JSON"},
  };
  for (const Case& c : cases) {
    EXPECT_THAT(ParseIndex(c.text, "i.json"), HasStatus(kBad, c.part)) << c.text;
  }
  ASSERT_OK_AND_ASSIGN(
      const CheckpointIndex index,
      ParseIndex(R"({"metadata": {"total_size": 8, "x": [{}]}, "weight_map": {"a": "b.safetensors"},
                     "other": {"weight_map": 3}})",
                 "i.json"));
  EXPECT_EQ(index.total_size, 8);
  EXPECT_EQ(index.weight_map.at("a"), "b.safetensors");
}

// Each case breaks a good directory in one place; Open must say where.
TEST(HfCheckpoint, RefusesEveryBrokenDirectory) {
  struct Case {
    const char* what;
    std::function<void(const Fixture&)> damage;
    const char* part;
  };
  const auto first = "model-00001-of-";
  const Case cases[] = {
      {"no config", [](const Fixture& f) { std::filesystem::remove(f.File("config.json")); },
       "config.json"},
      {"no index", [](const Fixture& f) { std::filesystem::remove(f.File(kIndex)); },
       "found neither"},
      {"shard missing",
       [](const Fixture& f) { std::filesystem::remove(f.File(f.ShardOf("lm_head.weight"))); },
       "cannot open"},
      {"shard is a directory",
       [](const Fixture& f) {
         const std::string path = f.File(f.ShardOf("lm_head.weight"));
         std::filesystem::remove(path);
         std::filesystem::create_directory(path);
       },
       "regular file"},
      {"shard is a pipe",
       [](const Fixture& f) {
         const std::string path = f.File(f.ShardOf("lm_head.weight"));
         std::filesystem::remove(path);
         CHECK_EQ(::mkfifo(path.c_str(), 0600), 0);
       },
       "regular file"},
      {"shard truncated",
       [](const Fixture& f) {
         const std::string path = f.File(f.ShardOf("lm_head.weight"));
         std::filesystem::resize_file(path, std::filesystem::file_size(path) - 1);
       },
       "truncated?"},
      {"shard with a tail",
       [](const Fixture& f) {
         const std::string path = f.File(f.ShardOf("lm_head.weight"));
         WriteText(path, ReadText(path) + "x");
       },
       "trailing bytes"},
      {"index names a tensor no shard has",
       [](const Fixture& f) { f.Edit(kIndex, "\"lm_head.weight\"", "\"lm_head.weigh2\""); },
       "holds lm_head.weight, which model.safetensors.index.json does not list"},
      {"index adds a tensor",
       [=](const Fixture& f) {
         f.Edit(kIndex, "\"weight_map\": {",
                absl::StrCat("\"weight_map\": {\"extra\": \"", f.ShardOf("lm_head.weight"), "\","));
       },
       "which does not have it"},
      {"index names the wrong shard",
       [](const Fixture& f) {
         const std::string right = f.ShardOf("lm_head.weight");
         const std::string wrong = f.ShardOf("model.embed_tokens.weight");
         f.Edit(kIndex, "\"lm_head.weight\": \"" + right, "\"lm_head.weight\": \"" + wrong);
       },
       "which model.safetensors.index.json places in"},
      {"a tensor in two shards",
       [](const Fixture& f) {
         const std::string shard = f.ShardOf("model.embed_tokens.weight");
         std::filesystem::copy(f.File(shard), f.File("copy.safetensors"));
         f.Edit(kIndex, "\"model.norm.weight\": \"" + f.ShardOf("model.norm.weight"),
                "\"model.norm.weight\": \"copy.safetensors");
       },
       "places in"},
      {"index path escapes",
       [=](const Fixture& f) { f.Edit(kIndex, first, absl::StrCat("../hf/", first)); },
       "is not a plain name"},
      {"config of another model type",
       [](const Fixture& f) { f.Edit("config.json", "deepseek_v3\"", "llama\""); }, "model_type"},
  };
  for (const Case& c : cases) {
    Fixture fixture;
    c.damage(fixture);
    EXPECT_THAT(HfCheckpoint::Open(fixture.directory), HasStatus(kBad, c.part)) << c.what;
  }
  EXPECT_THAT(HfCheckpoint::Open("/nonexistent/hf"), HasStatus(kBad, "expected a directory"));
}

TEST(HfCheckpoint, AWrongTotalSizeIsNotedAndHarmless) {
  Fixture fixture;
  fixture.Edit(kIndex, "\"total_size\": ", "\"total_size\": 1");
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint checkpoint, HfCheckpoint::Open(fixture.directory));
  EXPECT_NE(checkpoint.index_note().find("metadata.total_size is 1"), std::string::npos);
}

TEST(HfCheckpoint, ScalesMustExistFitAndBeFinite) {
  const std::string scale = ScaleName(kQA);
  std::vector<float> out(48 * 160);
  const Box whole = WholeBox({48, 160});
  struct Case {
    const char* what;
    std::function<void(const Fixture&)> damage;
    const char* part;
  };
  const Case cases[] = {
      {"renamed away",
       [&](const Fixture& f) {
         const std::string shard = f.ShardOf(scale);
         const std::string other = Replaced(scale, "q_a_proj", "q_a_prox");
         RenameInHeader(f, shard, "\"" + scale + "\"", "\"" + other + "\"");
         f.Edit(kIndex, "\"" + scale + "\"", "\"" + other + "\"");
       },
       "without its scale"},
      {"wrong grid",
       [&](const Fixture& f) {
         RenameInHeader(f, f.ShardOf(scale), scale + "\":{\"dtype\":\"F32\",\"shape\":[1,2]",
                        scale + "\":{\"dtype\":\"F32\",\"shape\":[2,1]");
       },
       "found F32[2, 1], expected F32[1, 2]"},
      {"wrong dtype",
       [&](const Fixture& f) {
         RenameInHeader(f, f.ShardOf(scale), scale + "\":{\"dtype\":\"F32\"",
                        scale + "\":{\"dtype\":\"I32\"");
       },
       "found I32[1, 2], expected F32[1, 2]"},
  };
  for (const Case& c : cases) {
    Fixture fixture;
    c.damage(fixture);
    ASSERT_OK_AND_ASSIGN(const HfCheckpoint checkpoint, HfCheckpoint::Open(fixture.directory));
    const absl::Status status = checkpoint.Read(kQA, whole, DType::kF32, out.data());
    EXPECT_THAT(status, HasStatus(kBad, c.part)) << c.what;
    EXPECT_THAT(status, HasStatus(kBad, ".safetensors")) << c.what;
    EXPECT_FALSE(checkpoint.Account(checkpoint.config(), {.with_indexer = true}).errors.empty());
  }
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -1.0f, std::numeric_limits<float>::infinity()}) {
    Fixture fixture;
    std::string shard, text;
    {
      ASSERT_OK_AND_ASSIGN(const HfCheckpoint checkpoint, HfCheckpoint::Open(fixture.directory));
      const CheckpointTensor& tensor = *checkpoint.Find(scale);
      shard = tensor.shard;
      text = ReadText(fixture.File(shard));
      const uint64_t length = static_cast<uint8_t>(text[0]) | static_cast<uint8_t>(text[1]) << 8;
      std::memcpy(text.data() + 8 + length + static_cast<size_t>(tensor.begin) + 4, &bad, 4);
    }
    WriteText(fixture.File(shard), text);
    ASSERT_OK_AND_ASSIGN(const HfCheckpoint checkpoint, HfCheckpoint::Open(fixture.directory));
    EXPECT_THAT(checkpoint.Read(kQA, whole, DType::kF32, out.data()),
                HasStatus(kBad, "block [0, 1] is"));
  }
}

TEST(HfCheckpoint, AFileThatChangesUnderTheRunIsAnErrorNotACrash) {
  Fixture fixture;
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint checkpoint, HfCheckpoint::Open(fixture.directory));
  const std::string path = fixture.File(checkpoint.Find("lm_head.weight")->shard);
  std::filesystem::resize_file(path, 100);
  EXPECT_THAT(checkpoint.RawBytes("lm_head.weight"), HasStatus(kBad, "replaced or changed"));
  std::vector<float> out(96 * 160);
  EXPECT_THAT(checkpoint.Read("lm_head.weight", {{0, 0}, {96, 160}}, DType::kF32, out.data()),
              HasStatus(kBad, "replaced or changed"));
}

TEST(HfCheckpoint, SourceHashNamesConfigIndexAndHeaders) {
  Fixture fixture;
  const auto hash = [&] {
    const auto checkpoint = HfCheckpoint::Open(fixture.directory);
    CHECK_OK(checkpoint.status());
    return checkpoint->SourceHash();
  };
  std::set<std::string> seen = {hash()};
  EXPECT_EQ(hash(), *seen.begin());
  EXPECT_EQ(seen.begin()->size(), 32u);
  fixture.Edit("config.json", "\"eos_token_id\": 1", "\"eos_token_id\": 2");
  EXPECT_TRUE(seen.insert(hash()).second);
  fixture.Edit(kIndex, "\"metadata\"", " \"metadata\"");
  EXPECT_TRUE(seen.insert(hash()).second);
  RenameInHeader(fixture, fixture.ShardOf("lm_head.weight"), "\"pt\"", "\"np\"");
  EXPECT_TRUE(seen.insert(hash()).second);
}

// A lone shard with `data` behind its header.
HfCheckpoint WithData(const Fixture& fixture, const std::string& data) {
  const std::string shard = fixture.File("model.safetensors");
  std::filesystem::remove(fixture.File(kIndex));
  const std::string header = absl::StrCat("{\"x\":{\"dtype\":\"U8\",\"shape\":[", data.size(),
                                          "],\"data_offsets\":[0,", data.size(), "]}}");
  WriteText(shard, testing::SafetensorsText(header, 0) + data);
  auto checkpoint = HfCheckpoint::Open(fixture.directory);
  CHECK_OK(checkpoint.status());
  return *std::move(checkpoint);
}

TEST(HfCheckpoint, DataHashTellsWeightsOfTheSameShapesApart) {
  const Fixture fixture;
  const auto hash = [&](const std::string& data) {
    const auto result = WithData(fixture, data).DataHash(0);
    CHECK_OK(result.status());
    return *result;
  };
  // Every byte of a short shard counts; of a long one the samples, first and last bytes among them.
  const int64_t all = kDataSamples * kDataSampleBytes;
  for (const int64_t bytes : {int64_t{1}, kDataSampleBytes, kDataSampleBytes + 1, all}) {
    const std::string data(bytes, 'a');
    for (const int64_t at : {int64_t{0}, bytes / 3, bytes - 1}) {
      std::string other = data;
      other[at] = 'b';
      EXPECT_NE(hash(other), hash(data)) << bytes << " bytes, byte " << at;
    }
  }
  const std::string data(4 * all, 'a');
  EXPECT_EQ(hash(data), hash(data));
  EXPECT_NE(hash(std::string(4 * all, 'b')), hash(data));
  for (const int64_t at : {int64_t{0}, 4 * all - 1}) {
    std::string other = data;
    other[at] = 'b';
    EXPECT_NE(hash(other), hash(data)) << at;
  }
}

TEST(HfCheckpoint, DataHashOfAFileThatWasReplacedIsAnError) {
  const Fixture fixture;
  const HfCheckpoint checkpoint = WithData(fixture, "abc");
  std::filesystem::remove(fixture.File("model.safetensors"));
  EXPECT_THAT(checkpoint.DataHash(0), HasStatus(kBad, "model.safetensors"));
}

}  // namespace
}  // namespace baleen
