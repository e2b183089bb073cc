#include "trainer/banner.h"

#include <algorithm>
#include <numeric>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "kernels/core/cuda_context.h"
#include "kernels/ops/attention/attention.h"
#include "kernels/ops/attention/sparse_attention.h"
#include "kernels/ops/indexer/indexer_loss.h"
#include "kernels/ops/indexer/indexer_scores.h"
#include "kernels/ops/indexer/topk_select.h"
#include "trainer/flops.h"
#include "trainer/model/linear.h"

namespace baleen {
namespace {

std::string Bytes(int64_t bytes) {
  if (bytes < (int64_t{1} << 20))
    return absl::StrFormat("%.1f KiB", static_cast<double>(bytes) / 1024);
  if (bytes < (int64_t{1} << 30))
    return absl::StrFormat("%.1f MiB", static_cast<double>(bytes) / (1 << 20));
  return absl::StrFormat("%.2f GiB", static_cast<double>(bytes) / (1 << 30));
}

std::string TrainedText(const Recipe& recipe) {
  std::vector<std::string> names;
  for (const ParameterGroup group : recipe.trained) names.push_back(ParameterGroupName(group));
  return absl::StrJoin(names, ", ");
}

// What a layout means beyond its grid: the schedule and its layers, chunks and rounds.
std::string LayoutText(TrainingStage& stage) {
  const StageLayout& layout = stage.layout();
  const ModelOptions& options = stage.recipe().options;
  std::string text;
  if (layout.part_rank.size() > 1) {
    absl::StrAppend(&text, "pipeline  ", std::string(Name(layout.schedule.policy)), ", ",
                    layout.schedule.num_microbatches, " microbatches a step\n");
    for (absl::string_view line :
         absl::StrSplit(LayerSplitTable(layout.layer_split, layout.costs, layout.part_rank), '\n',
                        absl::SkipEmpty())) {
      absl::StrAppend(&text, "          ", line, "\n");
    }
  }
  absl::StrAppend(&text, "rows      ", layout.rows_per_rank,
                  " of a microbatch on this rank; chunks: ", options.attention_chunk,
                  " in attention, ", options.query_chunk, " of scores, ", options.mlp_chunk,
                  " in MLPs, ", options.head_chunk, " in the head");
  if (layout.grid.ep_size() > 1) {
    absl::StrAppend(&text, "; experts take in ",
                    layout.expert_rows > 0 ? absl::StrCat("at most ", layout.expert_rows) : "all",
                    " rows at once",
                    layout.expert_node_size > 0
                        ? absl::StrCat(", two hops over nodes of ", layout.expert_node_size)
                        : "");
  }
  return text + "\n";
}

std::string DeviceText(TrainingStage& stage) {
  const std::string dtype(DTypeName(stage.dtype()));
  if constexpr (kHaveCuda) {
    if (stage.context().device().kind == DeviceKind::kCuda) {
      const CudaProperties& gpu = stage.context().cuda().properties();
      return absl::StrCat("device    ", gpu.name, ", ", gpu.num_sms, " SMs, ",
                          Bytes(gpu.total_bytes), "; activations and working weights ", dtype,
                          ", sums, gradients and master weights F32\n");
    }
  }
  return absl::StrCat("device    CPU, all in ", dtype, "\n");
}

// Which projections are multiplied in FP8, and which are not although the stage asks for it.
std::string Fp8Text(TrainingStage& stage) {
  std::vector<std::string> inside, outside;
  for (const ProjectionKind& kind : ProjectionKinds(stage.parameters())) {
    if (kind.fits) {
      inside.push_back(kind.name);
    } else {
      outside.push_back(absl::StrCat(kind.name, " ", ShapeString(kind.shape)));
    }
  }
  const std::string dtype(DTypeName(stage.dtype()));
  return absl::StrCat(
      "gemm      fp8_block",
      stage.context().device().kind == DeviceKind::kCpu ? " (simulated)" : "",
      ", E4M3 with power-of-two scales, 1x128 (activations, gradients) and 128x128 (weights): ",
      inside.empty() ? "none" : absl::StrJoin(inside, ", "), "\n          in ", dtype,
      ": experts' weight gradients, kv_b_proj absorbed into sparse attention, indexer, eh_proj, "
      "head",
      outside.empty() ? ""
                      : absl::StrCat("; widths that are no multiples of ", kFp8RowMultiple, ": ",
                                     absl::StrJoin(outside, ", ")),
      "; router's gate and sums F32\n");
}

bool MultipliesFp8Codes(TrainingStage& stage) {
  const ModelConfig& model = stage.model_config();
  return stage.recipe().options.indexer_precision == IndexerPrecision::kFp8 &&
         HasFp8IndexerScores(stage.dtype(), model.index_n_heads, model.index_head_dim);
}

std::string IndexerPrecisionText(TrainingStage& stage) {
  if (stage.recipe().options.indexer_precision == IndexerPrecision::kFull) return "full precision";
  return MultipliesFp8Codes(stage) ? "fp8 (scores of E4M3 codes, loss of their values)"
                                   : "fp8 simulated";
}

// What runs on a GPU for this model's shapes: kernels are chosen by shape and dtype alone.
std::string CudaKernelText(TrainingStage& stage) {
  const ModelConfig& model = stage.model_config();
  const ModelOptions& options = stage.recipe().options;
  const DType dtype = stage.dtype();
  const auto heads = model.num_attention_heads / stage.axes().tp->size();
  std::string text;
  if (options.attention == AttentionForm::kSparse) {
    text = absl::StrCat("sparse attention: ",
                        SparseAttentionKernelName(dtype, heads, model.latent_dim(),
                                                  model.kv_lora_rank, model.index_topk));
  } else if (options.attention == AttentionForm::kMaskedDense) {
    text = absl::StrCat("masked attention: ",
                        MaskedAttentionKernelName(dtype, model.qk_head_dim(), model.v_head_dim));
  } else if (options.attention == AttentionForm::kDense) {
    // One sequence's causal rows, a chunk of them.
    const int64_t rows = std::min(stage.config().data.seq_length, options.attention_chunk);
    std::vector<int32_t> ends(rows);
    std::iota(ends.begin(), ends.end(), 1);
    text = absl::StrCat(
        "attention: ",
        AttentionKernelName(stage.context(), dtype, model.qk_head_dim(), model.v_head_dim,
                            MakeKeyWindows(stage.context(), std::vector<int32_t>(rows, 0), ends)));
  }
  if (!stage.recipe().use_indexer) return text;
  absl::StrAppend(&text, "; indexer scores: ",
                  MultipliesFp8Codes(stage)
                      ? IndexerScoresFp8KernelName()
                      : IndexerScoresKernelName(dtype, model.index_n_heads, model.index_head_dim),
                  "; top-k: ", TopkSelectKernelName());
  if (options.indexer_loss == IndexerLossKind::kSparse) {
    absl::StrAppend(&text, "; indexer loss: ",
                    SparseIndexerLossKernelName(dtype, model.index_n_heads, model.index_head_dim,
                                                model.index_topk));
  } else if (options.indexer_loss == IndexerLossKind::kDense) {
    absl::StrAppend(&text, "; indexer loss: ",
                    DenseIndexerLossKernelName(dtype, model.index_n_heads, model.index_head_dim,
                                               model.qk_head_dim()));
  }
  return text;
}

}  // namespace

std::string SourceSummaryText(const WeightSource& source) {
  const FrozenSource frozen = source.AsFrozenSource();
  if (source.checkpoint() == nullptr) {
    return absl::StrCat("model     ", frozen.path, ": random weights from run.seed");
  }
  const Accounting& accounting = source.accounting();
  std::string text =
      absl::StrCat("model     ", frozen.path, ": ", accounting.loaded.size(), " tensors loaded, ",
                   accounting.initialised.size(), " initialised, ", accounting.ignored.size(),
                   " ignored (list: baleen inspect ", frozen.path, ")");
  if (!accounting.initialised.empty()) {
    absl::StrAppend(&text, "\n          the indexers are new: untrained until a stage trains them");
  }
  return text;
}

std::string StageBanner(TrainingStage& stage) {
  const StageConfig& config = stage.config();
  const Recipe& recipe = stage.recipe();
  const TokenFlops flops = ModelFlopsPerToken(stage.model_config(), recipe, config.data.seq_length);
  std::string text =
      absl::StrCat("stage     ", config.name, ": attention ", std::string(Name(config.attention)),
                   ", trains ", TrainedText(recipe), ", ", config.steps, " steps\n");
  absl::StrAppend(&text, DeviceText(stage));
  absl::StrAppend(&text, "grid      ", stage.grid().DebugString(), "\n", LayoutText(stage));
  absl::StrAppend(&text, "batch     ", config.global_batch_size, " sequences x ",
                  config.data.seq_length, " = ", config.global_batch_size * config.data.seq_length,
                  " tokens a step, micro batch ", config.micro_batch_size, "\n");
  for (const SourceSummary& source : stage.train_data().Summary()) {
    absl::StrAppend(&text, "data      ", source.path, ": ", source.num_documents, " documents, ",
                    source.num_tokens, " tokens, ", absl::StrFormat("%.1f%%", 100 * source.share),
                    "\n");
  }
  absl::StrAppend(&text, "kernels   attention ", recipe.kernel);
  if (recipe.use_indexer) {
    absl::StrAppend(&text, "; indexer ", IndexerPrecisionText(stage),
                    recipe.options.hadamard ? " with Hadamard" : "");
  }
  text += "\n";
  if (stage.context().device().kind == DeviceKind::kCuda) {
    absl::StrAppend(&text, "          ", CudaKernelText(stage), "\n");
  }
  if (recipe.options.gemm == GemmKind::kFp8Block) absl::StrAppend(&text, Fp8Text(stage));
  absl::StrAppend(&text, "memory    this rank holds");
  for (const auto& [use, bytes] : stage.context().pool().Uses()) {
    absl::StrAppend(&text, " ", use, " ", Bytes(bytes.bytes), ";");
  }
  absl::StrAppend(&text, absl::StrFormat(" before activations\nwork      %.3g model FLOPs a token",
                                         flops.total));
  return text;
}

StepRecord MakeStepRecord(TrainingStage& stage, const RunPosition& position,
                          const StepResult& result, double lr, double seconds,
                          int64_t memory_peak_bytes) {
  const StageConfig& config = stage.config();
  const auto tokens = static_cast<double>(config.global_batch_size * config.data.seq_length);
  const TokenFlops flops =
      ModelFlopsPerToken(stage.model_config(), stage.recipe(), config.data.seq_length);
  StepRecord record;
  record.step = position.step;
  record.stage = config.name;
  record.stage_step = position.stage_step;
  record.stage_steps = config.steps;
  record.consumed_tokens = position.consumed_tokens;
  record.lm_loss = result.lm_loss;
  record.mtp_loss = result.mtp_loss;
  record.balance_loss = result.balance_loss;
  record.indexer_kl = result.indexer_kl;
  record.grad_norm_main = result.grad_norm_main;
  record.grad_norm_indexer = result.grad_norm_indexer;
  record.lr = lr;
  record.step_seconds = seconds;
  record.tokens_per_second = tokens / seconds;
  record.tokens_per_second_per_device = record.tokens_per_second / stage.world().size();
  record.model_tflops = flops.total * record.tokens_per_second / 1e12;
  record.memory_peak_bytes = memory_peak_bytes;
  record.expert_load_max_over_mean = result.expert_load_max_over_mean;
  record.expert_load_min = result.expert_load_min;
  if (result.measured) record.expert_load = result.expert_load;
  record.topk_mass = result.topk_mass;
  record.topk_mass_of_best = result.topk_mass_of_best;
  record.recall_at_k = result.recall_at_k;
  record.topk_ties = result.topk_ties;
  if (result.selection_hash) {
    record.selection_hash =
        absl::StrFormat("%016x", static_cast<unsigned long long>(*result.selection_hash));
  }
  record.indexer_kl_per_layer = result.indexer_kl_per_layer;
  record.topk_mass_per_layer = result.topk_mass_per_layer;
  record.topk_mass_of_best_per_layer = result.topk_mass_of_best_per_layer;
  record.recall_at_k_per_layer = result.recall_per_layer;
  record.data_wait_seconds = result.data_wait_seconds;
  record.skipped_steps = position.skipped_steps;
  record.skipped = result.skipped;
  return record;
}

}  // namespace baleen
