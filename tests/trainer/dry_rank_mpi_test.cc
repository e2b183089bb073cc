// The plan is what happens: real training steps of a small model on real ranks hold, rank by rank
// and use by use, what a dry rank says; and the pretended grid is the real one.
//
// The model routes every token to all of its experts, so that the real load is as balanced as the
// planned one.
#include <gtest/gtest.h>
#include <unistd.h>

#include <filesystem>

#include "data/indexed_tokens_writer.h"
#include "parallel/agree.h"
#include "parallel/mpi_communicator.h"
#include "parallel/pipeline_engine.h"
#include "tests/support/status_matchers.h"
#include "tests/trainer/model_rig.h"
#include "trainer/dry_rank.h"
#include "trainer/step.h"

namespace baleen::testing {
namespace {

struct Layout {
  const char* name;
  int ranks;
  int64_t tensor, context, pipeline, expert;
  ScheduleName schedule = ScheduleName::k1F1B;
  Recompute recompute = Recompute::kNone;
  int64_t expert_node_size = 0;
};

ModelConfig Model() {
  ModelConfig c = TinyConfig();
  c.num_hidden_layers = 8;
  c.hidden_size = 64;
  c.num_attention_heads = 4;
  c.q_lora_rank = 32;
  c.kv_lora_rank = 32;
  c.vocab_size = 256;
  c.n_routed_experts = c.num_experts_per_tok = 8;
  c.n_group = c.topk_group = 1;
  c.index_n_heads = 2;
  c.index_head_dim = 16;
  c.index_topk = 12;
  return c;
}

StageConfig Stage(const Layout& layout, AttentionMode attention, TrainMode train) {
  StageConfig stage = DefaultStageConfig();
  stage.name = layout.name;
  stage.attention = attention;
  stage.train = train;
  stage.steps = 1;
  stage.micro_batch_size = 1;
  stage.global_batch_size = 8;
  stage.data.seq_length = 128;
  stage.losses.balance = 1e-3;
  stage.optimizer.lr = 1e-3;
  stage.recompute = layout.recompute;
  ParallelismConfig& p = stage.parallelism;
  p.tensor = layout.tensor;
  p.context = layout.context;
  p.pipeline = layout.pipeline;
  p.expert = layout.expert;
  p.schedule = layout.schedule;
  if (layout.expert_node_size > 0) p.expert_node_size = layout.expert_node_size;
  return stage;
}

class DryRankTest : public ::testing::Test {
 protected:
  DryRankTest() {
    directory_ = BroadcastString(
        *world_, "directory",
        (std::filesystem::temp_directory_path() / absl::StrCat("baleen-plan-", ::getpid()))
            .string(),
        0);
    absl::Status status;
    if (world_->rank() == 0) status = WriteTokens();
    EXPECT_THAT(Agree(*world_, status), IsOk());
  }
  ~DryRankTest() override {
    world_->Barrier("done");
    if (world_->rank() == 0) std::filesystem::remove_all(directory_);
  }

  absl::Status WriteTokens() {
    ASSIGN_OR_RETURN(IndexedTokensWriter writer,
                     IndexedTokensWriter::Create(directory_ + "/tokens", TokenType::kInt32));
    std::vector<int32_t> tokens(128 * 40);
    for (size_t i = 0; i < tokens.size(); ++i) tokens[i] = static_cast<int32_t>(i * 7 % 250);
    RETURN_IF_ERROR(writer.AddDocument(tokens));
    return writer.Finish();
  }

