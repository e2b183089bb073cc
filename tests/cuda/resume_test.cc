// A training that stops and resumes on the GPU goes on with the same bits: losses, norms, selected
// keys, masters and moments, as if it had not stopped.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <optional>

#include "data/build.h"
#include "parallel/agree.h"
#include "tests/cuda/gpu.h"
#include "tests/cuda/nccl_world_support.h"
#include "tests/support/random_tensor.h"
#include "tests/support/status_matchers.h"
#include "trainer/step.h"
#include "trainer/train_state.h"

namespace baleen::testing {
namespace {

constexpr int64_t kBefore = 2;  // steps before the state is saved
constexpr int64_t kAfter = 2;
constexpr double kLr = 1e-2;

constexpr char kModel[] = R"(vocab_size: 264
hidden_size: 128
num_hidden_layers: 3
first_k_dense_replace: 1
num_nextn_predict_layers: 1
intermediate_size: 128
moe_intermediate_size: 64
n_routed_experts: 8
n_shared_experts: 1
num_experts_per_tok: 2
n_group: 4
topk_group: 2
num_attention_heads: 8
q_lora_rank: 64
kv_lora_rank: 512
qk_nope_head_dim: 128
qk_rope_head_dim: 64
v_head_dim: 128
max_position_embeddings: 256
initializer_range: 0.08
)";

StageConfig MakeStage(TrainMode train, AttentionKernel kernel, int ranks, const std::string& data) {
  StageConfig stage = DefaultStageConfig();
  stage.name = "resumed";
  stage.attention = train == TrainMode::kIndexer ? AttentionMode::kDense : AttentionMode::kSparse;
  stage.train = train;
  stage.dsa.kernel = kernel;
  stage.steps = kBefore + kAfter;
  stage.micro_batch_size = 1;
  stage.global_batch_size = ranks == 3 ? 6 : 8;
  stage.data.seq_length = 128;
  stage.data.train = {{.path = data, .weight = 1}};
  stage.data.validation.clear();
  stage.dsa.index_topk = 32;
  stage.dsa.index_n_heads = 64;
  stage.dsa.index_head_dim = 128;
  stage.router.bias_update_speed = 1e-2;
  ParallelismConfig& p = stage.parallelism;
  p.tensor = ranks % 2 == 0 ? 2 : 1;
  p.pipeline = ranks % 4 == 0 ? 2 : 1;
  p.expert = p.tensor;
  p.schedule = p.pipeline > 1 ? ScheduleName::kZbH1 : ScheduleName::k1F1B;
  return stage;
}

// What the trained weights are on this rank, bit for bit.
std::vector<Tensor> TrainingState(TrainingStage& stage) {
  std::vector<Tensor> state;
  for (const OptimizerShard& shard : stage.optimizer().shards()) {
    if (!shard.trains()) continue;
    for (const Tensor& tensor : {shard.master, shard.m, shard.v}) state.push_back(OnHost(tensor));
  }
  for (int id = 0; id < stage.parameters().size(); ++id)
    state.push_back(OnHost(stage.parameters().value(id)));
  return state;
}

class ResumeOnRanks : public ::testing::Test {
 protected:
  void SetUp() override {
    char name[] = "/tmp/baleen_resume_XXXXXX";
    if (GpuWorld().rank() == 0) ASSERT_NE(::mkdtemp(name), nullptr);
    directory_ = BroadcastString(GpuWorld(), "directory", name, 0);
    if (GpuWorld().rank() == 0) {
      std::string text;
      for (int i = 0; i < 4000; ++i) absl::StrAppend(&text, i * 7919 % 1000, " ");
      ASSERT_THAT(WriteFileDurably(Path("text.txt"), text), IsOk());
      ASSERT_THAT(WriteFileDurably(Path("model.yaml"), kModel), IsOk());
      BuildOptions build;
      build.documents.inputs = {Path("text.txt")};
      build.prefix = Path("tokens");
      ASSERT_THAT(BuildTokens(build).status(), IsOk());
    }
    GpuWorld().Barrier("inputs");
    run_.seed = 5;
  }
  void TearDown() override {
    GpuWorld().Barrier("all done");
    if (GpuWorld().rank() == 0) std::filesystem::remove_all(directory_);
  }

  std::string Path(const std::string& name) const { return JoinPath(directory_, name); }

