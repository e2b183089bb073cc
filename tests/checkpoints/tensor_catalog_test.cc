#include "checkpoints/tensor_catalog.h"

#include <map>

#include "checkpoints/fp8_blocks.h"
#include "checkpoints/hf_export.h"
#include "tests/checkpoints/hf_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

struct Totals {
  int64_t tensors = 0;
  int64_t bytes = 0;
  int64_t elements = 0;
  bool operator==(const Totals&) const = default;
};

enum class Norms { kF32, kBF16 };

Totals Count(const ModelConfig& model, CatalogOptions options, Norms norms) {
  Totals totals;
  for (const CatalogEntry& entry : TensorCatalog(model, options)) {
    const int64_t elements = NumElements(entry.shape);
    totals.tensors += 1;
    totals.elements += elements;
    if (entry.storage == TensorStorage::kF8Block) {
      const int64_t blocks = NumElements(Fp8ScaleShape(entry.shape));
      totals.tensors += 1;
      totals.elements += blocks;
      totals.bytes += elements + 4 * blocks;
    } else if (entry.storage == TensorStorage::kBF16) {
      totals.bytes += 2 * elements;
    } else {
      const bool narrow = entry.role == TensorRole::kNorm && norms == Norms::kBF16;
      totals.bytes += (narrow ? 2 : 4) * elements;
    }
  }
  return totals;
}