  // A step on the first ranks of the world, against the plan of each.
  void Compare(const Layout& layout, AttentionMode attention, TrainMode train) {
    const int color = world_->rank() < layout.ranks ? 0 : 1;
    const auto ranks = world_->Split(color, world_->rank(), "job");
    if (color == 1) return;
    SCOPED_TRACE(layout.name);
    StageConfig config = Stage(layout, attention, train);
    config.data.train = {{directory_ + "/tokens", 1.0}};
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<TrainingStage> stage,
                         TrainingStage::Make(RunSection(), config, Model(), *ranks));
    const std::map<std::string, MemoryUse> between = stage->context().pool().Uses();
    ASSERT_THAT(TrainStep(*stage, StepPosition(), 1e-3, false), IsOk());
    ASSERT_OK_AND_ASSIGN(const CheckedSchedule schedule,
                         MakeCheckedSchedule(stage->layout().schedule));
    const RankPlan plan = RunDry({config, stage->model_config(), stage->recipe(), stage->layout(),
                                  schedule.schedule, stage->dtype(), ranks->rank()});
    for (const auto& [use, real] : stage->context().pool().Uses()) {
      ASSERT_TRUE(plan.uses.count(use)) << use;
      // A plan reserves the panels of a block of rows that sees all keys; here some ranks have
      // none.
      if (use == "matmul panels") {
        EXPECT_LE(real.peak_bytes, plan.uses.at(use).peak_bytes);
        continue;
      }
      ExpectWithin2Percent(plan.uses.at(use).peak_bytes, real.peak_bytes, use);
    }
    for (const auto& [use, real] : between) {
      EXPECT_EQ(plan.uses.at(use).bytes, real.bytes) << use << " between steps";
    }
    ExpectWithin2Percent(plan.total.peak_bytes, stage->context().pool().Total().peak_bytes,
                         "total");
  }

  static void ExpectWithin2Percent(int64_t planned, int64_t real, const std::string& what) {
    EXPECT_LE(std::abs(static_cast<double>(planned - real)), 0.02 * static_cast<double>(real))
        << what << ": planned " << planned << ", real " << real;
  }

  std::unique_ptr<Communicator> world_ = WrapMpiWorld();
  std::string directory_;
};

const Layout kLayouts[] = {
    {"one rank", 1, 1, 1, 1, 1},
    {"one rank, full recompute", 1, 1, 1, 1, 1, ScheduleName::k1F1B, Recompute::kFull},
    {"tp 2", 2, 2, 1, 1, 1, ScheduleName::k1F1B, Recompute::kSelective},
    {"cp 2", 2, 1, 2, 1, 1},
    {"dp 4, ep 4", 4, 1, 1, 1, 4},
    {"dp 4, ep 4 in nodes of 2", 4, 1, 1, 1, 4, ScheduleName::k1F1B, Recompute::kNone, 2},
    {"pp 4", 4, 1, 1, 4, 1},
    {"pp 4, zb_h1", 4, 1, 1, 4, 1, ScheduleName::kZbH1, Recompute::kSelective},
    {"pp 2, interleaved", 2, 1, 1, 2, 1, ScheduleName::kInterleaved},
    {"pp 2, zbv", 2, 1, 1, 2, 1, ScheduleName::kZbv, Recompute::kFull},
    {"pp 2, dualpipev", 2, 1, 1, 2, 1, ScheduleName::kDualPipeV},
    {"tp 2, cp 2, pp 2, ep 4", 8, 2, 2, 2, 4, ScheduleName::k1F1B, Recompute::kSelective},
    {"cp 2, pp 2, ep 2, dp 2", 8, 1, 2, 2, 2, ScheduleName::kGpipe},
};

TEST_F(DryRankTest, SparseTrainingHoldsWhatThePlanSays) {
  for (const Layout& layout : kLayouts) Compare(layout, AttentionMode::kSparse, TrainMode::kAll);
}

TEST_F(DryRankTest, DenseTrainingHoldsWhatThePlanSays) {
  for (const Layout& layout : kLayouts) Compare(layout, AttentionMode::kDense, TrainMode::kAll);
}

TEST_F(DryRankTest, WarmUpHoldsWhatThePlanSays) {
  for (const Layout& layout : kLayouts) {
    Compare(layout, AttentionMode::kDense, TrainMode::kIndexer);
  }
}

}  // namespace
}  // namespace baleen::testing
