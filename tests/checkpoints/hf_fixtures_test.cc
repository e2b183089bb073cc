// Checkpoints that transformers or DeepSeek's own layout made (tests/fixtures): they open, every
// tensor is accounted for, FP8 multiplies out to the BF16 twin bit for bit, and a round trip keeps
// every byte.
#include <filesystem>

#include "absl/strings/match.h"
#include "checkpoints/hf_export.h"
#include "tests/checkpoints/hf_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::IsOk;
using testing::ReadFloats;
using testing::ScratchDirectory;

constexpr absl::string_view kCheckpoints[] = {
    "tests/fixtures/yarn40/bf16_v32", "tests/fixtures/yarn4_fp8/bf16_v32",
    "tests/fixtures/yarn4_fp8/fp8_v31", "tests/fixtures/plain_rope/bf16_v31",
    "tests/fixtures/plain_rope/fp8_v32"};

TEST(HfFixtures, OpenAndEveryTensorIsAccountedFor) {
  for (const absl::string_view directory : kCheckpoints) {
    ASSERT_OK_AND_ASSIGN(const HfCheckpoint checkpoint, HfCheckpoint::Open(std::string(directory)));
    const Accounting accounting = checkpoint.Account(checkpoint.config(), {.with_indexer = true});
    EXPECT_THAT(accounting.ToStatus(directory), IsOk());
    EXPECT_EQ(accounting.initialised.empty(), checkpoint.config().has_indexer) << directory;
    size_t scales = 0;
    for (const std::string& name : checkpoint.TensorNames())
      scales += WeightOfScale(name).has_value();
    EXPECT_EQ(accounting.loaded.size() + accounting.ignored.size() + scales,
              checkpoint.TensorNames().size())
        << directory;
    EXPECT_EQ(checkpoint.config().has_indexer, absl::StrContains(directory, "v32"));
    EXPECT_EQ(checkpoint.hf_config().fp8, absl::StrContains(directory, "fp8_v"));
  }
}

TEST(HfFixtures, RopeIsReadFromBothSpellings) {
  ASSERT_OK_AND_ASSIGN(const HfConfig five,
                       ReadHfConfig("tests/fixtures/yarn40/bf16_v32/config.json"));
  ASSERT_TRUE(five.model.rope_scaling.has_value());
  EXPECT_EQ(five.model.rope_scaling->factor, 40);
  EXPECT_EQ(five.model.rope_scaling->original_max_position_embeddings, 64);
  ASSERT_OK_AND_ASSIGN(const HfConfig old,
                       ReadHfConfig("tests/fixtures/yarn4_fp8/fp8_v31/config.json"));
  ASSERT_TRUE(old.model.rope_scaling.has_value());
  EXPECT_EQ(old.model.rope_scaling->mscale_all_dim, 0.707);
  ASSERT_OK_AND_ASSIGN(const HfConfig plain,
                       ReadHfConfig("tests/fixtures/plain_rope/bf16_v31/config.json"));
  EXPECT_FALSE(plain.model.rope_scaling.has_value());
  EXPECT_EQ(plain.model.rope_theta, 50000);
}

TEST(HfFixtures, Fp8MultipliesOutToTheBf16TwinBitForBit) {
  const std::pair<const char*, const char*> twins[] = {
      {"tests/fixtures/yarn4_fp8/fp8_v31", "tests/fixtures/yarn4_fp8/bf16_v32"},
      {"tests/fixtures/plain_rope/fp8_v32", "tests/fixtures/plain_rope/bf16_v31"}};
  for (const auto& [fp8_directory, bf16_directory] : twins) {
    ASSERT_OK_AND_ASSIGN(const HfCheckpoint fp8, HfCheckpoint::Open(fp8_directory));
    ASSERT_OK_AND_ASSIGN(const HfCheckpoint bf16, HfCheckpoint::Open(bf16_directory));
    int compared = 0;
    for (const std::string& name : fp8.TensorNames()) {
      if (WeightOfScale(name) || bf16.Find(name) == nullptr) continue;
      EXPECT_EQ(ReadFloats(fp8, name), ReadFloats(bf16, name)) << name;
      compared += fp8.Find(name)->dtype == DType::kF8E4M3;
    }
    EXPECT_GT(compared, 50);
  }
}

// Same dtype, nothing trained: every tensor comes out with the bytes it had. Quantising the BF16
// twin gives the FP8 file's values: our quantiser and the generator's agree.
TEST(HfFixtures, RoundTripKeepsEveryByteAndQuantisingTheTwinGivesTheSameValues) {
  ScratchDirectory scratch;
  int number = 0;
  for (const absl::string_view directory : kCheckpoints) {
    ASSERT_OK_AND_ASSIGN(const HfCheckpoint source, HfCheckpoint::Open(std::string(directory)));
    const ExportDType dtype = source.hf_config().fp8 ? ExportDType::kFp8 : ExportDType::kBF16;
    const HfArchitecture architecture =
        source.config().has_indexer ? HfArchitecture::kV32 : HfArchitecture::kV31;
    const std::string out = scratch.File(absl::StrCat("out", number++));
    ASSERT_THAT(ExportHf({.model = source.config(),
                          .architecture = architecture,
                          .dtype = dtype,
                          .source = &source,
                          .max_shard_bytes = 123'456},
                         nullptr, out),
                IsOk());
    ASSERT_OK_AND_ASSIGN(const HfCheckpoint exported, HfCheckpoint::Open(out));
    EXPECT_EQ(exported.config(), source.config()) << directory;
    EXPECT_EQ(exported.TensorNames(), source.TensorNames());
    for (const std::string& name : source.TensorNames()) {
      EXPECT_EQ(exported.Find(name)->dtype, source.Find(name)->dtype) << name;
      EXPECT_EQ(*exported.RawBytes(name), *source.RawBytes(name)) << directory << " " << name;
    }
  }
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint bf16,
                       HfCheckpoint::Open("tests/fixtures/yarn4_fp8/bf16_v32"));
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint fp8,
                       HfCheckpoint::Open("tests/fixtures/yarn4_fp8/fp8_v31"));
  ASSERT_THAT(ExportHf({.model = bf16.config(), .source = &bf16}, nullptr, scratch.File("q")),
              IsOk());
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint quantised, HfCheckpoint::Open(scratch.File("q")));
  for (const std::string& name : fp8.TensorNames()) {
    if (fp8.Find(name)->dtype != DType::kF8E4M3) continue;
    EXPECT_EQ(quantised.Find(name)->dtype, DType::kF8E4M3) << name;
    EXPECT_EQ(ReadFloats(quantised, name), ReadFloats(fp8, name)) << name;
  }
}

}  // namespace
}  // namespace baleen