// The published checkpoints.
TEST(TensorCatalog, HasTheTensorsAndBytesOfThePublishedCheckpoints) {
  const ModelConfig model;
  EXPECT_EQ(Count(model, {.with_indexer = true}, Norms::kF32),
            (Totals{92'425, 689'471'107'200, 685'396'921'376}));
  const Totals v3 = Count(model, {.with_indexer = false}, Norms::kBF16);
  EXPECT_EQ(v3.tensors, 91'991);
  EXPECT_EQ(v3.bytes, 688'574'839'360);
  EXPECT_EQ(Count(model, {.with_indexer = false}, Norms::kF32).bytes, 688'576'928'320);
}

TEST(TensorCatalog, NamesAndShapesAreThoseOfTheTable) {
  std::map<std::string, CatalogEntry> entries;
  for (const CatalogEntry& entry : TensorCatalog(ModelConfig(), {.with_indexer = true})) {
    EXPECT_TRUE(entries.emplace(entry.name, entry).second) << entry.name;
  }
  struct Row {
    absl::string_view name;
    Shape shape;
    TensorStorage storage;
  };
  const Row rows[] = {
      {"model.embed_tokens.weight", {129280, 7168}, TensorStorage::kBF16},
      {"lm_head.weight", {129280, 7168}, TensorStorage::kBF16},
      {"model.norm.weight", {7168}, TensorStorage::kF32},
      {"model.layers.0.input_layernorm.weight", {7168}, TensorStorage::kF32},
      {"model.layers.60.post_attention_layernorm.weight", {7168}, TensorStorage::kF32},
      {"model.layers.0.self_attn.q_a_proj.weight", {1536, 7168}, TensorStorage::kF8Block},
      {"model.layers.0.self_attn.q_a_layernorm.weight", {1536}, TensorStorage::kF32},
      {"model.layers.0.self_attn.q_b_proj.weight", {24576, 1536}, TensorStorage::kF8Block},
      {"model.layers.9.self_attn.kv_a_proj_with_mqa.weight", {576, 7168}, TensorStorage::kF8Block},
      {"model.layers.9.self_attn.kv_a_layernorm.weight", {512}, TensorStorage::kF32},
      {"model.layers.9.self_attn.kv_b_proj.weight", {32768, 512}, TensorStorage::kF8Block},
      {"model.layers.9.self_attn.o_proj.weight", {7168, 16384}, TensorStorage::kF8Block},
      {"model.layers.61.self_attn.indexer.wq_b.weight", {8192, 1536}, TensorStorage::kF8Block},
      {"model.layers.61.self_attn.indexer.wk.weight", {128, 7168}, TensorStorage::kF8Block},
      {"model.layers.0.self_attn.indexer.k_norm.weight", {128}, TensorStorage::kF32},
      {"model.layers.0.self_attn.indexer.k_norm.bias", {128}, TensorStorage::kF32},
      {"model.layers.0.self_attn.indexer.weights_proj.weight", {64, 7168}, TensorStorage::kBF16},
      {"model.layers.2.mlp.gate_proj.weight", {18432, 7168}, TensorStorage::kF8Block},
      {"model.layers.2.mlp.down_proj.weight", {7168, 18432}, TensorStorage::kF8Block},
      {"model.layers.3.mlp.gate.weight", {256, 7168}, TensorStorage::kBF16},
      {"model.layers.3.mlp.gate.e_score_correction_bias", {256}, TensorStorage::kF32},
      {"model.layers.3.mlp.experts.255.up_proj.weight", {2048, 7168}, TensorStorage::kF8Block},
      {"model.layers.61.mlp.shared_experts.down_proj.weight",
       {7168, 2048},
       TensorStorage::kF8Block},
      {"model.layers.61.embed_tokens.weight", {129280, 7168}, TensorStorage::kBF16},
      {"model.layers.61.shared_head.head.weight", {129280, 7168}, TensorStorage::kBF16},
      {"model.layers.61.shared_head.norm.weight", {7168}, TensorStorage::kF32},
      {"model.layers.61.enorm.weight", {7168}, TensorStorage::kF32},
      {"model.layers.61.hnorm.weight", {7168}, TensorStorage::kF32},
      {"model.layers.61.eh_proj.weight", {7168, 14336}, TensorStorage::kBF16},
  };
  for (const Row& row : rows) {
    const auto found = entries.find(std::string(row.name));
    ASSERT_NE(found, entries.end()) << row.name;
    EXPECT_EQ(found->second.shape, row.shape) << row.name;
    EXPECT_EQ(found->second.storage, row.storage) << row.name;
  }
  EXPECT_EQ(entries["model.layers.61.embed_tokens.weight"].duplicate_of,
            "model.embed_tokens.weight");
  EXPECT_EQ(entries["model.layers.61.shared_head.head.weight"].duplicate_of, "lm_head.weight");
  EXPECT_TRUE(entries["model.layers.0.self_attn.indexer.k_norm.bias"].indexer);
  EXPECT_EQ(entries.count("model.layers.2.mlp.gate.weight"), 0u);
  EXPECT_EQ(entries.count("model.layers.62.input_layernorm.weight"), 0u);
}

TEST(TensorCatalog, LeavesOutWhatTheModelLacks) {
  ModelConfig model = testing::TinyModel();
  model.num_nextn_predict_layers = 0;
  model.n_shared_experts = 0;
  for (const CatalogEntry& entry : TensorCatalog(model, {.with_indexer = false})) {
    EXPECT_EQ(entry.name.find("model.layers.2."), std::string::npos) << entry.name;
    EXPECT_EQ(entry.name.find("shared_experts"), std::string::npos) << entry.name;
    EXPECT_EQ(entry.name.find("indexer"), std::string::npos) << entry.name;
  }
}

TEST(TensorCatalog, CountsParametersAsThePublisherDoes) {
  const ParameterCount count = CountParameters(ModelConfig(), {.with_indexer = true});
  EXPECT_NEAR(static_cast<double>(count.main), 671.0e9, 0.1e9);
  EXPECT_NEAR(static_cast<double>(count.active), 37.5e9, 0.1e9);
  EXPECT_NEAR(static_cast<double>(count.mtp), 11.5e9, 0.15e9);
  // 62 x (8192 x 1536 + 128 x 7168 + 2 x 128 + 64 x 7168)
  EXPECT_EQ(count.indexer, 62 * (8192 * 1536 + 128 * 7168 + 2 * 128 + 64 * 7168));
}

TEST(TensorCatalog, ScaleNamesGoBothWays) {
  EXPECT_EQ(ScaleName("a.b.weight"), "a.b.weight_scale_inv");
  EXPECT_EQ(WeightOfScale("a.b.weight_scale_inv"), "a.b.weight");
  EXPECT_EQ(WeightOfScale("a.b.weight"), std::nullopt);
}

TEST(TensorCatalog, RefusesModelsBeyondEveryMachineWithoutBuildingThem) {
  constexpr absl::StatusCode kConfig = absl::StatusCode::kInvalidArgument;
  EXPECT_THAT(CheckModelSize(ModelConfig(), "m"), testing::IsOk());
  ModelConfig many;
  many.num_hidden_layers = (int64_t{1} << 31) - 1;
  many.n_routed_experts = (int64_t{1} << 31) - 8;
  EXPECT_THAT(CheckModelSize(many, "m"), testing::HasStatus(kConfig, "tensors, the limit"));
  ModelConfig wide;
  wide.hidden_size = wide.vocab_size = (int64_t{1} << 31) - 1;
  EXPECT_THAT(CheckModelSize(wide, "m"), testing::HasStatus(kConfig, "parameters, the limit"));
  EXPECT_THAT(PlanExport({.model = wide}), testing::HasStatus(kConfig, "parameters, the limit"));
}

}  // namespace
}  // namespace baleen
