// A training step whose indexer multiplies E4M3 codes, on one GPU: it chooses the same keys however
// activations are kept, and learns what the rounded values say.
#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops/indexer/indexer_scores.h"
#include "tests/cuda/gpu.h"
#include "tests/cuda/layout_case_support.h"
#include "tests/cuda/nccl_world_support.h"
#include "tests/support/status_matchers.h"

namespace baleen::testing {
namespace {

RigCase Fp8Case(Recompute recompute) {
  RigCase c = MakeGpuCase(RecipeKind::kSparse, Layout{});
  c.stage.dsa.indexer_dtype = IndexerDType::kFp8;
  c.stage.recompute = recompute;
  return c;
}

StepOutcome StepOf(const RigCase& c, DType dtype, ChoiceReplay* replay = nullptr) {
  auto outcome = RunOneStep(
      c, GpuSelf(), {.context = Gpu(), .dtype = dtype, .bf16_weights = true, .replay = replay});
  CHECK_OK(outcome.status());
  return *std::move(outcome);
}

TEST(CudaIndexerFp8Step, ChoosesTheSameKeysWhateverIsComputedAgain) {
  const RigCase whole = Fp8Case(Recompute::kNone);
  ASSERT_TRUE(
      HasFp8IndexerScores(DType::kBF16, whole.model.index_n_heads, whole.model.index_head_dim));
  const StepOutcome kept = StepOf(whole, DType::kBF16);
  for (const Recompute recompute : {Recompute::kSelective, Recompute::kFull}) {
    const StepOutcome again = StepOf(Fp8Case(recompute), DType::kBF16);
    EXPECT_EQ(again.selection_hash, kept.selection_hash);
    EXPECT_EQ(again.lm_loss, kept.lm_loss);
    // A full recompute makes the chosen keys' scores of the rounded values, in bf16.
    for (size_t layer = 0; layer < kept.kl.size(); ++layer)
      EXPECT_NEAR(again.kl[layer], kept.kl[layer], 1e-3 * kept.kl[layer]) << layer;
    EXPECT_NEAR(again.norm_indexer, kept.norm_indexer, 2e-2 * kept.norm_indexer);
  }
}

// fp32 activations have no kernel for codes: the rounded values are multiplied. Given one's keys,
// both learn the same but for bf16.
TEST(CudaIndexerFp8Step, LearnsWhatTheRoundedValuesSay) {
  const RigCase c = Fp8Case(Recompute::kNone);
  ChoiceReplay choices;
  choices.set_mode(ChoiceReplay::Mode::kRecord);
  const StepOutcome codes = StepOf(c, DType::kBF16, &choices);
  choices.set_mode(ChoiceReplay::Mode::kReplay);
  const StepOutcome values = StepOf(c, DType::kF32, &choices);
  EXPECT_NEAR(codes.lm_loss, values.lm_loss, 1e-2 * values.lm_loss);
  EXPECT_NEAR(codes.norm_indexer, values.norm_indexer, 5e-2 * values.norm_indexer);
  for (size_t layer = 0; layer < values.kl.size(); ++layer)
    EXPECT_NEAR(codes.kl[layer], values.kl[layer], 5e-2 * values.kl[layer]) << layer;
}

}  // namespace
}  // namespace baleen::testing
