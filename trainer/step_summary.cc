#include "trainer/step_summary.h"

#include <algorithm>
#include <cmath>

namespace baleen {
namespace {

void SummariseExperts(TrainingStage& stage, const StepStats& stats, StepResult& result) {
  const int64_t experts = stage.model_config().n_routed_experts;
  double worst = 0, least = INFINITY;
  for (int64_t layer = 0; layer < stats.expert_counts_LE.dim(0); ++layer) {
    const int64_t* counts = stats.expert_counts_LE.data<int64_t>() + layer * experts;
    double total = 0;
    for (int64_t e = 0; e < experts; ++e) total += static_cast<double>(counts[e]);
    if (total == 0) continue;  // a dense layer
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

// Layer by layer, so that two layers that changed places do not cancel.
uint64_t HashOfSelections(const StepStats& stats) {
  uint64_t hash = 0;
  for (int64_t layer = 0; layer < stats.selection_hash_L.num_elements(); ++layer) {
    hash = (hash ^ static_cast<uint64_t>(stats.selection_hash_L.data<int64_t>()[layer])) *
           0x9E3779B97F4A7C15u;
    hash ^= hash >> 29;
  }
  return hash;
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

}  // namespace

double Over(double weight, int64_t count) {
  return count == 0 ? 0 : weight / static_cast<double>(count);
}

StepResult SummariseStep(TrainingStage& stage, const StepCounts& step, const StepStats& stats) {
  StepResult result;
  const Recipe& recipe = stage.recipe();
  if (recipe.language_loss) {
    result.lm_loss = Over(stats.lm_loss_1.data<double>()[0], step.targets);
    if (stage.model_config().num_nextn_predict_layers > 0)
      result.mtp_loss = Over(stats.mtp_loss_1.data<double>()[0], step.mtp_targets);
    if (recipe.balance_weight > 0)
      result.balance_loss = Over(stats.balance_1.data<double>()[0], step.sequences);
  }
  if (recipe.options.indexer_loss != IndexerLossKind::kNone)
    SummariseIndexer(stats, step.rows, result);
  if (recipe.options.attention != AttentionForm::kDense)
    result.selection_hash = HashOfSelections(stats);
  SummariseExperts(stage, stats, result);
  result.grad_norm_main = stage.optimizer().Norm(ClipGroup::kMain);
  result.grad_norm_indexer = stage.optimizer().Norm(ClipGroup::kIndexer);
  result.skipped = stage.optimizer().skipped();
  return result;
}

ValidationResult SummariseValidation(const ModelConfig& model, const StepCounts& passes,
                                     const StepStats& stats, const Tensor& by_position_2L) {
  ValidationResult result;
  result.lm_loss = Over(stats.lm_loss_1.data<double>()[0], passes.targets);
  if (model.num_nextn_predict_layers > 0)
    result.mtp_loss = Over(stats.mtp_loss_1.data<double>()[0], passes.mtp_targets);
  const double* sums = by_position_2L.data<double>();
  const int64_t length = by_position_2L.dim(1);
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
