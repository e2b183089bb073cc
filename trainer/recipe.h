// Recipe: what a training stage of the run file means for the step: the form of attention, what
// trains, which losses. The step asks the recipe's values, never which recipe it is.
#pragma once

#include <string>
#include <vector>

#include "configs/schema/model_config.h"
#include "configs/schema/run_config.h"
#include "trainer/model/model_context.h"

namespace baleen {

struct Recipe {
  ModelOptions options;
  std::vector<ParameterGroup> trained;  // groups with gradients and optimizer state
  bool forward_only = false;            // warm-up: no head, no backward through the model
  bool language_loss = true;            // LM and MTP losses exist
  bool use_indexer = true;              // the indexers are part of the model
  double mtp_weight = 0;                // lambda
  double balance_weight = 0;            // alpha
  double indexer_weight = 0;            // indexer_loss_coeff
  double bias_update_speed = 0;         // gamma; 0 leaves e_score_correction_bias alone
  std::string kernel;                   // which attention kernel runs and why, for the banner
};

// The three recipes: (dense, indexer) = warm-up, (sparse, all), (dense, all). ConfigError for
// (sparse, indexer).
absl::StatusOr<Recipe> MakeRecipe(const StageConfig& stage, const ModelConfig& model);

// The model of a stage: the checkpoint's sizes, with the `dsa` section's where it overrides or the
// checkpoint has none.
ModelConfig EffectiveModel(const ModelConfig& model, const DsaConfig& dsa);

// Multiply-adds of one query row and head with all causal keys in the 192/128 form, and with the
// selected keys in the absorbed form (kernels.md B4): the cheaper one runs where dsa.kernel is
// auto.
struct AttentionCost {
  double masked_dense = 0;
  double sparse = 0;
};
AttentionCost SelectedAttentionCost(const ModelConfig& model, int64_t seq_length);

}  // namespace baleen
