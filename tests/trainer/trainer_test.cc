// The trainer's parts that need no model: schedules, recipes, FLOPs, arguments, exit codes.
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "kernels/core/file.h"
#include "parallel/schedule.h"
#include "tests/support/status_matchers.h"
#include "tests/support/temporary_directory.h"
#include "tests/trainer/model_rig.h"
#include "trainer/arguments.h"
#include "trainer/checkpoint_path.h"
#include "trainer/exit_code.h"
#include "trainer/flops.h"
#include "trainer/lr_schedule.h"
#include "trainer/optimizer.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::TemporaryDirectory;
using testing::TinyConfig;

StageConfig Stage(AttentionMode attention, TrainMode train) {
  StageConfig stage = DefaultStageConfig();
  stage.name = "test";
  stage.attention = attention;
  stage.train = train;
  stage.steps = 100;
  stage.global_batch_size = 4;
  stage.data.seq_length = 128;
  stage.optimizer.lr = 1e-3;
  return stage;
}

TEST(LearningRate, WarmsUpLinearlyThenStaysOrDecays) {
  StageConfig stage = Stage(AttentionMode::kDense, TrainMode::kAll);
  stage.lr_schedule.warmup_steps = 10;
  stage.lr_schedule.style = LrStyle::kConstant;
  EXPECT_DOUBLE_EQ(LearningRate(stage, 0), 1e-4);
  EXPECT_DOUBLE_EQ(LearningRate(stage, 9), 1e-3);
  EXPECT_DOUBLE_EQ(LearningRate(stage, 99), 1e-3);
  stage.lr_schedule.style = LrStyle::kLinear;
  stage.lr_schedule.min_lr = 1e-4;
  EXPECT_DOUBLE_EQ(LearningRate(stage, 10), 1e-3);
  EXPECT_DOUBLE_EQ(LearningRate(stage, 55), 5.5e-4);
  EXPECT_NEAR(LearningRate(stage, 1000), 1e-4, 1e-18);
  stage.lr_schedule.style = LrStyle::kCosine;
  EXPECT_DOUBLE_EQ(LearningRate(stage, 55), 5.5e-4);
  stage.lr_schedule.decay_steps = 45;
  EXPECT_NEAR(LearningRate(stage, 55), 1e-4, 1e-18);
}

TEST(Recipe, WarmUpTrainsTheIndexerAloneAndHasNoLanguageLoss) {
  ASSERT_OK_AND_ASSIGN(const Recipe recipe,
                       MakeRecipe(Stage(AttentionMode::kDense, TrainMode::kIndexer), TinyConfig()));
  EXPECT_TRUE(recipe.forward_only);
  EXPECT_FALSE(recipe.language_loss);
  EXPECT_EQ(recipe.trained, std::vector<ParameterGroup>{ParameterGroup::kIndexer});
  EXPECT_EQ(recipe.options.indexer_loss, IndexerLossKind::kDense);
  EXPECT_EQ(recipe.bias_update_speed, 0);
}

TEST(Recipe, DenseTrainingKnowsNoIndexer) {
  ASSERT_OK_AND_ASSIGN(const Recipe recipe,
                       MakeRecipe(Stage(AttentionMode::kDense, TrainMode::kAll), TinyConfig()));
  EXPECT_FALSE(recipe.use_indexer);
  EXPECT_EQ(recipe.options.indexer_loss, IndexerLossKind::kNone);
}

TEST(Recipe, RefusesToTrainOnlyTheIndexerUnderSparseAttention) {
  EXPECT_THAT(MakeRecipe(Stage(AttentionMode::kSparse, TrainMode::kIndexer), TinyConfig()),
              HasStatus(absl::StatusCode::kInvalidArgument, "is not a recipe"));
}

TEST(Recipe, ChoosesTheCheaperKernelOnBothSidesOfTheCrossover) {
  StageConfig stage = Stage(AttentionMode::kSparse, TrainMode::kAll);
  ModelConfig model;  // V3.2: 320 a key masked, 1088 absorbed; equal at 2 * 2048 * 1088 / 320 =
                      // 13926 tokens
  stage.data.seq_length = 13924;
  ASSERT_OK_AND_ASSIGN(const Recipe below, MakeRecipe(stage, model));
  EXPECT_EQ(below.options.attention, AttentionForm::kMaskedDense) << below.kernel;
  stage.data.seq_length = 13926;
  ASSERT_OK_AND_ASSIGN(const Recipe above, MakeRecipe(stage, model));
  EXPECT_EQ(above.options.attention, AttentionForm::kSparse) << above.kernel;
  stage.dsa.kernel = AttentionKernel::kMaskedDense;
  ASSERT_OK_AND_ASSIGN(const Recipe asked, MakeRecipe(stage, model));
  EXPECT_EQ(asked.options.attention, AttentionForm::kMaskedDense);
}

