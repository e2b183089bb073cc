// One optimizer step, from the next batch to updated parameters; and one validation pass.
#pragma once

#include <optional>
#include <vector>

#include "trainer/step_watch.h"
#include "trainer/training_stage.h"

namespace baleen {

// Means over the step's valid tokens and query rows; what does not apply to the recipe is absent.
struct StepResult {
  std::optional<double> lm_loss, mtp_loss, balance_loss, indexer_kl;
  std::vector<double> indexer_kl_per_layer;
  std::optional<double> grad_norm_main, grad_norm_indexer;
  bool skipped = false;  // a gradient was not finite: nothing was updated
  bool measured =
      false;  // a step of metrics.indexer_interval: the wide measures belong in the record
  std::optional<double> expert_load_max_over_mean, expert_load_min;
  std::optional<double> topk_mass, topk_mass_of_best, recall_at_k, topk_ties;
  // Of all selected keys of the step: equal on every layout and in every run that selects alike.
  std::optional<uint64_t> selection_hash;
  std::vector<double> topk_mass_per_layer, topk_mass_of_best_per_layer, recall_per_layer;
  std::vector<std::vector<double>>
      expert_load;  // by MoE layer: share of tokens of each expert over the mean
  double data_wait_seconds = 0;
};

// Where the step stands: data is a function of consumed_samples, Adam's correction of stage_step.
struct StepPosition {
  int64_t stage_step = 0;        // steps of this stage done before
  int64_t consumed_samples = 0;  // of the whole run
};

absl::StatusOr<StepResult> TrainStep(
    TrainingStage& stage, const StepPosition& position, double lr, bool measure_indexer,
    const StepWatch& watch = [](StepPhase) {});

// Mean losses over `steps` global batches from the start of the validation data, under `options`
// (the stage's attention, or another form or selection). NumericsError if a score was NaN.
struct ValidationRequest {
  ModelOptions options;
  int64_t steps = 1;
  bool measure_indexer = false;  // options.indexer_loss must not be kNone
};
struct ValidationResult {
  double lm_loss = 0;
  std::optional<double> mtp_loss;
  std::vector<double> lm_loss_by_position;  // [seq_length]
  std::vector<double> topk_mass_per_layer, topk_mass_of_best_per_layer,
      recall_per_layer;  // where measured
};
absl::StatusOr<ValidationResult> Validate(TrainingStage& stage, const ValidationRequest& request);

}  // namespace baleen
