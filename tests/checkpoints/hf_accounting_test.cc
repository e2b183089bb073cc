// Every tensor of a checkpoint is loaded, initialised, ignored for a reason, or an error.
#include <algorithm>

#include "checkpoints/hf_checkpoint.h"
#include "tests/checkpoints/hf_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::MakeCheckpoint;
using testing::ReadText;
using testing::Replaced;
using testing::ScratchDirectory;
using testing::TinyModel;
using testing::WriteText;

Accounting AccountOf(const std::string& directory, const ModelConfig& model,
                     CatalogOptions options) {
  const auto checkpoint = HfCheckpoint::Open(directory);
  CHECK_OK(checkpoint.status());
  return checkpoint->Account(model, options);
}

// Writes TinyModel() without the tensors `leave_out` picks and with `more`; BF16 or F32, one shard.
void WriteTensors(const std::string& directory,
                  const std::function<bool(const std::string&)>& leave_out,
                  const std::vector<PlannedTensor>& more, bool v32 = false) {
  std::vector<PlannedTensor> tensors;
  for (const CatalogEntry& entry : TensorCatalog(TinyModel(), {.with_indexer = v32})) {
    if (!leave_out(entry.name)) tensors.push_back({entry.name, entry.shape, DType::kBF16});
  }
  tensors.insert(tensors.end(), more.begin(), more.end());
  auto plan = PlanShards(tensors, int64_t{1} << 30);
  CHECK_OK(plan.status());
  const std::string config = HfConfigText(
      {.model = TinyModel(), .architecture = v32 ? HfArchitecture::kV32 : HfArchitecture::kV31});
  auto writer = HfWriter::Create(directory, *std::move(plan), {.config_json = config});
  CHECK_OK(writer.status());
  for (const PlannedTensor& tensor : tensors) {
    CHECK_OK(writer->WriteRaw(tensor.name,
                              std::vector<uint8_t>(static_cast<size_t>(PlannedBytes(tensor)))));
  }
  CHECK_OK(writer->Finish());
}

bool Nothing(const std::string&) { return false; }

bool AnyContains(const std::vector<std::string>& lines, absl::string_view part) {
  return std::any_of(lines.begin(), lines.end(), [&](const std::string& line) {
    return line.find(std::string(part)) != std::string::npos;
  });
}

TEST(HfAccounting, AV31CheckpointLoadsAllAndInitialisesTheIndexers) {
  ScratchDirectory scratch;
  MakeCheckpoint(scratch.File("hf"));
  const Accounting accounting = AccountOf(scratch.File("hf"), TinyModel(), {.with_indexer = true});
  EXPECT_THAT(accounting.ToStatus("hf"), IsOk());
  EXPECT_EQ(accounting.initialised.size(), 3u * 5u);  // three layers, the MTP layer among them
  EXPECT_TRUE(AnyContains(accounting.initialised, "model.layers.2.self_attn.indexer.wk.weight"));
  ASSERT_EQ(accounting.ignored.size(), 2u);
  EXPECT_EQ(accounting.ignored[0].name, "model.layers.2.embed_tokens.weight");
  EXPECT_EQ(accounting.ignored[1].reason, "duplicate of lm_head.weight");
  const size_t all = TensorCatalog(TinyModel(), {.with_indexer = false}).size();
  EXPECT_EQ(accounting.loaded.size(), all - 2);
  // Without the indexer nothing is initialised.
  EXPECT_TRUE(AccountOf(scratch.File("hf"), TinyModel(), {}).initialised.empty());
}

TEST(HfAccounting, AV32CheckpointLoadsItsIndexers) {
  ScratchDirectory scratch;
  MakeCheckpoint(scratch.File("hf"), ExportDType::kBF16, HfArchitecture::kV32);
  const Accounting accounting = AccountOf(scratch.File("hf"), TinyModel(), {.with_indexer = true});
  EXPECT_THAT(accounting.ToStatus("hf"), IsOk());
  EXPECT_TRUE(accounting.initialised.empty());
  EXPECT_TRUE(AnyContains(accounting.loaded, "model.layers.0.self_attn.indexer.k_norm.bias"));
  // Dense training of it: the indexers are ignored, and said to be.
  const Accounting dense = AccountOf(scratch.File("hf"), TinyModel(), {});
  EXPECT_THAT(dense.ToStatus("hf"), IsOk());
  EXPECT_EQ(dense.ignored.size(), 2u + 15u);
}

TEST(HfAccounting, IgnoresRotaryTablesAndAnUnusedMtpLayerWithAReason) {
  ScratchDirectory scratch;
  WriteTensors(scratch.File("hf"), Nothing,
               {{"model.layers.0.self_attn.rotary_emb.inv_freq", {8}, DType::kF32}});
  ModelConfig model = TinyModel();
  model.num_nextn_predict_layers = 0;
  const Accounting accounting = AccountOf(scratch.File("hf"), model, {});
  EXPECT_THAT(accounting.ToStatus("hf"), IsOk());
  EXPECT_GT(accounting.ignored.size(), 20u);
  bool rotary = false, mtp = false;
  for (const Accounting::Ignored& ignored : accounting.ignored) {
    rotary = rotary || ignored.reason == "RoPE frequencies are computed";
    mtp = mtp || ignored.reason == "MTP layer; num_nextn_predict_layers is 0";
  }
  EXPECT_TRUE(rotary && mtp);
}

