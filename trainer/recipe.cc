#include "trainer/recipe.h"

#include <algorithm>
#include <bit>

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

namespace {

// FLOP over TFLOP/s, bytes over TB/s: times 1e-6, both are microseconds.
double ProductMicroseconds(double flops) { return 1e-6 * flops / kProjectionTflops; }
double MemoryMicroseconds(double bytes) { return 1e-6 * bytes / kMemoryTerabytesPerSecond; }

// Of a row of one head: q~ = W_UK^T q and o = W_UV o~ in each run of the forward; dq, do~ and both
// halves of dW_kvb in the backward.
double AbsorbedProjections(const ModelConfig& model, double bytes, int runs) {
  const int64_t elements = model.qk_nope_head_dim + model.v_head_dim + 2 * model.kv_lora_rank;
  return (runs + 2) * MemoryMicroseconds(bytes * static_cast<double>(elements));
}

// Of a key of one head: kv_b_proj and the copies into k and v in each run, its gradients and one
// copy in the backward.
double ExpandedProjections(const ModelConfig& model, double bytes, int runs) {
  const int64_t kv = model.qk_nope_head_dim + model.v_head_dim;
  const int64_t k_and_v = model.qk_head_dim() + model.v_head_dim;
  return (runs + 2) * ProductMicroseconds(static_cast<double>(2 * model.kv_lora_rank * kv)) +
         MemoryMicroseconds(bytes * static_cast<double>(runs * (kv + k_and_v) + 2 * kv));
}

}  // namespace

AttentionCost SelectedAttentionCostOnGpu(const StageConfig& stage, const ModelConfig& model,
                                         DType dtype) {
  const double heads = static_cast<double>(
      std::max<int64_t>(1, model.num_attention_heads / stage.parallelism.tensor));
  const double mean_keys = static_cast<double>(stage.data.seq_length + 1) / 2;
  const double selected = std::min(mean_keys, static_cast<double>(model.index_topk));
  const double bytes = DTypeBytes(dtype);
  const auto core = [&](double keys, int64_t width, int64_t value_dim, int runs,
                        const AttentionSpeed& speed) {
    const double pairs = 2 * keys * heads;
    const double forward = pairs * static_cast<double>(width + value_dim);
    const double backward = pairs * static_cast<double>(3 * width + 2 * value_dim);
    return 1e-6 * (runs * forward / speed.forward + backward / speed.backward);
  };
  // How often a step's forward runs: of the masked form again, with o_proj, where all is made
  // again; of the absorbed one wherever anything is, because o~ is too wide to keep (block.cc).
  const bool none = stage.recompute == Recompute::kNone, full = stage.recompute == Recompute::kFull;
  const int masked_runs = full ? 2 : 1, expanded_runs = none ? 1 : 2, sparse_runs = none ? 1 : 2;
  AttentionCost cost;
  cost.masked_dense = core(mean_keys, model.qk_head_dim(), model.v_head_dim, masked_runs,
                           MaskedAttentionSpeed(dtype, model.qk_head_dim(), model.v_head_dim,
                                                stage.data.seq_length)) +
                      heads * static_cast<double>(stage.parallelism.context) *
                          ExpandedProjections(model, bytes, expanded_runs);
  if (full) {
    cost.masked_dense +=
        ProductMicroseconds(2 * heads * static_cast<double>(model.v_head_dim * model.hidden_size));
  }
  cost.sparse = core(selected, model.latent_dim(), model.kv_lora_rank, sparse_runs,
                     SparseAttentionSpeed(dtype, static_cast<int64_t>(heads), model.latent_dim(),
                                          model.kv_lora_rank, model.index_topk)) +
                heads * AbsorbedProjections(model, bytes, sparse_runs);
  return cost;
}

namespace {

AttentionForm ChooseForm(const StageConfig& stage, const ModelConfig& model, DeviceKind device,
                         std::string& why) {
  const bool gpu = device == DeviceKind::kCuda;
  const AttentionCost cost =
      gpu ? SelectedAttentionCostOnGpu(stage, model, ComputeDType(stage.precision, device))
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
  if (stage.dsa.hadamard && !std::has_single_bit(static_cast<uint64_t>(model.index_head_dim))) {
    return ConfigError("stage '", stage.name,
                       "': dsa.hadamard = true needs an index_head_dim that ",
                       "is a power of two, found ", model.index_head_dim);
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