// On a GPU the kernels' speeds decide.
TEST(Recipe, ChoosesByMeasuredSpeedOnAGpu) {
  StageConfig stage = Stage(AttentionMode::kSparse, TrainMode::kAll);
  const auto form_at = [&](const ModelConfig& model, int64_t seq_length) {
    stage.data.seq_length = seq_length;
    const absl::StatusOr<Recipe> recipe = MakeRecipe(stage, model, DeviceKind::kCuda);
    EXPECT_TRUE(recipe.ok()) << recipe.status();
    SCOPED_TRACE(recipe->kernel);
    return recipe->options.attention;
  };
  // Both on tensor cores. 2048 and fewer keys: all of them are selected, and the masked form has a
  // third of the work.
  const ModelConfig model;
  stage.recompute = Recompute::kNone;
  EXPECT_EQ(form_at(model, 2048), AttentionForm::kMaskedDense);
  EXPECT_EQ(form_at(model, 12288), AttentionForm::kMaskedDense);
  EXPECT_EQ(form_at(model, 15360), AttentionForm::kSparse);
  // A selective recompute runs the absorbed core once more, a full one both.
  stage.recompute = Recompute::kSelective;
  EXPECT_EQ(form_at(model, 15360), AttentionForm::kMaskedDense);
  EXPECT_EQ(form_at(model, 20480), AttentionForm::kSparse);
  stage.recompute = Recompute::kFull;
  EXPECT_EQ(form_at(model, 12288), AttentionForm::kMaskedDense);
  EXPECT_EQ(form_at(model, 15360), AttentionForm::kSparse);
  // Every rank along context expands all keys.
  EXPECT_EQ(form_at(model, 8192), AttentionForm::kMaskedDense);
  stage.parallelism.context = 8;
  EXPECT_EQ(form_at(model, 8192), AttentionForm::kSparse);
  stage.parallelism.context = 1;
  // Other widths than 192/128: only the absorbed form is on tensor cores.
  ModelConfig other = model;
  other.v_head_dim = 96;
  EXPECT_EQ(form_at(other, 2048), AttentionForm::kSparse);
  // In fp32 both run on ordinary cores.
  stage.precision.compute = Compute::kFp32;
  EXPECT_EQ(form_at(model, 2048), AttentionForm::kMaskedDense);
  EXPECT_EQ(form_at(model, 131072), AttentionForm::kSparse);
}

// Large chunks of query rows where their expanded rows are narrow and need not wait for weight
// gradients.
TEST(Recipe, TakesLargeChunksOfRowsInTheDenseForms) {
  StageConfig stage = Stage(AttentionMode::kDense, TrainMode::kAll);
  const ModelConfig model;
  stage.micro_batch_size = 2;
  stage.parallelism.context = 4;
  const auto chunk_at = [&](int64_t seq_length) {
    stage.data.seq_length = seq_length;
    const absl::StatusOr<Recipe> recipe = MakeRecipe(stage, model);
    EXPECT_TRUE(recipe.ok()) << recipe.status();
    return recipe->options.attention_chunk;
  };
  EXPECT_EQ(chunk_at(65536), 32768);  // one chunk: 65536 * 2 / 4 rows
  EXPECT_EQ(chunk_at(65600), 16384);
  stage.parallelism.pipeline = 2;
  stage.parallelism.schedule = ScheduleName::kZbH1;
  ASSERT_OK_AND_ASSIGN(const Recipe delayed, MakeRecipe(stage, model));
  EXPECT_EQ(delayed.options.attention_chunk, ModelOptions().attention_chunk);
  stage = Stage(AttentionMode::kSparse, TrainMode::kAll);
  stage.dsa.kernel = AttentionKernel::kSparse;
  ASSERT_OK_AND_ASSIGN(const Recipe sparse, MakeRecipe(stage, model));
  EXPECT_EQ(sparse.options.attention_chunk, ModelOptions().attention_chunk);
}

