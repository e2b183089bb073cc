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
absl::StatusOr<Recipe> MakeRecipe(const StageConfig& stage, const ModelConfig& model,
                                  DeviceKind device = DeviceKind::kCpu);

// The model of a stage: the checkpoint's sizes, with the `dsa` section's where it overrides or the
// checkpoint has none.
ModelConfig EffectiveModel(const ModelConfig& model, const DsaConfig& dsa);

// What activations and working weights are kept in: as precision.compute says, and where that is
// auto, bf16 on GPUs and fp32 on the CPU.
DType ComputeDType(const PrecisionConfig& precision, DeviceKind device);

// What attention over selected keys costs one query row: all causal keys in the 192/128 form with
// the selection as a mask, or the selected keys in the absorbed form. The cheaper one runs where
// dsa.kernel is auto.
struct AttentionCost {
  double masked_dense = 0;
  double sparse = 0;
};
// On the CPU multiply-adds of a head, forward: its definitions do as many a second in both forms.
AttentionCost SelectedAttentionCost(const ModelConfig& model, int64_t seq_length);
// On GPUs microseconds of a rank's heads, forward and backward, at the kernels' measured speeds
// (kernels/ops/attention/attention_speed.h): the cores with what the stage recomputes of them, and
// the projections between heads and latents, which the forms do not share. A rank expands the keys
// of all ranks along context.
AttentionCost SelectedAttentionCostOnGpu(const StageConfig& stage, const ModelConfig& model,
                                         DType dtype);

}  // namespace baleen