  std::unique_ptr<TrainingStage> Make(const StageConfig& config) {
    auto stage = TrainingStage::Make(run_, config, source_->config(), GpuWorld(), Gpu());
    CHECK_OK(stage.status());
    return *std::move(stage);
  }

  static std::vector<StepResult> Train(TrainingStage& stage, int64_t begin, int64_t end) {
    std::vector<StepResult> results;
    for (int64_t step = begin; step < end; ++step) {
      const int64_t samples = step * stage.config().global_batch_size;
      auto result = TrainStep(stage, {step, samples}, kLr, /*measure_indexer=*/false);
      CHECK_OK(result.status());
      EXPECT_FALSE(result->skipped);
      results.push_back(*std::move(result));
    }
    return results;
  }

  void Save(TrainingStage& stage, const ChangedParameters& changed) {
    SaveRequest request;
    request.directory = Path("checkpoints");
    request.stage_name = stage.config().name;
    request.position.step = request.position.stage_step = kBefore;
    request.position.consumed_samples = kBefore * stage.config().global_batch_size;
    request.seed = run_.seed;
    request.identity = {{"run.seed", absl::StrCat(run_.seed)}};
    auto saved = SaveTrainState(stage, *source_, changed, request);
    CHECK_OK(saved.status());
    saved_ = *saved;
  }

  void CheckResume(TrainMode train, AttentionKernel kernel) {
    const StageConfig config = MakeStage(train, kernel, GpuWorld().size(), Path("tokens"));
    ASSERT_OK_AND_ASSIGN(WeightSource source, WeightSource::Open({.checkpoint = std::nullopt,
                                                                  .config = Path("model.yaml")},
                                                                 config.dsa, run_.seed));
    source_.emplace(std::move(source));
    std::vector<StepResult> straight;
    std::vector<Tensor> expected;
    {
      const auto stage = Make(config);
      ChangedParameters changed;
      ASSERT_THAT(LoadStage(*stage, *source_, nullptr, false, changed), IsOk());
      Train(*stage, 0, kBefore);
      Save(*stage, changed);
      straight = Train(*stage, kBefore, kBefore + kAfter);
      expected = TrainingState(*stage);
    }
    ASSERT_OK_AND_ASSIGN(StateReader state, OpenState(saved_, GpuWorld()));
    const auto stage = Make(config);
    ChangedParameters changed;
    ASSERT_THAT(LoadStage(*stage, *source_, &state, true, changed), IsOk());
    const std::vector<StepResult> resumed = Train(*stage, kBefore, kBefore + kAfter);
    for (int64_t step = 0; step < kAfter; ++step) {
      SCOPED_TRACE(absl::StrCat("step ", step, " after the resumption"));
      const StepResult &a = straight[step], &b = resumed[step];
      EXPECT_EQ(a.lm_loss, b.lm_loss);
      EXPECT_EQ(a.mtp_loss, b.mtp_loss);
      EXPECT_EQ(a.balance_loss, b.balance_loss);
      EXPECT_EQ(a.indexer_kl_per_layer, b.indexer_kl_per_layer);
      EXPECT_EQ(a.grad_norm_main, b.grad_norm_main);
      EXPECT_EQ(a.grad_norm_indexer, b.grad_norm_indexer);
      EXPECT_EQ(a.selection_hash, b.selection_hash);
      EXPECT_EQ(a.expert_load, b.expert_load);
    }
    // The weights moved, so that equal losses say something.
    EXPECT_NE(straight[0].indexer_kl_per_layer, straight[1].indexer_kl_per_layer);
    const std::vector<Tensor> found = TrainingState(*stage);
    ASSERT_EQ(found.size(), expected.size());
    for (size_t i = 0; i < found.size(); ++i) EXPECT_TRUE(SameBits(found[i], expected[i])) << i;
  }

  RunSection run_;
  std::string directory_, saved_;
  std::optional<WeightSource> source_;
};

TEST_F(ResumeOnRanks, TheWarmUpGoesOnBitForBit) {
  CheckResume(TrainMode::kIndexer, AttentionKernel::kSparse);
}

TEST_F(ResumeOnRanks, SparseTrainingGoesOnBitForBit) {
  CheckResume(TrainMode::kAll, AttentionKernel::kSparse);
}

TEST_F(ResumeOnRanks, MaskedTrainingGoesOnBitForBit) {
  CheckResume(TrainMode::kAll, AttentionKernel::kMaskedDense);
}

}  // namespace
}  // namespace baleen::testing
