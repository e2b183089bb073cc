// The model with its projections in block FP8 (simulated on the CPU): near full precision, the same
// bits however much is recomputed, and nothing changed where widths do not fit.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "kernels/core/random.h"
#include "tests/support/random_tensor.h"
#include "tests/trainer/model_rig.h"
#include "trainer/model/linear.h"

namespace baleen {
namespace {

using testing::Cosine;
using testing::ModelRig;
using testing::RigOptions;
using testing::SameBits;
using testing::TinyConfig;

// Every width a multiple of 16; every token chooses all experts, so that no rounding changes a
// choice.
ModelConfig FittingConfig() {
  ModelConfig c = TinyConfig();
  c.hidden_size = 160;
  c.intermediate_size = 144;
  c.moe_intermediate_size = 48;
  c.num_experts_per_tok = static_cast<int>(c.n_routed_experts);
  c.topk_group = c.n_group;
  c.q_lora_rank = 48;
  c.kv_lora_rank = 32;
  c.qk_nope_head_dim = c.qk_rope_head_dim = c.v_head_dim = 16;
  c.initializer_range = 0.08;
  return c;
}

// No projection has two widths that are multiples of 16.
ModelConfig UnfittingConfig() {
  ModelConfig c = TinyConfig();
  c.hidden_size = 40;
  c.q_lora_rank = c.kv_lora_rank = 24;
  return c;
}

struct Trained {
  std::unique_ptr<ModelRig> rig;
  double loss = 0;
};

Trained TrainOnce(const ModelConfig& config, GemmKind gemm, AttentionForm form,
                  RecomputeMode recompute = RecomputeMode::kNone) {
  RigOptions options;
  options.dtype = DType::kF32;
  options.model.gemm = gemm;
  options.model.attention = form;
  options.model.recompute = recompute;
  Trained trained;
  trained.rig = std::make_unique<ModelRig>(options, config, 11);
  const RandomStream random(5, NameStream("tokens"));
  std::vector<double> tokens(2 * 41);
  for (size_t i = 0; i < tokens.size(); ++i)
    tokens[i] = static_cast<double>(random.Integer(i) % 96);
  const Batch batch = trained.rig->BatchOf(tokens, 2);
  StepStats stats = trained.rig->NewStats();
  PassOptions pass;
  const auto rows = static_cast<double>(batch.num_rows());
  pass.scales = {.lm = 1 / rows, .mtp = 0.3 / rows, .kl = 0, .balance = 0.01};
  ModelPart::Saved saved;
  trained.rig->Train(batch, pass, stats, saved);
  trained.loss = stats.lm_loss_1.data<double>()[0] / rows;
  return trained;
}

// Calls function(name of the parameter, its gradient, that in the other run).
template <typename Function>
void ForGradients(const Trained& found, const Trained& expected, Function function) {
  for (const Parameter& p : found.rig->store_.parameters()) {
    if (!found.rig->store_.trains(p.id) || p.group == ParameterGroup::kIndexer) continue;
    function(p.name, found.rig->store_.grad(p.id),
             expected.rig->store_.grad(expected.rig->store_.Find(p.name)));
  }
}

TEST(Fp8Model, StaysNearFullPrecisionInLossAndGradients) {
  // Over all keys: a choice of keys changes by leaps.
  ModelConfig config = FittingConfig();
  config.index_topk = 41;
  for (const AttentionForm form :
       {AttentionForm::kDense, AttentionForm::kSparse, AttentionForm::kMaskedDense}) {
    const Trained full = TrainOnce(config, GemmKind::kCompute, form),
                  fp8 = TrainOnce(config, GemmKind::kFp8Block, form);
    EXPECT_NEAR(fp8.loss, full.loss, 0.02 * full.loss);
    EXPECT_NE(fp8.loss, full.loss);
    ForGradients(fp8, full,
                 [&](const std::string& name, const Tensor& grad, const Tensor& expected) {
                   EXPECT_GT(Cosine(grad, expected), 0.94) << name;
                   // E4M3 keeps 4 bits, and every gradient passes through rounded weights.
                   EXPECT_FALSE(SameBits(grad, expected)) << name;
                 });
  }
}

TEST(Fp8Model, GivesTheSameBitsHoweverMuchIsRecomputed) {
  for (const AttentionForm form : {AttentionForm::kDense, AttentionForm::kSparse}) {
    const Trained reference = TrainOnce(FittingConfig(), GemmKind::kFp8Block, form);
    for (const RecomputeMode mode : {RecomputeMode::kSelective, RecomputeMode::kFull}) {
      const Trained found = TrainOnce(FittingConfig(), GemmKind::kFp8Block, form, mode);
      EXPECT_EQ(found.loss, reference.loss);
      ForGradients(found, reference,
                   [](const std::string& name, const Tensor& grad, const Tensor& expected) {
                     EXPECT_TRUE(SameBits(grad, expected)) << name;
                   });
    }
  }
}

TEST(Fp8Model, ChangesNothingWhereNoWidthFits) {
  const Trained full = TrainOnce(UnfittingConfig(), GemmKind::kCompute, AttentionForm::kDense),
                fp8 = TrainOnce(UnfittingConfig(), GemmKind::kFp8Block, AttentionForm::kDense);
  EXPECT_EQ(fp8.loss, full.loss);
  ForGradients(fp8, full, [](const std::string& name, const Tensor& grad, const Tensor& expected) {
    EXPECT_TRUE(SameBits(grad, expected)) << name;
  });
}

TEST(Fp8Model, NamesTheProjectionsAndWhetherTheyFit) {
  const auto names = [](const ModelConfig& config, bool fits) {
    RigOptions options;
    std::vector<std::string> found;
    for (const ProjectionKind& kind : ProjectionKinds(ModelRig(options, config, 1).store_)) {
      if (kind.fits == fits) found.push_back(kind.name);
    }
    return found;
  };
  const auto all = ::testing::ElementsAre(
      "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "mlp.gate_proj",
      "mlp.up_proj", "mlp.down_proj", "mlp.experts.gate_proj", "mlp.experts.up_proj",
      "mlp.experts.down_proj", "mlp.shared_experts.gate_proj", "mlp.shared_experts.up_proj",
      "mlp.shared_experts.down_proj");
  EXPECT_THAT(names(FittingConfig(), true), all);
  EXPECT_THAT(names(UnfittingConfig(), false), all);
  EXPECT_TRUE(names(UnfittingConfig(), true).empty());
}

}  // namespace
}  // namespace baleen
