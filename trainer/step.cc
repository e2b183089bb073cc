// The story of a step. Read TrainStep at the end first: it is a list of verbs.
#include "trainer/step.h"

#include <algorithm>
#include <chrono>
#include <cmath>

#include "kernels/core/check.h"
#include "parallel/agree.h"
#include "parallel/schedule.h"

namespace baleen {
namespace {

struct StepBatch {
  std::vector<Batch> microbatches;
  // Over all microbatches and ranks.
  int64_t targets = 0, mtp_targets = 0, rows = 0, sequences = 0;
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
  const Tensor counts = stage.context().Zeros(DType::kI64, {4});
  int64_t* count = counts.data<int64_t>();
  for (const Microbatch& microbatch : *microbatches) {
    count[0] += microbatch.num_targets;
    count[1] += microbatch.num_mtp_targets;
    count[2] += microbatch.num_samples * microbatch.seq_length;
    count[3] += microbatch.num_samples;
    batch.microbatches.push_back(MakeBatch(stage.context(), microbatch));
  }
  stage.axes().dp->AllReduce("batch counts", counts);
  batch.targets = count[0];
  batch.mtp_targets = count[1];
  batch.rows = count[2];
  batch.sequences = count[3];
  batch.wait_seconds =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return batch;
}

double Over(double weight, int64_t count) {
  return count == 0 ? 0 : weight / static_cast<double>(count);
}

LossScales MakeScales(const Recipe& recipe, const StepBatch& batch) {
  return {.lm = Over(1, batch.targets),
          .mtp = Over(recipe.mtp_weight, batch.mtp_targets),
          .kl = Over(recipe.indexer_weight, batch.rows),
          .balance = Over(recipe.balance_weight, batch.sequences)};
}

// The engine: runs the program's actions one after the other.
void RunProgram(TrainingStage& stage, const StepBatch& batch, const PassOptions& pass,
                StepStats& stats) {
  const ModelContext context = stage.model_context();
  const Model& model = stage.model();
  const bool forward_only = stage.recipe().forward_only;
  std::vector<Model::Saved> saved(batch.microbatches.size());
  for (const Action& action :
       MakeSingleStageProgram(static_cast<int>(batch.microbatches.size()), forward_only)) {
    const Batch& microbatch = batch.microbatches[action.microbatch];
    Model::Saved& kept = saved[action.microbatch];
    switch (action.kind) {
      case ActionKind::kForward:
        forward_only ? model.WarmUp(context, microbatch, pass, stats)
                     : model.Forward(context, microbatch, pass, stats, kept);
        break;
      case ActionKind::kBackwardInput:
        model.BackwardInput(context, microbatch, pass, kept);
        break;
      case ActionKind::kBackwardWeight:
        model.BackwardWeight(context, microbatch, pass, stats, kept);
        kept = Model::Saved();
        break;
      default:  // one pipeline rank: no messages, nothing interleaved
        CHECK(false) << ActionString(action);
    }
  }
}

StepStats NewStats(TrainingStage& stage) {
  const ModelConfig& model = stage.model_config();
  const int64_t layers = model.num_hidden_layers + (stage.model().has_mtp() ? 1 : 0);
  return StepStats::Zeros(stage.context(), layers, model.n_routed_experts);
}

void ReduceStats(Communicator& axis, StepStats& stats) {
  for (const Tensor* tensor :
       {&stats.lm_loss_1, &stats.mtp_loss_1, &stats.balance_1, &stats.kl_L, &stats.expert_counts_LE,
        &stats.mass_L, &stats.best_mass_L, &stats.recall_L, &stats.sampled_rows_L, &stats.ties_L,
        &stats.nan_rows_1}) {
    axis.AllReduce("step stats", *tensor);
  }
}

// Auxiliary-loss-free balancing (spec 4.4): after the step, an expert with more than the mean load
// gets gamma less bias, one with less load gamma more. Every rank computes the same from the summed
// counts.
void UpdateRouterBias(TrainingStage& stage, const StepStats& stats) {
  const double speed = stage.recipe().bias_update_speed;
  if (speed == 0) return;
  const std::vector<int> biases = stage.model().correction_biases();
  const int64_t experts = stage.model_config().n_routed_experts;
  for (size_t layer = 0; layer < biases.size(); ++layer) {
    if (biases[layer] < 0) continue;
    const int64_t* counts = stats.expert_counts_LE.data<int64_t>() + layer * experts;
    int64_t total = 0;
    for (int64_t e = 0; e < experts; ++e) total += counts[e];
    const Tensor& bias = stage.parameters().value(biases[layer]);
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t excess =
          counts[e] * experts - total;  // compares with the mean without rounding
      const double change = excess > 0 ? -speed : excess < 0 ? speed : 0;
      if (bias.dtype() == DType::kF64) {
        bias.data<double>()[e] += change;
      } else {
        bias.data<float>()[e] += static_cast<float>(change);
      }
    }
  }
}

void SummariseExperts(TrainingStage& stage, const StepStats& stats, StepResult& result) {
  const std::vector<int> biases = stage.model().correction_biases();
  const int64_t experts = stage.model_config().n_routed_experts;
  double worst = 0, least = INFINITY;
  for (size_t layer = 0; layer < biases.size(); ++layer) {
    const int64_t* counts = stats.expert_counts_LE.data<int64_t>() + layer * experts;
    double total = 0;
    for (int64_t e = 0; e < experts; ++e) total += static_cast<double>(counts[e]);
    if (biases[layer] < 0 || total == 0) continue;
    std::vector<double> load(experts);
    for (int64_t e = 0; e < experts; ++e) {
      load[e] = static_cast<double>(counts[e]) * static_cast<double>(experts) / total;
      worst = std::max(worst, load[e]);
      least = std::min(least, load[e]);
    }
    result.expert_load.push_back(std::move(load));
  }
  if (!result.expert_load.empty()) {
    result.expert_load_max_over_mean = worst;
    result.expert_load_min = least;
  }
}

void SummariseIndexer(const StepStats& stats, int64_t rows, StepResult& result) {
  double kl = 0, mass = 0, best = 0, recall = 0, ties = 0;
  const int64_t layers = stats.kl_L.num_elements();
  for (int64_t layer = 0; layer < layers; ++layer) {
    result.indexer_kl_per_layer.push_back(Over(stats.kl_L.data<double>()[layer], rows));
    kl += result.indexer_kl_per_layer.back();
    ties += stats.ties_L.data<double>()[layer];
    const double sampled = stats.sampled_rows_L.data<double>()[layer];
    if (sampled == 0) continue;
    result.topk_mass_per_layer.push_back(stats.mass_L.data<double>()[layer] / sampled);
    result.topk_mass_of_best_per_layer.push_back(stats.best_mass_L.data<double>()[layer] / sampled);
    result.recall_per_layer.push_back(stats.recall_L.data<double>()[layer] / sampled);
    mass += result.topk_mass_per_layer.back();
    best += result.topk_mass_of_best_per_layer.back();
    recall += result.recall_per_layer.back();
  }
  result.indexer_kl = kl;
  result.topk_ties = Over(ties, rows * layers);
  if (const auto measured = static_cast<double>(result.recall_per_layer.size()); measured > 0) {
    result.topk_mass = mass / measured;
    result.topk_mass_of_best = best / measured;
    result.recall_at_k = recall / measured;
  }
}

// From sums to means.
StepResult Summarise(TrainingStage& stage, const StepBatch& batch, const StepStats& stats) {
  StepResult result;
  const Recipe& recipe = stage.recipe();
  if (recipe.language_loss) {
    result.lm_loss = Over(stats.lm_loss_1.data<double>()[0], batch.targets);
    if (stage.model().has_mtp())
      result.mtp_loss = Over(stats.mtp_loss_1.data<double>()[0], batch.mtp_targets);
    if (recipe.balance_weight > 0)
      result.balance_loss = Over(stats.balance_1.data<double>()[0], batch.sequences);
  }
  if (recipe.options.indexer_loss != IndexerLossKind::kNone)
    SummariseIndexer(stats, batch.rows, result);
  SummariseExperts(stage, stats, result);
  result.grad_norm_main = stage.optimizer().Norm(ClipGroup::kMain);
  result.grad_norm_indexer = stage.optimizer().Norm(ClipGroup::kIndexer);
  result.skipped = stage.optimizer().skipped();
  result.data_wait_seconds = batch.wait_seconds;
  return result;
}

// Adds each row's loss to its place in the sequence: row 0 of the sums, and counts in row 1.
void AddByPosition(const Batch& batch, const Tensor& loss_T, const Tensor& by_position_2L) {
  const int64_t length = batch.seq_length;
  for (int64_t row = 0; row < batch.num_rows(); ++row) {
    if (batch.targets_T.data<int32_t>()[row] < 0) continue;
    const double loss =
        loss_T.dtype() == DType::kF64 ? loss_T.data<double>()[row] : loss_T.data<float>()[row];
    by_position_2L.data<double>()[row % length] += loss;
    by_position_2L.data<double>()[length + row % length] += 1;
  }
}

absl::Status CheckScores(const StepStats& stats) {
  if (stats.nan_rows_1.data<int64_t>()[0] == 0) return absl::OkStatus();
  return NumericsError(
      "indexer scores held a NaN in ", stats.nan_rows_1.data<int64_t>()[0],
      " of the step's (microbatch, layer) pairs: no keys can be selected. Weights or activations "
      "are not "
      "finite any more; go back to an earlier checkpoint (checkpoint.resume: PATH) and lower the "
      "learning rate");
}

}  // namespace

