// Plans: counts become seconds, bytes are held to the device, and where a layout does not fit the
// nearest that do are named. That the bytes are the trainer's is dry_rank_mpi_test.cc's.
#include "trainer/plan.h"

#include <gtest/gtest.h>

#include <set>

#include "nlohmann/json.hpp"
#include "tests/support/status_matchers.h"
#include "tests/trainer/model_rig.h"

namespace baleen::testing {
namespace {

DeviceSpec Device() {
  DeviceSpec device;
  device.name = "test";
  device.memory_bytes = int64_t{1} << 40;
  device.reserved_bytes = 1 << 20;
  device.matmul_flops = 100;
  device.op_flops = {{"Attention", 50}};
  device.memory_bandwidth = 10;
  device.node_bandwidth = 20;
  device.network_bandwidth = 2;
  device.call_seconds = 1;
  device.ranks_per_node = 4;
  return device;
}

PlanRequest Request(int world) {
  PlanRequest request;
  request.model = TinyConfig();
  request.model.num_hidden_layers = 6;
  request.world_size = world;
  request.device = Device();
  StageConfig& stage = request.stage;
  stage = DefaultStageConfig();
  stage.name = "sparse";
  stage.attention = AttentionMode::kSparse;
  stage.train = TrainMode::kAll;
  stage.steps = 10;
  stage.global_batch_size = 8;
  stage.data.seq_length = 64;
  stage.optimizer.lr = 1e-3;
  return request;
}

TEST(PlanSeconds, TakeTheLongerOfWorkAndBytesOfEachOpAndAddMessages) {
  CountedWork work;
  work.ops.ops["matmul"] = {.calls = 3, .flops = 500, .bytes = 20};    // 5 s of work, 2 s of bytes
  work.ops.ops["Attention"] = {.calls = 1, .flops = 100, .bytes = 5};  // 2 s, 0.5 s
  work.ops.ops["swiglu"] = {.calls = 1, .flops = 0, .bytes = 30};      // 3 s
  work.messages.counts[{"tp", "x", "AllGather"}] = {.calls = 2, .bytes_sent = 60};  // 2 + 3 s
  work.messages.counts[{"ep", "y", "AllToAllV"}] = {.calls = 1, .bytes_sent = 60};  // 1 + 30 s
  const std::map<std::string, int> spans = {{"tp", 4}, {"ep", 8}};
  EXPECT_DOUBLE_EQ(Seconds(work, spans, Device(), Overlap::kNone), 10 + 5 + 31);
  EXPECT_DOUBLE_EQ(Seconds(work, spans, Device(), Overlap::kMessages), 36);
}

TEST(Plan, HoldsEveryPipelineStageAndAddsUpTheParameters) {
  PlanRequest request = Request(8);
  request.stage.parallelism.pipeline = 2;
  request.stage.parallelism.tensor = 2;
  request.stage.parallelism.expert = 4;
  ASSERT_OK_AND_ASSIGN(const StagePlan plan, PlanStage(request));
  ASSERT_EQ(plan.ranks.size(), 2u);
  EXPECT_EQ(plan.ranks[1].world_rank, 4);
  EXPECT_TRUE(plan.Fits());
  for (const RankPlan& rank : plan.ranks) {
    const int64_t parameters = rank.uses.at("parameters").bytes;
    EXPECT_GT(parameters, 0);
    // Gradients of all but the router's biases; fp32 master weights and moments cut over 4 or 1.
    EXPECT_GT(rank.uses.at("gradients").bytes, parameters * 9 / 10);
    EXPECT_GT(rank.uses.at("activations").peak_bytes, rank.uses.at("activations").bytes);
    EXPECT_GT(rank.flops, 0);
  }
  EXPECT_GT(plan.bubble, 0);
  EXPECT_LT(plan.bubble, 1);
  EXPECT_GT(plan.step_seconds, plan.timeline.makespan);
  EXPECT_DOUBLE_EQ(plan.tokens_per_second * plan.step_seconds, 8 * 64);
}

TEST(Plan, OfAGpuHasBf16WeightsAndFp32Gradients) {
  PlanRequest request = Request(1);
  ASSERT_OK_AND_ASSIGN(const StagePlan bf16, PlanStage(request));
  request.stage.precision.compute = Compute::kFp32;
  ASSERT_OK_AND_ASSIGN(const StagePlan fp32, PlanStage(request));
  const auto bytes = [](const StagePlan& plan, const char* use) {
    return static_cast<double>(plan.ranks[0].uses.at(use).bytes);
  };
  // But the router's biases: 6 layers x 8 experts, padded to 64 elements each, stay fp32.
  const double biases = 4 * 64 * 6;
  EXPECT_NEAR(bytes(bf16, "parameters"), (bytes(fp32, "parameters") + biases) / 2, biases / 2);
  EXPECT_DOUBLE_EQ(bytes(bf16, "gradients"), bytes(fp32, "gradients"));
  // Master weights and two moments against two moments.
  EXPECT_NEAR(bytes(bf16, "optimizer") / bytes(fp32, "optimizer"), 1.5, 0.01);
  EXPECT_LT(bf16.ranks[0].uses.at("activations").peak_bytes,
            fp32.ranks[0].uses.at("activations").peak_bytes * 3 / 4);
}

// An op in a dry context aborts where it is handed a dtype that the op of a GPU does not take:
// bf16 activations and weights, fp32 statistics, gradients and router biases.
TEST(Plan, HandsEveryOpTheDtypesOfAGpu) {
  for (const auto& [attention, train, kernel] :
       {std::tuple{AttentionMode::kSparse, TrainMode::kAll, AttentionKernel::kSparse},
        {AttentionMode::kSparse, TrainMode::kAll, AttentionKernel::kMaskedDense},
        {AttentionMode::kDense, TrainMode::kAll, AttentionKernel::kAuto},
        {AttentionMode::kDense, TrainMode::kIndexer, AttentionKernel::kAuto}}) {
    for (const Recompute recompute : {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
      for (const bool parallel : {false, true}) {
        PlanRequest request = Request(parallel ? 8 : 1);
        StageConfig& stage = request.stage;
        stage.attention = attention;
        stage.train = train;
        stage.dsa.kernel = kernel;
        stage.dsa.indexer_dtype = IndexerDType::kFp8;
        stage.dsa.hadamard = true;
        stage.recompute = recompute;
        stage.losses.balance = 1e-3;
        stage.optimizer.moments = MomentsDType::kBf16;
        if (recompute != Recompute::kNone) stage.precision.gemm = GemmPrecision::kFp8Block;
        if (parallel) {
          stage.parallelism.tensor = train == TrainMode::kAll ? 2 : 1;
          stage.parallelism.context = 2;
          stage.parallelism.pipeline = 2;
          stage.parallelism.expert = 4;
          stage.parallelism.expert_node_size = 2;
        }
        ASSERT_OK_AND_ASSIGN(const StagePlan plan, PlanStage(request));
        EXPECT_GT(plan.step_seconds, 0);
      }
    }
  }
}

// On a GPU, where the heads have a kernel for codes; the CPU multiplies the rounded values.
TEST(Plan, CountsScoresOfCodesAtTheirRate) {
  PlanRequest request = Request(1);
  request.device.op_flops = {{"IndexerScores", 50}, {"IndexerScoresFp8", 80}};
  request.device.memory_bandwidth = 1e6;  // products count
  request.stage.dsa.index_n_heads = 32;
  request.stage.dsa.index_head_dim = 128;
  using Ops = std::map<std::string, OpCount>;
  const auto plan = [&](IndexerDType dtype) -> std::pair<StagePlan, Ops> {
    request.stage.dsa.indexer_dtype = dtype;
    const absl::StatusOr<StagePlan> made = PlanStage(request);
    CHECK_OK(made.status());
    Ops ops;
    for (const auto& [action, work] : made->ranks[0].actions) {
      for (const auto& [name, count] : work.ops.ops) {
        ops[name].flops += count.flops;
        ops[name].bytes += count.bytes;
      }
    }
    return {*made, ops};
  };
  const auto [bf16_plan, bf16] = plan(IndexerDType::kBf16);
  const auto [fp8_plan, fp8] = plan(IndexerDType::kFp8);
  EXPECT_EQ(bf16.count("IndexerScoresFp8"), 0u);
  EXPECT_EQ(fp8.count("IndexerScores"), 0u);
  EXPECT_EQ(fp8.at("IndexerScoresFp8").flops, bf16.at("IndexerScores").flops);
  EXPECT_GT(fp8.at("QuantiseFp8").bytes, 0);
  EXPECT_LT(fp8_plan.step_seconds, bf16_plan.step_seconds);
  request.stage.precision.compute = Compute::kFp32;
  EXPECT_EQ(plan(IndexerDType::kFp8).second.count("IndexerScoresFp8"), 0u);
}

TEST(Plan, SaysTheSameOfEqualPipelineStages) {
  PlanRequest request = Request(4);
  request.model.num_hidden_layers = 7;  // 1 dense, 6 MoE
  request.stage.parallelism.pipeline = 4;
  request.stage.parallelism.layer_split = {2, 2, 2, 1};
  ASSERT_OK_AND_ASSIGN(const StagePlan plan, PlanStage(request));
  // The plan rehearses stages 1 and 2 once; alone, each is rehearsed itself.
  ASSERT_OK_AND_ASSIGN(const CheckedSchedule schedule, MakeCheckedSchedule(plan.layout.schedule));
  for (const RankPlan& rank : plan.ranks) {
    const RankPlan alone = RunDry({.stage = plan.request.stage,
                                   .model = plan.request.model,
                                   .recipe = plan.recipe,
                                   .layout = plan.layout,
                                   .schedule = schedule.schedule,
                                   .dtype = plan.dtype,
                                   .world_rank = rank.world_rank});
    EXPECT_EQ(alone.total.peak_bytes, rank.total.peak_bytes) << rank.world_rank;
    EXPECT_EQ(alone.flops, rank.flops) << rank.world_rank;
  }
}

// Values are gathered beside AdamW and the next step's first forward: what is longer shows.
TEST(Plan, HidesTheGatherOfValues) {
  PlanRequest request = Request(4);
  const auto seconds = [&](const CountedWork& work, const RankPlan& rank) {
    return Seconds(work, rank.spans, request.device, Overlap::kNone);
  };
  for (const double bandwidth : {20.0, 2.0, 1e-3}) {
    request.device.node_bandwidth = bandwidth;
    request.device.call_seconds = 0;
    ASSERT_OK_AND_ASSIGN(const StagePlan plan, PlanStage(request));
    const RankPlan& rank = plan.ranks[0];
    double forward = 0;
    for (const auto& [type, work] : rank.actions) {
      if (std::get<0>(type) == ActionKind::kForward) forward += seconds(work, rank);
    }
    const double adamw = seconds({rank.update.ops, {}}, rank);
    const double gather = seconds({{}, rank.update.messages}, rank);
    const double shown = gather - adamw - forward;
    EXPECT_GT(gather, 0);
    EXPECT_EQ(shown > 0, bandwidth < 1) << bandwidth;
    EXPECT_NEAR(plan.update_seconds, seconds(rank.reduction, rank) + adamw + std::max(0.0, shown),
                1e-9 * plan.update_seconds);
  }
}

TEST(Plan, NamesTheNearestLayoutsThatFit) {
  PlanRequest request = Request(8);
  request.device.reserved_bytes = 0;
  ASSERT_OK_AND_ASSIGN(const StagePlan asked, PlanStage(request));
  // Not enough for the asked layout, enough for others.
  request.device.memory_bytes = asked.NeededBytes(0) * 2 / 3;
  ASSERT_OK_AND_ASSIGN(const StagePlan plan, PlanStage(request));
  EXPECT_FALSE(plan.Fits());
  const std::vector<FittingLayout> nearest = NearestFittingLayouts(request, 2);
  ASSERT_EQ(nearest.size(), 2u);
  EXPECT_NE(nearest[0].changes, nearest[1].changes);
  for (const FittingLayout& layout : nearest) {
    EXPECT_LE(layout.needed_bytes, request.device.memory_bytes) << layout.changes;
    EXPECT_NE(layout.changes, "");
  }
}

// A schedule that holds more microbatches than 1f1b: the same axes fit with that.
TEST(Plan, NamesTheScheduleThatFits) {
  PlanRequest request = Request(2);
  request.device.reserved_bytes = 0;
  request.stage.global_batch_size = 16;
  ParallelismConfig& asked = request.stage.parallelism;
  asked.pipeline = 2;
  ASSERT_OK_AND_ASSIGN(const StagePlan small, PlanStage(request));
  request.device.memory_bytes = small.NeededBytes(small.HeaviestRank());
  asked.schedule = ScheduleName::kGpipe;
  asked.virtual_stages = 1;
  ASSERT_OK_AND_ASSIGN(const StagePlan large, PlanStage(request));
  ASSERT_FALSE(large.Fits());
  const std::vector<FittingLayout> nearest = NearestFittingLayouts(request, 1);
  ASSERT_EQ(nearest.size(), 1u);
  EXPECT_EQ(nearest[0].changes, "parallelism.schedule=1f1b");
  // A V of two parts on a rank: what belongs to it is taken back too.
  asked.schedule = ScheduleName::kZbv;
  asked.virtual_stages = 2;
  asked.layer_split = {1, 2, 2, 2};
  const std::vector<FittingLayout> from_v = NearestFittingLayouts(request, 1);
  ASSERT_EQ(from_v.size(), 1u);
  EXPECT_EQ(from_v[0].changes,
            "parallelism.schedule=1f1b parallelism.virtual_stages=1 parallelism.layer_split=[]");
}

TEST(Plan, RefusesMoreMicrobatchesThanAScheduleTakes) {
  PlanRequest request = Request(2);
  request.stage.micro_batch_size = 2;
  request.stage.global_batch_size = int64_t{1} << 18;
  EXPECT_THAT(PlanStage(request).status(), IsOk());
  request.stage.global_batch_size += 4;
  EXPECT_THAT(PlanStage(request),
              HasStatus(absl::StatusCode::kInvalidArgument,
                        "global_batch_size = 262148 over micro_batch_size 2 x data 2 makes 65537 "
                        "microbatches of a step, expected at most 65536"));
}

TEST(Plan, RefusesWhatTrainingRefuses) {
  PlanRequest request = Request(6);
  request.stage.parallelism.tensor = 4;
  EXPECT_THAT(PlanStage(request), HasStatus(absl::StatusCode::kInvalidArgument, "6 ranks"));
  EXPECT_THAT(FindDevice("tpu"),
              HasStatus(absl::StatusCode::kInvalidArgument, "h100, h200 and cpu"));
}

TEST(PlanReport, TextAndJsonSayTheSame) {
  PlanRequest request = Request(2);
  request.stage.parallelism.pipeline = 2;
  ASSERT_OK_AND_ASSIGN(const StagePlan plan, PlanStage(request));
  const std::string text = PlanText(plan, {.schedule_grid = true});
  for (const char* part :
       {"stage 'sparse'", "pp 2", "parameters", "fits", "% bubble", "predicted"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << " in\n" << text;
  }
  const nlohmann::json json = nlohmann::json::parse(PlanJson({plan}));
  ASSERT_EQ(json["stages"].size(), 1u);
  EXPECT_EQ(json["stages"][0]["ranks"].size(), 2u);
  EXPECT_EQ(json["stages"][0]["ranks"][0]["peak_bytes"], plan.ranks[0].total.peak_bytes);
  // Layers and microbatches are one kind of message.
  std::set<std::string> kinds;
  for (const auto& message : json["stages"][0]["ranks"][0]["messages"]) {
    kinds.insert(message["communicator"].get<std::string>() + " " +
                 message["kind"].get<std::string>());
  }
  EXPECT_TRUE(kinds.count("pp activations")) << json.dump(2);
  for (const std::string& kind : kinds) {
    EXPECT_EQ(kind.find_first_of("0123456789"), std::string::npos) << kind;
  }
}

// With a full recompute the weight gradients are formed with the inputs': what is left of the
// action is a norm's, and must not set the scale.
TEST(PlanReport, DrawsTheScheduleAtTheScaleOfWhatTakesTime) {
  PlanRequest request = Request(2);
  request.stage.parallelism.pipeline = 2;
  request.stage.recompute = Recompute::kFull;
  request.stage.global_batch_size = 2;
  request.device.call_seconds = 0;
  ASSERT_OK_AND_ASSIGN(const StagePlan plan, PlanStage(request));
  const std::string text = PlanText(plan, {.schedule_grid = true});
  EXPECT_NE(text.find("far shorter actions not drawn"), std::string::npos) << text;
  EXPECT_EQ(text.find("... to"), std::string::npos) << text;  // all of it fits
}

}  // namespace
}  // namespace baleen::testing
