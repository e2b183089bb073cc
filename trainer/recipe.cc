#include "trainer/recipe.h"

#include <algorithm>

#include "absl/strings/str_format.h"

namespace baleen {

ModelConfig EffectiveModel(const ModelConfig& model, const DsaConfig& dsa) {
  ModelConfig effective = model;
  effective.index_topk = dsa.index_topk.value_or(model.index_topk);
  effective.index_n_heads = dsa.index_n_heads.value_or(model.index_n_heads);
  effective.index_head_dim = dsa.index_head_dim.value_or(model.index_head_dim);
  return effective;
}

AttentionCost SelectedAttentionCost(const ModelConfig& model, int64_t seq_length) {
  const double mean_keys = static_cast<double>(seq_length + 1) / 2;
  const double selected = std::min(mean_keys, static_cast<double>(model.index_topk));
  return {.masked_dense = mean_keys * static_cast<double>(model.qk_head_dim() + model.v_head_dim),
          .sparse = selected * static_cast<double>(model.latent_dim() + model.kv_lora_rank)};
}

namespace {

AttentionForm ChooseForm(const StageConfig& stage, const ModelConfig& model, std::string& why) {
  const AttentionCost cost = SelectedAttentionCost(model, stage.data.seq_length);
  const bool sparse_is_cheaper = cost.sparse <= cost.masked_dense;
  const std::string numbers = absl::StrFormat(
      "%.0f multiply-adds a row and head absorbed, %.0f masked", cost.sparse, cost.masked_dense);
  switch (stage.dsa.kernel) {
    case AttentionKernel::kSparse:
      why = absl::StrCat("sparse (asked for; ", numbers, ")");
      return AttentionForm::kSparse;
    case AttentionKernel::kMaskedDense:
      why = absl::StrCat("masked_dense (asked for; ", numbers, ")");
      return AttentionForm::kMaskedDense;
    case AttentionKernel::kAuto:
      break;
  }
  why = absl::StrCat(sparse_is_cheaper ? "sparse" : "masked_dense", " (auto: ", numbers, ")");
  return sparse_is_cheaper ? AttentionForm::kSparse : AttentionForm::kMaskedDense;
}

RecomputeMode Mode(Recompute recompute) {
  switch (recompute) {
    case Recompute::kNone:
      return RecomputeMode::kNone;
    case Recompute::kSelective:
      return RecomputeMode::kSelective;
    case Recompute::kFull:
      return RecomputeMode::kFull;
  }
  return RecomputeMode::kNone;
}

}  // namespace

absl::StatusOr<Recipe> MakeRecipe(const StageConfig& stage, const ModelConfig& model) {
  const bool sparse = stage.attention == AttentionMode::kSparse;
  const bool all = stage.train == TrainMode::kAll;
  if (sparse && !all) {
    return ConfigError(
        "stage '", stage.name, "': attention: sparse with train: indexer is not a recipe; ",
        "the indexer alone learns under dense attention (attention: dense, train: indexer), ",
        "and together with the model under sparse attention (attention: sparse, train: all)");
  }
  Recipe recipe;
  recipe.options.hadamard = stage.dsa.hadamard;
  recipe.options.indexer_precision = stage.dsa.indexer_dtype == IndexerDType::kFp8
                                         ? IndexerPrecision::kFp8
                                         : IndexerPrecision::kFull;
  recipe.options.recompute = Mode(stage.recompute);
  recipe.kernel = "dense";
  if (sparse) {
    recipe.options.attention = ChooseForm(stage, model, recipe.kernel);
    recipe.options.indexer_loss = IndexerLossKind::kSparse;
    recipe.trained = {ParameterGroup::kMain, ParameterGroup::kTensor, ParameterGroup::kEmbedding,
                      ParameterGroup::kExpert, ParameterGroup::kIndexer};
  } else if (all) {
    recipe.trained = {ParameterGroup::kMain, ParameterGroup::kTensor, ParameterGroup::kEmbedding,
                      ParameterGroup::kExpert};
    recipe.use_indexer = false;
  } else {
    recipe.options.indexer_loss = IndexerLossKind::kDense;
    recipe.trained = {ParameterGroup::kIndexer};
    recipe.forward_only = true;
    recipe.language_loss = false;
  }
  if (all) {
    recipe.mtp_weight = stage.losses.mtp;
    recipe.balance_weight = stage.losses.balance;
    recipe.bias_update_speed = stage.router.bias_update_speed;
  }
  recipe.indexer_weight = stage.dsa.indexer_loss_coeff;
  return recipe;
}

}  // namespace baleen