absl::StatusOr<StepResult> TrainStep(TrainingStage& stage, const StepPosition& position, double lr,
                                     bool measure_indexer) {
  ASSIGN_OR_RETURN(const StepBatch batch,
                   NextBatch(stage, stage.train_data(), position.consumed_samples));
  PassOptions pass;
  pass.scales = MakeScales(stage.recipe(), batch);
  pass.measure_indexer = measure_indexer;
  StepStats stats = NewStats(stage);

  Optimizer& optimizer = stage.optimizer();
  optimizer.ZeroGradients();
  RunProgram(stage, batch, pass, stats);
  ReduceStats(*stage.axes().dp, stats);
  RETURN_IF_ERROR(CheckScores(stats));
  optimizer.ReduceGradients();
  optimizer.ComputeNorms();
  optimizer.Update(lr, position.stage_step + 1);
  optimizer.GatherParameters();
  if (!optimizer.skipped()) UpdateRouterBias(stage, stats);
  return Summarise(stage, batch, stats);
}

absl::StatusOr<ValidationResult> Validate(TrainingStage& stage, const ValidationRequest& request) {
  CHECK(stage.validation_data() != nullptr);
  const ModelContext context = stage.model_context(request.options);
  const int64_t length = stage.config().data.seq_length;
  PassOptions pass;
  pass.train = false;
  pass.measure_indexer = request.measure_indexer;
  StepStats stats = NewStats(stage);
  const Tensor by_position_2L =
      stage.context().Zeros(DType::kF64, {2, length});  // sums, then counts
  int64_t targets = 0, mtp_targets = 0;
  for (int64_t step = 0; step < request.steps; ++step) {
    ASSIGN_OR_RETURN(const StepBatch batch, NextBatch(stage, *stage.validation_data(),
                                                      step * stage.config().global_batch_size));
    for (const Batch& microbatch : batch.microbatches) {
      Model::Saved saved;
      stage.model().Forward(context, microbatch, pass, stats, saved);
      AddByPosition(microbatch, saved.lm_loss_T, by_position_2L);
    }
    targets += batch.targets;
    mtp_targets += batch.mtp_targets;
  }
  ReduceStats(*stage.axes().dp, stats);
  stage.axes().dp->AllReduce("loss by position", by_position_2L);
  RETURN_IF_ERROR(CheckScores(stats));
  ValidationResult result;
  result.lm_loss = Over(stats.lm_loss_1.data<double>()[0], targets);
  if (stage.model().has_mtp())
    result.mtp_loss = Over(stats.mtp_loss_1.data<double>()[0], mtp_targets);
  const double* sums = by_position_2L.data<double>();
  for (int64_t i = 0; i < length; ++i) {
    result.lm_loss_by_position.push_back(sums[length + i] == 0 ? 0 : sums[i] / sums[length + i]);
  }
  StepResult indexer;
  SummariseIndexer(stats, 0, indexer);
  result.topk_mass_per_layer = indexer.topk_mass_per_layer;
  result.topk_mass_of_best_per_layer = indexer.topk_mass_of_best_per_layer;
  result.recall_per_layer = indexer.recall_per_layer;
  return result;
}

}  // namespace baleen
