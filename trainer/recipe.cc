#include "trainer/recipe.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "kernels/ops/attention/attention_speed.h"

namespace baleen {

ModelConfig EffectiveModel(const ModelConfig& model, const DsaConfig& dsa) {
  ModelConfig effective = model;
  effective.index_topk = dsa.index_topk.value_or(model.index_topk);
  effective.index_n_heads = dsa.index_n_heads.value_or(model.index_n_heads);
  effective.index_head_dim = dsa.index_head_dim.value_or(model.index_head_dim);
  return effective;
}

DType ComputeDType(const PrecisionConfig& precision, DeviceKind device) {
  switch (precision.compute) {
    case Compute::kFp64:
      return DType::kF64;
    case Compute::kFp32:
      return DType::kF32;
    case Compute::kBf16:
      return DType::kBF16;
    case Compute::kAuto:
      break;
  }
  return device == DeviceKind::kCuda ? DType::kBF16 : DType::kF32;
}

AttentionCost SelectedAttentionCost(const ModelConfig& model, int64_t seq_length) {
  const double mean_keys = static_cast<double>(seq_length + 1) / 2;
  const double selected = std::min(mean_keys, static_cast<double>(model.index_topk));
  return {.masked_dense = mean_keys * static_cast<double>(model.qk_head_dim() + model.v_head_dim),
          .sparse = selected * static_cast<double>(model.latent_dim() + model.kv_lora_rank)};
}

AttentionCost SelectedAttentionCostOnGpu(const ModelConfig& model, int64_t seq_length,
                                         int64_t heads, DType dtype) {
  const double mean_keys = static_cast<double>(seq_length + 1) / 2;
  const double selected = std::min(mean_keys, static_cast<double>(model.index_topk));
  // FLOP over TFLOP/s, times 1e-6, are microseconds.
  const auto microseconds = [&](double keys, int64_t width, int64_t value_dim,
                                const AttentionSpeed& speed) {
    const double pairs = 2 * keys * static_cast<double>(heads);
    const double forward = pairs * static_cast<double>(width + value_dim);
    const double backward = pairs * static_cast<double>(3 * width + 2 * value_dim);
    return 1e-6 * (forward / speed.forward + backward / speed.backward);
  };
  return {.masked_dense = microseconds(
              mean_keys, model.qk_head_dim(), model.v_head_dim,
              MaskedAttentionSpeed(dtype, model.qk_head_dim(), model.v_head_dim, seq_length)),
          .sparse = microseconds(selected, model.latent_dim(), model.kv_lora_rank,
                                 SparseAttentionSpeed(dtype, heads, model.latent_dim(),
                                                      model.kv_lora_rank, model.index_topk))};
}

namespace {

AttentionForm ChooseForm(const StageConfig& stage, const ModelConfig& model, DeviceKind device,
                         std::string& why) {
  const bool gpu = device == DeviceKind::kCuda;
  const AttentionCost cost =
      gpu ? SelectedAttentionCostOnGpu(
                model, stage.data.seq_length,
                std::max<int64_t>(1, model.num_attention_heads / stage.parallelism.tensor),
                ComputeDType(stage.precision, device))
          : SelectedAttentionCost(model, stage.data.seq_length);
  const bool sparse_is_cheaper = cost.sparse <= cost.masked_dense;
  const std::string numbers =
      gpu ? absl::StrFormat("%.3g us a row absorbed, %.3g masked", cost.sparse, cost.masked_dense)
          : absl::StrFormat("%.0f multiply-adds a row and head absorbed, %.0f masked", cost.sparse,
                            cost.masked_dense);
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

// Query rows of a chunk in the 192/128 form. One chunk's key gradients are complete, so that they
// are written once, in bf16; several add theirs to fp32 sums of all keys before them, 2.5 KB a key
// and head each time. The expanded rows of the longest single chunk take as much as those sums, and
// are a fifth as wide as absorbed ones. Where weight gradients are delayed, though, a sequence of
// one chunk would keep them till then.
int64_t DenseAttentionChunk(const StageConfig& stage) {
  constexpr int64_t kLongestChunk = 32768, kChunkOfSeveral = 16384;
  const int64_t rows = stage.micro_batch_size * stage.data.seq_length /
                       std::max<int64_t>(1, stage.parallelism.context);
  return rows <= kLongestChunk ? kLongestChunk : kChunkOfSeveral;
}

// Where the schedule takes both backward actions of a microbatch at once. On several pipeline ranks
// the gradient of the input leaves first, unless a full recompute would hold every block for that.
bool WeightsWithInput(const StageConfig& stage) {
  const ScheduleName schedule = stage.parallelism.schedule;
  const bool together = schedule == ScheduleName::kGpipe || schedule == ScheduleName::k1F1B ||
                        schedule == ScheduleName::kInterleaved;
  return together && (stage.parallelism.pipeline == 1 || stage.recompute == Recompute::kFull);
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

absl::StatusOr<Recipe> MakeRecipe(const StageConfig& stage, const ModelConfig& model,
                                  DeviceKind device) {
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
  recipe.options.gemm =
      stage.precision.gemm == GemmPrecision::kFp8Block ? GemmKind::kFp8Block : GemmKind::kCompute;
  recipe.options.recompute = Mode(stage.recompute);
  recipe.options.weights_with_input = WeightsWithInput(stage);
  recipe.kernel = "dense";
  if (sparse) {
    recipe.options.attention = ChooseForm(stage, model, device, recipe.kernel);
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
  if (recipe.options.attention != AttentionForm::kSparse && recipe.options.weights_with_input) {
    recipe.options.attention_chunk = DenseAttentionChunk(stage);
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