TEST(HfAccounting, MissingTensorsAreErrorsByName) {
  ScratchDirectory scratch;
  WriteTensors(
      scratch.File("hf"),
      [](const std::string& name) { return name == "model.layers.1.mlp.experts.3.up_proj.weight"; },
      {});
  const absl::Status status = AccountOf(scratch.File("hf"), TinyModel(), {}).ToStatus("loading hf");
  EXPECT_THAT(status,
              HasStatus(absl::StatusCode::kDataLoss,
                        "model.layers.1.mlp.experts.3.up_proj.weight [32, 160] is missing"));
  EXPECT_THAT(status, HasStatus(absl::StatusCode::kDataLoss, "loading hf: 1 tensor(s)"));
}

TEST(HfAccounting, AMissingMtpLayerIsOneLineWithTheWayOut) {
  ScratchDirectory scratch;
  WriteTensors(scratch.File("hf"),
               [](const std::string& name) { return name.find("model.layers.2.") == 0; }, {});
  const Accounting accounting = AccountOf(scratch.File("hf"), TinyModel(), {});
  ASSERT_EQ(accounting.errors.size(), 1u);
  EXPECT_NE(accounting.errors[0].find("set it to 0"), std::string::npos) << accounting.errors[0];
}

TEST(HfAccounting, DuplicatesMayBeAbsentButNotMisshapen) {
  ScratchDirectory scratch;
  const auto is_copy = [](const std::string& name) {
    return name == "model.layers.2.embed_tokens.weight" ||
           name == "model.layers.2.shared_head.head.weight";
  };
  WriteTensors(scratch.File("without"), is_copy, {});
  EXPECT_THAT(AccountOf(scratch.File("without"), TinyModel(), {}).ToStatus("hf"), IsOk());
  WriteTensors(scratch.File("odd"), is_copy,
               {{"model.layers.2.embed_tokens.weight", {96, 80}, DType::kBF16}});
  EXPECT_TRUE(AnyContains(AccountOf(scratch.File("odd"), TinyModel(), {}).errors,
                          "found [96, 80], config.json asks for [96, 160]"));
}

TEST(HfAccounting, UnknownMisshapenAndMistypedTensorsAreErrors) {
  ScratchDirectory scratch;
  const auto norm = [](const std::string& name) { return name == "model.norm.weight"; };
  const auto wk = [](const std::string& name) {
    return name == "model.layers.0.self_attn.indexer.wk.weight";
  };
  struct Case {
    std::function<bool(const std::string&)> leave_out;
    std::vector<PlannedTensor> more;
    bool v32;
    absl::string_view part;
  };
  const Case cases[] = {
      {Nothing,
       {{"model.layers.0.self_attn.o_proj.bias", {160}, DType::kBF16}},
       false,
       "o_proj.bias is no tensor of the model"},
      {Nothing,
       {{"model.layers.1.mlp.experts.4.up_proj.weight", {32, 160}, DType::kBF16}},
       false,
       "experts.4.up_proj.weight is no tensor of the model"},
      {norm,
       {{"model.norm.weight", {161}, DType::kBF16}},
       false,
       "model.norm.weight: found [161], config.json asks for [160]"},
      {norm, {{"model.norm.weight", {160}, DType::kI32}}, false, "found dtype I32"},
      {norm,
       {{"model.norm.weight", {160}, DType::kF32},
        {"model.norm.weight_scale_inv", {1}, DType::kF32}},
       false,
       "expected F8_E4M3 or no scale"},
      {wk, {}, true, "indexer.wk.weight [32, 160] is missing"},
  };
  int number = 0;
  for (const Case& c : cases) {
    const std::string directory = scratch.File(absl::StrCat("hf", number++));
    WriteTensors(directory, c.leave_out, c.more, c.v32);
    const Accounting accounting = AccountOf(directory, TinyModel(), {.with_indexer = c.v32});
    ASSERT_EQ(accounting.errors.size(), 1u) << c.part;
    EXPECT_TRUE(AnyContains(accounting.errors, c.part)) << accounting.errors[0];
  }
}

TEST(HfAccounting, OnlyTheMtpLayersIndexerMayBeAbsentFromAV32Checkpoint) {
  ScratchDirectory scratch;
  const auto indexer_of = [](absl::string_view layer) {
    return [layer](const std::string& name) {
      return name.find(absl::StrCat("model.layers.", layer, ".self_attn.indexer.")) == 0;
    };
  };
  WriteTensors(scratch.File("mtp"), indexer_of("2"), {}, true);
  const Accounting mtp = AccountOf(scratch.File("mtp"), TinyModel(), {.with_indexer = true});
  EXPECT_THAT(mtp.ToStatus("hf"), IsOk());
  EXPECT_EQ(mtp.initialised.size(), 5u);
  WriteTensors(scratch.File("main"), indexer_of("1"), {}, true);
  EXPECT_EQ(AccountOf(scratch.File("main"), TinyModel(), {.with_indexer = true}).errors.size(), 5u);
}

TEST(HfAccounting, Fp8WithoutQuantizationConfigIsAnError) {
  ScratchDirectory scratch;
  MakeCheckpoint(scratch.File("hf"));
  const std::string path = JoinPath(scratch.File("hf"), "config.json");
  WriteText(path, Replaced(ReadText(path), "\"quantization_config\"", "\"quantisation_notes\""));
  EXPECT_TRUE(AnyContains(AccountOf(scratch.File("hf"), TinyModel(), {}).errors,
                          "config.json has no quantization_config"));
}

}  // namespace
}  // namespace baleen
