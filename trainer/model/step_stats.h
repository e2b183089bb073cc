// What one step adds up on a rank over its microbatches; ranks add theirs, then the trainer divides
// once.
#pragma once

#include "kernels/core/context.h"
#include "trainer/model/model_context.h"

namespace baleen {

// Layers count the blocks and then the MTP module: index num_hidden_layers is the MTP's.
struct StepStats {
  Tensor lm_loss_1;   // kF64: sum over valid targets
  Tensor mtp_loss_1;  // kF64: sum over valid MTP targets
  Tensor balance_1;   // kF64: sum over sequences and MoE layers of sum_i f_i P_i (without alpha)
  Tensor kl_L;        // kF64: sum over query rows
  Tensor expert_counts_LE;  // kI64: tokens of each expert; rows of dense layers stay 0
  // On sampled rows, where the step measures the indexers:
  Tensor mass_L, best_mass_L, recall_L;  // kF64: sums over the sampled rows
  Tensor sampled_rows_L;                 // kF64, in host memory: the host counts them
  Tensor ties_L;                         // kF64: keys cut by a tie, over all rows
  // kI64: sum over rows of a hash of (row of the microbatch, selected keys): the same number on two
  // layouts, or in two runs, says that they selected the same keys.
  Tensor selection_hash_L;
  Tensor nan_rows_1;  // kI64: microbatches and layers whose scores held a NaN

  static StepStats Zeros(const Context& context, int64_t num_layers_with_mtp, int64_t num_experts) {
    StepStats stats;
    for (Tensor* scalar : {&stats.lm_loss_1, &stats.mtp_loss_1, &stats.balance_1}) {
      *scalar = context.Zeros(DType::kF64, {1});
    }
    stats.sampled_rows_L = context.Host().Zeros(DType::kF64, {num_layers_with_mtp});
    for (Tensor* per_layer :
         {&stats.kl_L, &stats.mass_L, &stats.best_mass_L, &stats.recall_L, &stats.ties_L}) {
      *per_layer = context.Zeros(DType::kF64, {num_layers_with_mtp});
    }
    stats.expert_counts_LE = context.Zeros(DType::kI64, {num_layers_with_mtp, num_experts});
    stats.selection_hash_L = context.Zeros(DType::kI64, {num_layers_with_mtp});
    stats.nan_rows_1 = context.Zeros(DType::kI64, {1});
    return stats;
  }
};

// What the forward pass of a microbatch is for.
struct PassOptions {
  LossScales scales;
  bool train = true;             // false: losses only (validation)
  bool measure_indexer = false;  // sample rows and compare the selection with the dense attention
  int64_t sampled_rows = 32;     // of a microbatch and layer, spread evenly
};

}  // namespace baleen
