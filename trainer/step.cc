// The story of a step. Read TrainStep at the end first: it is a list of verbs.
#include "trainer/step.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "kernels/core/check.h"
#include "kernels/core/transfer.h"
#include "kernels/ops/moe/router.h"
#include "parallel/agree.h"
#include "parallel/pipeline_engine.h"
#include "trainer/make_batch.h"
#include "trainer/model_work.h"
#include "trainer/step_summary.h"

namespace baleen {
namespace {

struct StepBatch {
  std::vector<Batch> microbatches;
  StepCounts counts;
  double wait_seconds = 0;
};

// This rank's microbatches, and how much the whole step counts: losses are sums divided once by
// global counts.
absl::StatusOr<StepBatch> NextBatch(TrainingStage& stage, Loader& data, int64_t consumed_samples) {
  const auto start = std::chrono::steady_clock::now();
  const StageConfig& config = stage.config();
  auto microbatches = data.Step(consumed_samples, config.global_batch_size, config.micro_batch_size,
                                stage.dp_rank(), stage.dp_size());
  RETURN_IF_ERROR(Agree(stage.world(), microbatches.status()));
  StepBatch batch;
  const Tensor counts = stage.host_context().Zeros(DType::kI64, {4});
  int64_t* count = counts.data<int64_t>();
  for (const Microbatch& microbatch : *microbatches) {
    count[0] += microbatch.num_targets;
    count[1] += microbatch.num_mtp_targets;
    count[2] += microbatch.num_samples * microbatch.seq_length;
    count[3] += microbatch.num_samples;
    batch.microbatches.push_back(MakeBatch(stage.context(), microbatch, stage.row_share()));
  }
  stage.axes().dp->AllReduce("batch counts", counts);
  batch.counts = {count[0], count[1], count[2], count[3]};
  batch.wait_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return batch;
}

LossScales MakeScales(const Recipe& recipe, const StepCounts& step) {
  return {.lm = Over(1, step.targets),
          .mtp = Over(recipe.mtp_weight, step.mtp_targets),
          .kl = Over(recipe.indexer_weight, step.rows),
          .balance = Over(recipe.balance_weight, step.sequences)};
}

StepStats NewStats(TrainingStage& stage) {
  const ModelConfig& model = stage.model_config();
  return StepStats::Zeros(stage.context(), model.num_hidden_layers + model.num_nextn_predict_layers,
                          model.n_routed_experts);
}

// The sums over all ranks, in host memory.
void ReduceStats(TrainingStage& stage, StepStats& stats) {
  for (Tensor* tensor :
       {&stats.lm_loss_1, &stats.mtp_loss_1, &stats.balance_1, &stats.kl_L, &stats.expert_counts_LE,
        &stats.mass_L, &stats.best_mass_L, &stats.recall_L, &stats.sampled_rows_L, &stats.ties_L,
        &stats.selection_hash_L, &stats.nan_rows_1}) {
    if (tensor != &stats.sampled_rows_L) *tensor = CopyToHost(stage.context(), *tensor);
    stage.world().AllReduce("step stats", *tensor);
  }
}

// Auxiliary-loss-free balancing (DeepSeek-V3 report 2.1.2): after the step, an expert with more
// than the mean load gets gamma less bias, one with less load gamma more. Every rank computes the
// same from the summed counts.
void BalanceRouters(TrainingStage& stage, const StepStats& stats) {
  const double speed = stage.recipe().bias_update_speed;
  if (speed == 0) return;
  for (const auto& [layer, id] : stage.model().correction_biases()) {
    const Tensor counts_E = stats.expert_counts_LE.Rows(layer, layer + 1)
                                .Reshaped({stage.model_config().n_routed_experts});
    UpdateRouterBias(stage.context(), CopyToDevice(stage.context(), counts_E), speed,
                     stage.parameters().value(id));
  }
}

// Adds each row's loss to its place in the sequence: row 0 of the sums, and counts in row 1.
void AddByPosition(const Context& context, const Batch& batch, const Tensor& on_device,
                   const Tensor& by_position_2L) {
  const int64_t length = batch.seq_length;
  const Tensor loss_R = CopyToHost(context, on_device);
  for (int64_t r = 0; r < batch.num_rows(); ++r) {
    const int64_t place = batch.host.own_begin + r;
    if (batch.host.target_G[place] < 0) continue;
    const double loss =
        loss_R.dtype() == DType::kF64 ? loss_R.data<double>()[r] : loss_R.data<float>()[r];
    const int64_t position = batch.host.row_G[place] % length;
    by_position_2L.data<double>()[position] += loss;
    by_position_2L.data<double>()[length + position] += 1;
  }
}

absl::Status CheckScores(const StepStats& stats) {
  if (stats.nan_rows_1.data<int64_t>()[0] == 0) return absl::OkStatus();
  return NumericsError(
      "indexer scores held a NaN in ", stats.nan_rows_1.data<int64_t>()[0],
      " of the step's (microbatch, layer) pairs: no keys can be selected. Weights or activations "
      "are not finite any more; go back to an earlier checkpoint (checkpoint.resume: PATH) and "
      "lower the learning rate");
}

}  // namespace

absl::StatusOr<StepResult> TrainStep(TrainingStage& stage, const StepPosition& position, double lr,
                                     bool measure_indexer, const StepWatch& watch) {
  watch(StepPhase::kBatch);
  ASSIGN_OR_RETURN(const StepBatch batch,
                   NextBatch(stage, stage.train_data(), position.consumed_samples));
  watch(StepPhase::kBegin);
  PassOptions pass;
  pass.scales = MakeScales(stage.recipe(), batch.counts);
  pass.measure_indexer = measure_indexer;
  StepStats stats = NewStats(stage);

  Optimizer& optimizer = stage.optimizer();
  optimizer.BeginStep();
  const PassKind kind = stage.recipe().forward_only ? PassKind::kWarmUp : PassKind::kTrain;
  ModelWork work(stage.model_context(), stage.model(), batch.microbatches, pass, kind, stats);
  work.set_gradients_ready([&](int first, int end) { optimizer.GradientsReady(first, end); });
  WatchedWork watched(work, watch);
  RunPipeline(stage.program(), stage.layout().part_rank, *stage.axes().pp, watched);
  optimizer.ReduceRest();  // on their way while the host asks for the statistics
  watch(StepPhase::kStatistics);
  ReduceStats(stage, stats);
  RETURN_IF_ERROR(CheckScores(stats));
  watch(StepPhase::kReduce);
  optimizer.ReduceGradients();
  watch(StepPhase::kNorms);
  optimizer.ComputeNorms();
  watch(StepPhase::kUpdate);
  optimizer.Update(lr, position.stage_step + 1);
  watch(StepPhase::kSummary);
  if (!optimizer.skipped()) BalanceRouters(stage, stats);
  StepResult result = SummariseStep(stage, batch.counts, stats);
  result.measured = measure_indexer;
  result.data_wait_seconds = batch.wait_seconds;
  return result;
}

absl::StatusOr<ValidationResult> Validate(TrainingStage& stage, const ValidationRequest& request) {
  CHECK(stage.validation_data() != nullptr);
  PassOptions pass;
  pass.train = false;
  pass.measure_indexer = request.measure_indexer;
  StepStats stats = NewStats(stage);
  const Tensor by_position_2L =
      stage.host_context().Zeros(DType::kF64, {2, stage.config().data.seq_length});
  StepCounts passes;
  for (int64_t step = 0; step < request.steps; ++step) {
    ASSIGN_OR_RETURN(const StepBatch batch, NextBatch(stage, *stage.validation_data(),
                                                      step * stage.config().global_batch_size));
    ModelWork work(stage.model_context(request.options), stage.model(), batch.microbatches, pass,
                   PassKind::kValidate, stats);
    work.set_loss_reader([&](const Batch& microbatch, const Tensor& loss_R) {
      AddByPosition(stage.context(), microbatch, loss_R, by_position_2L);
    });
    RunPipeline(stage.validation_program(), stage.layout().part_rank, *stage.axes().pp, work);
    passes.targets += batch.counts.targets;
    passes.mtp_targets += batch.counts.mtp_targets;
  }
  ReduceStats(stage, stats);
  stage.world().AllReduce("loss by position", by_position_2L);
  RETURN_IF_ERROR(CheckScores(stats));
  return SummariseValidation(stage.model_config(), passes, stats, by_position_2L);
}

}  // namespace baleen
