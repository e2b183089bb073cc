// baleen bench ops: every op's call runs at a small model's sizes, with operations and bytes as
// they are counted; sizes of a rank; goals; what does not fit; flags; table and JSON.
#include "trainer/bench/ops_bench.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <set>

#include "nlohmann/json.hpp"
#include "tests/support/status_matchers.h"
#include "tests/trainer/model_rig.h"
#include "trainer/bench/ops_command.h"
#include "trainer/bench/ops_report.h"

namespace baleen {
namespace {

using testing::HasStatus;
using ::testing::HasSubstr;
using testing::IsOk;
using testing::TinyConfig;

constexpr int64_t kKi = 1024, kGiB = int64_t{1} << 30;

StageConfig Stage(int64_t seq_length) {
  StageConfig stage = DefaultStageConfig();
  stage.data.seq_length = seq_length;
  return stage;
}

// The sizes of DeepSeek-V3.2 on a GPU of which tensor, expert parallelism have so many.
OpSizes Published(int64_t tensor, int64_t expert) {
  StageConfig stage = Stage(8 * kKi);
  stage.parallelism.tensor = tensor;
  stage.parallelism.expert = expert;
  ModelConfig model;
  model.rope_scaling = YarnConfig();
  const auto sizes = MakeOpSizes(stage, model, /*cuda=*/true);
  CHECK_OK(sizes.status());
  return *sizes;
}

OpSizes Tiny() {
  const auto sizes = MakeOpSizes(Stage(64), TinyConfig(), /*cuda=*/false);
  CHECK_OK(sizes.status());
  return *sizes;
}

OpCase OneCase(const OpSizes& sizes, const OpRequest& request) {
  const auto cases = MakeOpCases(sizes, request);
  CHECK_OK(cases.status());
  CHECK_EQ(cases->size(), 1u);
  return cases->front();
}

OpCall DryCall(const OpCase& op, DType dtype) {
  Context dry = Context::Dry();
  OpInputs inputs(dry, dtype, 1);
  OpCall call = op.make(inputs);
  call.run = nullptr;  // its tensors end with the context
  return call;
}

std::vector<OpResult> MeasureTiny(const std::string& ops, int64_t memory = kGiB) {
  Context context = Context::Cpu();
  const OpSizes sizes = Tiny();
  OpRequest request;
  request.ops = ops;
  request.query_rows = 32;
  const auto cases = MakeOpCases(sizes, request);
  CHECK_OK(cases.status());
  OpInputs inputs(context, sizes.dtype, 1);
  std::string no_trace;
  size_t seen = 0;
  std::vector<OpResult> results = BenchOps(
      inputs, sizes, *cases, {.steps = 3, .memory_bytes = memory}, [&](const OpResult&) { ++seen; },
      no_trace);
  EXPECT_EQ(seen, results.size());
  return results;
}

TEST(OpsBench, RunsEveryOpOfASmallModelAndGivesItsTensorsBack) {
  const std::vector<OpResult> results = MeasureTiny("*");
  std::set<std::string> names;
  for (const OpResult& result : results) {
    names.insert(result.op.op);
    EXPECT_TRUE(result.fits) << result.op.op;
    EXPECT_EQ(result.seconds.size(), 3u) << result.op.op;
    EXPECT_GT(result.median, 0) << result.op.op;
    EXPECT_LE(result.low, result.median);
    EXPECT_GE(result.high, result.median);
    EXPECT_GT(result.bytes, 0) << result.op.op;
    EXPECT_EQ(result.flops > 0, result.op.bound != OpBound::kCopy) << result.op.op;
    EXPECT_EQ(result.op.kernel, "CPU definition");
    EXPECT_FALSE(result.goal) << "goals are of GPUs: " << result.op.op;
  }
  for (const char* name : {"sparse_attention.forward",
                           "sparse_attention.backward",
                           "attention.forward",
                           "attention.backward",
                           "masked_attention.forward",
                           "masked_attention.backward",
                           "indexer.scores",
                           "indexer.scores_fp8",
                           "indexer.topk",
                           "indexer.backward",
                           "warmup.whole",
                           "gemm.q_a.forward",
                           "gemm.q_b.dgrad",
                           "gemm.kv_a.wgrad",
                           "gemm.kv_b.forward",
                           "gemm.o.wgrad",
                           "gemm.mlp_gate.forward",
                           "gemm.mlp_down.dgrad",
                           "gemm.head.wgrad",
                           "gemm.absorb_query",
                           "grouped.gate.forward",
                           "grouped.down.dgrad",
                           "grouped.gate.wgrad",
                           "grouped.gate_up.dgrad",
                           "rms_norm.forward",
                           "rope.query",
                           "swiglu.backward",
                           "router.forward",
                           "permute.dispatch",
                           "cross_entropy.gradient",
                           "adamw",
                           "cast.sums_to_activations"}) {
    EXPECT_EQ(names.count(name), 1u) << name;
  }
}

TEST(OpsBench, HoldsNothingOfOneOpWhileTheNextRuns) {
  Context context = Context::Cpu();
  const OpSizes sizes = Tiny();
  const auto cases = MakeOpCases(sizes, OpRequest());
  ASSERT_THAT(cases, IsOk());
  OpInputs inputs(context, sizes.dtype, 1);
  const int64_t before = context.pool().Total().bytes;
  std::optional<int64_t> products;  // beside which ops run: held all the time
  std::string no_trace;
  BenchOps(
      inputs, sizes, *cases, {.steps = 1, .memory_bytes = kGiB},
      [&](const OpResult& result) {
        const int64_t held = context.pool().Total().bytes;
        if (!products) products = held;
        EXPECT_EQ(held, *products) << result.op.op;
      },
      no_trace);
  EXPECT_LT(*products, 16 << 20);
  EXPECT_EQ(context.pool().Total().bytes, before);
}

TEST(OpsBench, AProductStandsBesideTheCeilingThatTookTurnsWithIt) {
  const std::vector<OpResult> results = MeasureTiny("gemm.q_a.forward,rms_norm.forward", kGiB);
  const OpCeilings slow{1, 1, 1};
  EXPECT_GT(results[0].product_flops, 0);
  EXPECT_DOUBLE_EQ(results[0].Share(slow), results[0].FlopsPerSecond() / results[0].product_flops);
  EXPECT_EQ(results[1].product_flops, 0);
  EXPECT_DOUBLE_EQ(results[1].Share(slow), results[1].BytesPerSecond());
}

TEST(OpsBench, KeysNearAndRandomAreMeasuredEach) {
  const std::vector<OpResult> results = MeasureTiny("sparse_attention.backward");
  ASSERT_EQ(results.size(), 2u);
  EXPECT_EQ(*results[0].op.ids, BenchIds::kNear);
  EXPECT_EQ(*results[1].op.ids, BenchIds::kRandom);
}

TEST(OpsBench, SaysWhatDoesNotFitAndGoesOn) {
  const OpSizes sizes = Tiny();
  const std::vector<OpResult> all = MeasureTiny("indexer.scores,adamw");
  ASSERT_EQ(all.size(), 2u);
  const int64_t between = (all[0].needed_bytes + all[1].needed_bytes) / 2;
  ASSERT_LT(all[0].needed_bytes, all[1].needed_bytes);
  const std::vector<OpResult> results = MeasureTiny("indexer.scores,adamw", between);
  EXPECT_TRUE(results[0].fits);
  EXPECT_FALSE(results[1].fits);
  EXPECT_TRUE(results[1].seconds.empty());
  const BenchDevice device{.name = "CPU"};
  const OpCeilings ceilings{1e11, 1e11, 1e10};
  EXPECT_THAT(OpLine(device, ceilings, results[1]), HasSubstr("does not fit: needs 0.0 GiB"));
  EXPECT_THAT(OpsSummary(device, ceilings, ceilings, results, ""), HasSubstr("1 did not fit"));
  const auto json = nlohmann::json::parse(OpsJson(device, sizes, ceilings, ceilings, results));
  EXPECT_TRUE(json["results"][0]["fits"]);
  EXPECT_FALSE(json["results"][1]["fits"]);
  EXPECT_FALSE(json["results"][1].contains("seconds"));
}

// 671B on a GPU: nothing is computed, but all shapes pass the ops' checks, and what a call holds is
// known.
TEST(OpsBench, KnowsWhatThePublishedSizesHold) {
  const OpSizes sizes = Published(1, 32);
  OpRequest request;
  request.heads = {128, 16};
  request.tokens = {8 * kKi, 128 * kKi};
  const auto cases = MakeOpCases(sizes, request);
  ASSERT_THAT(cases, IsOk());
  for (const OpCase& op : *cases) EXPECT_GT(NeededBytes(op, sizes.dtype), 0) << op.op;
  request.ops = "indexer.scores";
  request.tokens = {128 * kKi};
  // Scores of 4096 rows in fp32, 2 GiB, and their operands.
  const int64_t scores = NeededBytes(OneCase(sizes, request), sizes.dtype);
  EXPECT_GT(scores, 2 * kGiB);
  EXPECT_LT(scores, 2 * kGiB + kGiB / 4);
}

TEST(OpsBench, CountsOperationsAsPublishedFiguresDo) {
  const OpSizes sizes = Published(1, 32);
  OpRequest request;
  request.ids = {BenchIds::kRandom};
  request.tokens = {32 * kKi};
  const auto flops = [&](const std::string& op) {
    request.ops = op;
    return DryCall(OneCase(sizes, request), sizes.dtype).flops;
  };
  EXPECT_DOUBLE_EQ(flops("sparse_attention.forward"), 2.0 * 4096 * 128 * 2048 * (576 + 512));
  EXPECT_DOUBLE_EQ(flops("sparse_attention.backward"),
                   2.0 * 4096 * 128 * 2048 * (3 * 576 + 2 * 512));
  EXPECT_DOUBLE_EQ(flops("indexer.scores"), 2.0 * 4096 * 32768 * 64 * 128);
  EXPECT_DOUBLE_EQ(flops("indexer.backward"), 6.0 * 4096 * 2048 * 64 * 128);
  const double pairs = 32768.0 * 32769 / 2;  // causal, whatever of them is selected
  EXPECT_DOUBLE_EQ(flops("attention.forward"), pairs * 128 * 2 * (192 + 128));
  EXPECT_DOUBLE_EQ(flops("masked_attention.backward"), pairs * 128 * 2 * (3 * 192 + 2 * 128));
  EXPECT_DOUBLE_EQ(flops("warmup.whole"), pairs * 196608);
  EXPECT_DOUBLE_EQ(flops("gemm.q_b.wgrad"), 2.0 * 8192 * 1536 * 128 * 192);
  // 8 of 256 experts, 8 rows a token.
  EXPECT_DOUBLE_EQ(flops("grouped.gate.forward"), 2.0 * 8 * 8192 * 7168 * 2048);
  EXPECT_DOUBLE_EQ(flops("grouped.gate_up.dgrad"), 2 * 2.0 * 8 * 8192 * 7168 * 2048);
  request.ops = "adamw";
  const OpCall adamw = DryCall(OneCase(sizes, request), sizes.dtype);
  EXPECT_DOUBLE_EQ(adamw.bytes, 30.0 * (int64_t{128} << 20));
}

TEST(OpsBench, LongSequencesAreMeasuredByTheirLastRows) {
  const OpSizes sizes = Published(1, 32);
  OpRequest request;
  request.ops = "attention.forward";
  request.tokens = {128 * kKi};
  const OpCase op = OneCase(sizes, request);
  EXPECT_EQ(op.rows, 4096);
  const double pairs = 4096.0 * (131072 - 4096) + 4096.0 * 4097 / 2;
  EXPECT_DOUBLE_EQ(DryCall(op, sizes.dtype).flops, pairs * 128 * 2 * (192 + 128));
}

TEST(OpsBench, TakesTheSizesOfOneRankOfTheLayout) {
  const OpSizes sizes = Published(4, 32);
  EXPECT_EQ(sizes.heads, 32);
  EXPECT_EQ(sizes.rows, 2048);
  EXPECT_EQ(sizes.group_rows, 8192);
  EXPECT_EQ(sizes.experts, 8);
  EXPECT_EQ(sizes.expert_rows, 2048 * 8);
  EXPECT_EQ(sizes.vocab, 129280 / 4);
  EXPECT_EQ(sizes.dtype, DType::kBF16);
  StageConfig stage = Stage(64);
  stage.parallelism.tensor = 3;
  EXPECT_THAT(
      MakeOpSizes(stage, TinyConfig(), false),
      HasStatus(absl::StatusCode::kInvalidArgument, "not divisible by parallelism.tensor = 3"));
  stage.parallelism = Stage(64).parallelism;
  stage.parallelism.expert = 5;
  EXPECT_THAT(MakeOpSizes(stage, TinyConfig(), false),
              HasStatus(absl::StatusCode::kInvalidArgument,
                        "n_routed_experts = 8 is not divisible by parallelism.expert = 5"));
}

TEST(OpsBench, MeasuresInADtypeThatTheDeviceHas) {
  StageConfig stage = Stage(64);
  stage.precision.compute = Compute::kBf16;
  EXPECT_THAT(MakeOpSizes(stage, TinyConfig(), false),
              HasStatus(absl::StatusCode::kInvalidArgument, "precision.compute = bf16"));
  // On GPUs block FP8 is made of bf16 alone.
  stage.precision.compute = Compute::kFp32;
  const auto fp32 = MakeOpSizes(stage, TinyConfig(), true);
  ASSERT_THAT(fp32, IsOk());
  OpRequest request;
  request.ops = "fp8.*";
  EXPECT_THAT(MakeOpCases(*fp32, request),
              HasStatus(absl::StatusCode::kInvalidArgument, "'fp8.*'"));
}

TEST(OpsBench, PatternsChooseOpsAndEachMustNameOne) {
  const OpSizes sizes = Tiny();
  OpRequest request;
  request.ops = "gemm.q_?.forward,adamw";
  const auto cases = MakeOpCases(sizes, request);
  ASSERT_THAT(cases, IsOk());
  std::vector<std::string> names;
  for (const OpCase& op : *cases) names.push_back(op.op);
  EXPECT_THAT(names, ::testing::ElementsAre("gemm.q_a.forward", "gemm.q_b.forward", "adamw"));
  request.ops = "adamw,atention*";
  const auto wrong = MakeOpCases(sizes, request);
  EXPECT_THAT(wrong, HasStatus(absl::StatusCode::kInvalidArgument, "'atention*'"));
  EXPECT_THAT(wrong, HasStatus(absl::StatusCode::kInvalidArgument, "masked_attention.backward"));
}

// --- Goals.

OpResult ResultOf(const OpSizes& sizes, const OpRequest& request, double seconds) {
  OpResult result{.op = OneCase(sizes, request)};
  const OpCall call = DryCall(result.op, sizes.dtype);
  result.flops = call.flops;
  result.bytes = call.bytes;
  result.seconds = {seconds};
  result.median = result.low = result.high = seconds;
  result.goal = GoalOf(result.op, sizes, call.bytes);
  return result;
}

TEST(OpGoals, StandBesidePeersAtTheListedShapes) {
  const OpSizes sizes = Published(1, 32);
  const OpCeilings ceilings{800e12, 1300e12, 3e12};
  const BenchDevice device{.name = "NVIDIA H100", .cuda = true};
  OpRequest request;
  request.ids = {BenchIds::kRandom};
  request.ops = "sparse_attention.forward";
  // 1168.2 GF in 2 ms are 584 TF.
  const OpResult forward = ResultOf(sizes, request, 2e-3);
  ASSERT_TRUE(forward.goal);
  EXPECT_EQ(forward.goal->peer, 604.0);
  EXPECT_NEAR(forward.goal->goal, 634.2, 1e-9);
  EXPECT_THAT(OpLine(device, ceilings, forward),
              HasSubstr("FlashMLA 604 TF (1.93 x), goal 634.2 TF (1.84 x): met"));
  request.ops = "indexer.topk";
  const OpResult topk = ResultOf(sizes, request, 4096 * 0.06e-6);
  EXPECT_THAT(OpLine(device, ceilings, topk),
              HasSubstr("0.0600 us/row; FlashInfer 0.07 us/row (1.17 x), goal 0.05385 us/row "
                        "(0.90 x): missed"));
  request.ops = "rms_norm.forward";
  const OpResult norm = ResultOf(sizes, request, 1e-4);  // 235 MB
  EXPECT_THAT(OpLine(device, ceilings, norm), HasSubstr("goal 80 % (0.98 x): missed"));
  request.ops = "layer_norm.forward";
  EXPECT_FALSE(ResultOf(sizes, request, 1e-5).goal) << "4 MB are no copy";
  request.ops = "gemm.q_b.forward";
  EXPECT_EQ(ResultOf(sizes, request, 1e-3).goal->goal, 90);
  request.ops = "grouped.down.wgrad";
  EXPECT_EQ(ResultOf(sizes, request, 1e-3).goal->goal, 75);
  request.ops = "gemm.router.forward";
  EXPECT_FALSE(ResultOf(sizes, request, 1e-3).goal);
  request.ops = "sparse_attention.forward";
  request.tokens = {12 * kKi};
  EXPECT_FALSE(ResultOf(sizes, request, 1e-3).goal) << "no such shape is published";
}

TEST(OpGoals, FewHeadsAreMeasuredAgainstPadding) {
  const OpSizes sizes = Published(1, 32);
  OpRequest request;
  request.ops = "sparse_attention.forward";
  request.heads = {16};
  request.tokens = {32 * kKi};
  request.ids = {BenchIds::kNear};
  const auto goal = GoalOf(OneCase(sizes, request), sizes, 1e9);
  ASSERT_TRUE(goal);
  EXPECT_NEAR(goal->peer, 648.6 / 4, 1e-9);
  EXPECT_NEAR(goal->goal, 2.5 * 648.6 / 4, 1e-9);
}

TEST(OpGoals, LessIsMoreInMicroseconds) {
  EXPECT_DOUBLE_EQ(Ratio(GoalUnit::kMicrosecondsRow, 0.5, 1.0), 2);
  EXPECT_DOUBLE_EQ(Ratio(GoalUnit::kTeraflops, 500, 1000), 0.5);
}

// --- Flags.

TEST(OpsFlags, AreReadWithSuffixesAndDefaults) {
  const auto plain = ReadOpsArguments({"ops", "configs/run/tiny_dense.yaml"});
  ASSERT_THAT(plain, IsOk());
  EXPECT_TRUE(plain->request.heads.empty());
  EXPECT_THAT(plain->request.ids, ::testing::ElementsAre(BenchIds::kNear, BenchIds::kRandom));
  EXPECT_EQ(plain->stage.name, "dense");
  const auto read =
      ReadOpsArguments({"ops", "configs/run/tiny.yaml", "--tokens", "4Ki,32Ki", "--heads=128,16",
                        "--ids", "near", "--stage", "sparse", "--rows", "1Ki", "run.seed=7"});
  ASSERT_THAT(read, IsOk());
  EXPECT_THAT(read->request.tokens, ::testing::ElementsAre(4096, 32768));
  EXPECT_THAT(read->request.heads, ::testing::ElementsAre(128, 16));
  EXPECT_EQ(read->request.query_rows, 1024);
  EXPECT_EQ(read->seed, 7);
}

TEST(OpsFlags, WrongOnesAreNamed) {
  const struct {
    Arguments flags;
    std::string part;
  } cases[] = {
      {{"--heads", "128,many"}, "--heads 128,many: 'many'"},
      {{"--heads", "0"}, "'0': expected whole numbers from 1 to 1024"},
      {{"--tokens", "4Ki,,8Ki"}, "--tokens 4Ki,,8Ki: ''"},
      {{"--tokens", "1Gi"}, "from 1 to 262144"},
      {{"--rows", "1Ki,2Ki"}, "expected one"},
      {{"--ids", "indexer"}, "--ids indexer: known are near and random"},
      {{"--ids", "near,far"}, "--ids far"},
      {{"--steps", "0"}, "--steps = '0'"},
      {{"--stage", "sprase"}, "--stage sprase: configs/run/tiny.yaml has indexer-warmup, sparse"},
      {{"--op", "adamw"}, "no flag --op"},
  };
  for (const auto& wrong : cases) {
    Arguments arguments = {"ops", "configs/run/tiny.yaml"};
    arguments.insert(arguments.end(), wrong.flags.begin(), wrong.flags.end());
    EXPECT_THAT(ReadOpsArguments(arguments),
                HasStatus(absl::StatusCode::kInvalidArgument, wrong.part));
  }
  EXPECT_THAT(ReadOpsArguments({"ops"}),
              HasStatus(absl::StatusCode::kInvalidArgument, "baleen bench ops RUN.yaml"));
}

}  // namespace
}  // namespace baleen