TEST(Flops, CountTheAttentionThatIsAskedFor) {
  const ModelConfig model;
  StageConfig stage = Stage(AttentionMode::kDense, TrainMode::kAll);
  stage.data.seq_length = 131072;
  ASSERT_OK_AND_ASSIGN(const Recipe dense, MakeRecipe(stage, model));
  stage.attention = AttentionMode::kSparse;
  ASSERT_OK_AND_ASSIGN(const Recipe sparse, MakeRecipe(stage, model));
  const TokenFlops d = ModelFlopsPerToken(model, dense, 131072),
                   s = ModelFlopsPerToken(model, sparse, 131072);
  // 62 layers: dense core 2 * 128 heads * 320 * 65536 keys; sparse core 2 * 128 * 1088 * 2032 keys.
  EXPECT_NEAR(d.attention, 62.0 * 2 * 128 * 320 * 65536.5, 1e6);
  EXPECT_NEAR(s.attention, 62.0 * 2 * 128 * 1088 * 2032, 62.0 * 2 * 128 * 1088);
  EXPECT_NEAR(s.indexer, 62.0 * 2 * (64 * 128 * 65536.5 + 1536 * 8192 + 7168 * 192), 1e6);
  // 37 B active parameters with head: about 2 FLOPs each; the MTP module adds its own.
  EXPECT_GT(d.linear / 2, 36e9);
  EXPECT_LT(d.linear / 2, 40e9);
  EXPECT_GT(d.total / s.total, 2.5);
}

TEST(Schedule, OnePipelineRankDoesEachMicrobatchWhole) {
  ScheduleSpec spec{.policy = SchedulePolicy::k1F1B, .num_microbatches = 2};
  ASSERT_OK_AND_ASSIGN(const Schedule train, MakeSchedule(spec));
  EXPECT_EQ(ProgramString(train.programs[0]), "0F0 0B0 0W0 0F1 0B1 0W1");
  spec.forward_only = true;
  ASSERT_OK_AND_ASSIGN(const Schedule forward, MakeSchedule(spec));
  EXPECT_EQ(ProgramString(forward.programs[0]), "0F0 0F1");
}

TEST(Arguments, ReadFlagsInBothForms) {
  ASSERT_OK_AND_ASSIGN(const ParsedArguments parsed,
                       ParsedArguments::Parse("x", {"a", "--to", "b", "--n=3", "--v"},
                                              {{"to"}, {"n"}, {"v", false}}));
  EXPECT_EQ(parsed.positional(), std::vector<std::string>{"a"});
  EXPECT_EQ(parsed.Value("to", ""), "b");
  ASSERT_OK_AND_ASSIGN(const int64_t n, parsed.Integer("n", 0, 0));
  EXPECT_EQ(n, 3);
  EXPECT_TRUE(parsed.Has("v"));
}

TEST(Arguments, NameWhatIsWrong) {
  const std::vector<FlagSpec> flags = {{"to"}, {"v", false}};
  EXPECT_THAT(ParsedArguments::Parse("x", {"--too=1"}, flags),
              HasStatus(absl::StatusCode::kInvalidArgument,
                        "baleen x: no flag --too; there are: --to --v"));
  EXPECT_THAT(ParsedArguments::Parse("x", {"--to"}, flags),
              HasStatus(absl::StatusCode::kInvalidArgument, "--to needs a value"));
  EXPECT_THAT(ParsedArguments::Parse("x", {"--v=1"}, flags),
              HasStatus(absl::StatusCode::kInvalidArgument, "--v takes no value"));
  EXPECT_THAT(ParsedArguments::Parse("x", {"--to=1", "--to=2"}, flags),
              HasStatus(absl::StatusCode::kInvalidArgument, "given twice"));
  ASSERT_OK_AND_ASSIGN(const ParsedArguments parsed,
                       ParsedArguments::Parse("x", {"--to=1x"}, flags));
  EXPECT_THAT(parsed.Integer("to", 0, 0),
              HasStatus(absl::StatusCode::kInvalidArgument, "--to = '1x'"));
  EXPECT_THAT(parsed.CheckPositional(1, 1, "baleen x FILE"),
              HasStatus(absl::StatusCode::kInvalidArgument, "usage: baleen x FILE"));
}

