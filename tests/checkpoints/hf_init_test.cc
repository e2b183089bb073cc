#include "checkpoints/hf_init.h"

#include <cmath>

#include "tests/checkpoints/hf_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::MakeCheckpoint;
using testing::ReadAll;
using testing::ReadFloats;
using testing::ScratchDirectory;
using testing::TinyModel;

CatalogEntry Entry(const std::string& name) {
  for (const CatalogEntry& entry : TensorCatalog(TinyModel(), {.with_indexer = true})) {
    if (entry.name == name) return entry;
  }
  CHECK(false) << name;
  return {};
}

std::vector<double> Initial(const CatalogEntry& entry, const InitOptions& options, const Box& box) {
  std::vector<double> values(static_cast<size_t>(NumElements(box.extent)));
  FillInitial(entry, options, box, DType::kF64, values.data());
  return values;
}

TEST(HfInit, WeightsAreNormalWithTheAskedDeviation) {
  const CatalogEntry entry = Entry("lm_head.weight");
  const std::vector<double> values =
      Initial(entry, {.seed = 3, .standard_deviation = 0.006}, WholeBox(entry.shape));
  double sum = 0, squares = 0;
  for (const double value : values) {
    sum += value;
    squares += value * value;
  }
  const double count = static_cast<double>(values.size());  // 15,360: 4 standard errors below
  EXPECT_NEAR(sum / count, 0, 4 * 0.006 / std::sqrt(count));
  EXPECT_NEAR(std::sqrt(squares / count), 0.006, 4 * 0.006 / std::sqrt(2 * count));
}

TEST(HfInit, NormsAreOneAndBiasesZero) {
  for (const auto& [name, expected] : {std::pair<const char*, double>{"model.norm.weight", 1},
                                       {"model.layers.0.self_attn.indexer.k_norm.weight", 1},
                                       {"model.layers.0.self_attn.indexer.k_norm.bias", 0},
                                       {"model.layers.1.mlp.gate.e_score_correction_bias", 0}}) {
    const CatalogEntry entry = Entry(name);
    for (const double value : Initial(entry, {.seed = 3}, WholeBox(entry.shape))) {
      EXPECT_EQ(value, expected) << name;
    }
  }
}

TEST(HfInit, AnyBoxOfATensorHoldsTheValuesOfTheWhole) {
  const CatalogEntry entry = Entry("model.layers.1.self_attn.indexer.wq_b.weight");
  const std::vector<double> whole = Initial(entry, {.seed = 5}, WholeBox(entry.shape));
  const Box box = {{30, 7}, {50, 11}};
  const std::vector<double> part = Initial(entry, {.seed = 5}, box);
  for (int64_t r = 0; r < 50; ++r) {
    for (int64_t c = 0; c < 11; ++c) {
      ASSERT_EQ(part[static_cast<size_t>(r * 11 + c)],
                whole[static_cast<size_t>((30 + r) * entry.shape[1] + 7 + c)]);
    }
  }
  EXPECT_NE(Initial(entry, {.seed = 6}, box), part);
  EXPECT_NE(Initial(Entry("model.layers.0.self_attn.indexer.wq_b.weight"), {.seed = 5}, box), part);
}

TEST(HfInit, MakesACompleteCheckpointThatIsAFunctionOfTheSeed) {
  ScratchDirectory scratch;
  for (const char* name : {"a", "b"}) MakeCheckpoint(scratch.File(name));
  EXPECT_EQ(ReadAll(scratch.File("a")), ReadAll(scratch.File("b")));
  ASSERT_THAT(InitHfCheckpoint({.model = TinyModel(), .init = {.seed = 8}}, scratch.File("c")),
              IsOk());
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint a, HfCheckpoint::Open(scratch.File("a")));
  ASSERT_OK_AND_ASSIGN(const HfCheckpoint c, HfCheckpoint::Open(scratch.File("c")));
  EXPECT_THAT(a.Account(a.config(), {}).ToStatus("a"), IsOk());
  EXPECT_FALSE(a.config().has_indexer);
  EXPECT_TRUE(a.hf_config().fp8);
  EXPECT_NE(ReadFloats(a, "lm_head.weight"), ReadFloats(c, "lm_head.weight"));
  EXPECT_EQ(*a.RawBytes("model.layers.2.embed_tokens.weight"),
            *a.RawBytes("model.embed_tokens.weight"));
}

TEST(HfInit, RefusesAnImpossibleModelBeforeWriting) {
  ScratchDirectory scratch;
  ModelConfig model = TinyModel();
  model.n_group = 3;
  EXPECT_THAT(InitHfCheckpoint({.model = model}, scratch.File("x")),
              HasStatus(absl::StatusCode::kInvalidArgument, "n_group = 3"));
  EXPECT_TRUE(scratch.List().empty());
}

}  // namespace
}  // namespace baleen