TEST(ExitCode, FollowsTheStatus) {
  EXPECT_EQ(ExitCodeOf(absl::OkStatus()), 0);
  EXPECT_EQ(ExitCodeOf(ConfigError("x")), 2);
  EXPECT_EQ(ExitCodeOf(EnvironmentError("x")), 3);
  EXPECT_EQ(ExitCodeOf(DataError("x")), 4);
  EXPECT_EQ(ExitCodeOf(NumericsError("x")), 5);
  EXPECT_EQ(ExitCodeOf(absl::InternalError("x")), 70);
  EXPECT_EQ(ExitCodeOf(absl::CancelledError("x")), 75);
  EXPECT_EQ(ExitCodeOf(absl::DeadlineExceededError("x")), 76);
}

TEST(CheckpointPath, SaysWhatItLookedFor) {
  const TemporaryDirectory directory;
  EXPECT_THAT(ResolveCheckpointPath(directory.path()),
              HasStatus(absl::StatusCode::kDataLoss, "neither config.json"));
  std::filesystem::create_directory(directory.File("checkpoints"));
  EXPECT_THAT(ResolveCheckpointPath(directory.path()),
              HasStatus(absl::StatusCode::kDataLoss, "has written no checkpoint yet"));
}

// One matrix and one vector, gradients 3 and 4: norm 5 over both, clipped to 1; only the matrix
// decays.
TEST(Optimizer, ClipsByTheGlobalNormAndDecaysMatricesOnly) {
  Context context = Context::Cpu();
  ParameterStore store;
  const int matrix = store.Declare("m", {1, 1}, ParameterGroup::kMain);
  const int vector = store.Declare("v", {1}, ParameterGroup::kMain);
  store.Allocate(context, DType::kF64, MakeSelfGrid(), {ParameterGroup::kMain});
  store.value(matrix).data<double>()[0] = 2;
  store.value(vector).data<double>()[0] = 2;
  const auto world = MakeSelfCommunicator();
  ASSERT_OK_AND_ASSIGN(const ProcessGrid grid, ProcessGrid::Make(1, {}));
  const GridCommunicators axes = SplitGrid(*world, grid, {0});
  OptimizerConfig config = DefaultStageConfig().optimizer;
  config.weight_decay = 0.5;
  config.clip_grad.main = 1;
  Optimizer optimizer(context, store, config, {ParameterGroup::kMain}, axes, *world);
  optimizer.BeginStep();
  store.grad(matrix).data<double>()[0] = 3;
  store.grad(vector).data<double>()[0] = 4;
  optimizer.ReduceGradients();
  optimizer.ComputeNorms();
  EXPECT_DOUBLE_EQ(*optimizer.Norm(ClipGroup::kMain), 5);
  EXPECT_FALSE(optimizer.Norm(ClipGroup::kIndexer).has_value());
  optimizer.Update(0.1, 1);
  // Adam's first step is lr * sign(g) up to eps.
  EXPECT_NEAR(store.value(matrix).data<double>()[0], 2 - 0.1 * (1 + 0.5 * 2), 1e-6);
  EXPECT_NEAR(store.value(vector).data<double>()[0], 2 - 0.1, 1e-6);
  EXPECT_NEAR(optimizer.shards()[0].m.data<double>()[0], 0.1 * 3 / 5, 1e-6);
}

TEST(Optimizer, SkipsBothGroupsWhenOneIsNotFinite) {
  Context context = Context::Cpu();
  ParameterStore store;
  const int main = store.Declare("m", {1, 1}, ParameterGroup::kMain);
  const int indexer = store.Declare("i", {1, 1}, ParameterGroup::kIndexer);
  const std::vector<ParameterGroup> groups = {ParameterGroup::kMain, ParameterGroup::kIndexer};
  store.Allocate(context, DType::kF32, MakeSelfGrid(), groups);
  const auto world = MakeSelfCommunicator();
  ASSERT_OK_AND_ASSIGN(const ProcessGrid grid, ProcessGrid::Make(1, {}));
  const GridCommunicators axes = SplitGrid(*world, grid, {0});
  Optimizer optimizer(context, store, DefaultStageConfig().optimizer, groups, axes, *world);
  optimizer.BeginStep();
  store.grad(main).data<float>()[0] = 1;
  store.grad(indexer).data<float>()[0] = NAN;
  optimizer.ReduceGradients();
  optimizer.ComputeNorms();
  optimizer.Update(0.1, 1);
  EXPECT_TRUE(optimizer.skipped());
  EXPECT_EQ(store.value(main).data<float>()[0], 0);
  EXPECT_EQ(store.value(indexer).data<float>()[0], 0);
}

}  // namespace
}  // namespace baleen
