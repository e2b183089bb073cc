#include "configs/schema/suggest.h"

#include <algorithm>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"

namespace baleen {
namespace {

using Pair = std::pair<absl::string_view, absl::string_view>;

// What users of other trainers write (lower case, '_' for '-'), and our path.
constexpr Pair kAliases[] = {
    {"tensor_model_parallel_size", "parallelism.tensor"},
    {"tensor_parallel_degree", "parallelism.tensor"},
    {"tensor_parallel_size", "parallelism.tensor"},
    {"model_parallel_size", "parallelism.tensor"},
    {"tp", "parallelism.tensor"},
    {"tp_size", "parallelism.tensor"},
    {"pipeline_model_parallel_size", "parallelism.pipeline"},
    {"pipeline_parallel_degree", "parallelism.pipeline"},
    {"pipeline_parallel_size", "parallelism.pipeline"},
    {"pipe_parallel_size", "parallelism.pipeline"},
    {"pp", "parallelism.pipeline"},
    {"pp_size", "parallelism.pipeline"},
    {"pp_engine", "parallelism.schedule"},
    {"pp_schedule", "parallelism.schedule"},
    {"pipeline_parallel_schedule", "parallelism.schedule"},
    {"virtual_pipeline_model_parallel_size", "parallelism.virtual_stages"},
    {"num_layers_per_virtual_pipeline_stage", "parallelism.virtual_stages"},
    {"pipeline_model_parallel_layout", "parallelism.layer_split"},
    {"expert_model_parallel_size", "parallelism.expert"},
    {"expert_parallel_degree", "parallelism.expert"},
    {"expert_parallel_size", "parallelism.expert"},
    {"ep", "parallelism.expert"},
    {"ep_size", "parallelism.expert"},
    {"context_parallel_degree", "parallelism.context"},
    {"context_parallel_size", "parallelism.context"},
    {"cp", "parallelism.context"},
    {"cp_size", "parallelism.context"},
    {"distributed", "parallelism"},
    {"local_batch_size", "micro_batch_size"},
    {"train_micro_batch_size_per_gpu", "micro_batch_size"},
    {"per_device_train_batch_size", "micro_batch_size"},
    {"train_batch_size", "stages[].global_batch_size"},
    {"batch_size", "stages[].global_batch_size"},
    {"gradient_accumulation_steps", "stages[].global_batch_size"},
    {"batch_accumulation_per_replica", "stages[].global_batch_size"},
    {"sequence_length", "data.seq_length"},
    {"seq_len", "data.seq_length"},
    {"sequence_len", "data.seq_length"},
    {"max_context_length", "data.seq_length"},
    {"cutoff_len", "data.seq_length"},
    {"data_path", "data.train"},
    {"dataset_path", "data.train"},
    {"train_data_paths", "data.train"},
    {"train_data_path", "data.train"},
    {"blend", "data.train"},
    {"valid_data_paths", "data.validation"},
    {"valid_data_path", "data.validation"},
    {"reset_attention_mask", "data.document_mask"},
    {"train_iters", "stages[].steps"},
    {"train_steps", "stages[].steps"},
    {"max_steps", "stages[].steps"},
    {"data_stages", "stages"},
    {"learning_rate", "optimizer.lr"},
    {"adam_beta1", "optimizer.betas"},
    {"adam_beta2", "optimizer.betas"},
    {"beta1", "optimizer.betas"},
    {"beta2", "optimizer.betas"},
    {"adam_betas", "optimizer.betas"},
    {"adam_eps", "optimizer.eps"},
    {"adam_epsilon", "optimizer.eps"},
    {"wd", "optimizer.weight_decay"},
    {"max_norm", "optimizer.clip_grad"},
    {"max_grad_norm", "optimizer.clip_grad"},
    {"gradient_clipping", "optimizer.clip_grad"},
    {"lr_scheduler", "lr_schedule"},
    {"scheduler", "lr_schedule"},
    {"learning_rate_scheduler", "lr_schedule"},
    {"lr_decay_style", "lr_schedule.style"},
    {"lr_scheduler_type", "lr_schedule.style"},
    {"decay_type", "lr_schedule.style"},
    {"lr_warmup_iters", "lr_schedule.warmup_steps"},
    {"lr_warmup_steps", "lr_schedule.warmup_steps"},
    {"warmup_ratio", "lr_schedule.warmup_steps"},
    {"warmup", "lr_schedule.warmup_steps"},
    {"lr_decay_iters", "lr_schedule.decay_steps"},
    {"lr_decay_steps", "lr_schedule.decay_steps"},
    {"decay_ratio", "lr_schedule.decay_steps"},
    {"min_decay_lr", "lr_schedule.min_lr"},
    {"min_lr_factor", "lr_schedule.min_lr"},
    {"dsa_indexer_topk", "dsa.index_topk"},
    {"topk", "dsa.index_topk"},
    {"dsa_indexer_n_heads", "dsa.index_n_heads"},
    {"dsa_indexer_head_dim", "dsa.index_head_dim"},
    {"dsa_indexer_loss_coeff", "dsa.indexer_loss_coeff"},
    {"dsa_indexer_rotate_activation", "dsa.hadamard"},
    {"dsa_kernel_backend", "dsa.kernel"},
    {"dtype", "precision.compute"},
    {"bf16", "precision.compute"},
    {"fp16", "precision.compute"},
    {"params_dtype", "precision.compute"},
    {"torch_dtype", "precision.compute"},
    {"mixed_precision", "precision.compute"},
    {"mixed_precision_param", "precision.compute"},
    {"fp8", "precision.gemm"},
    {"fp8_recipe", "precision.gemm"},
    {"mtp_loss_scaling_factor", "losses.mtp"},
    {"moe_aux_loss_coeff", "losses.balance"},
    {"aux_loss_alpha", "losses.balance"},
    {"moe_router_bias_update_rate", "router.bias_update_speed"},
    {"recompute_granularity", "recompute"},
    {"activation_checkpointing", "recompute"},
    {"activation_checkpoint", "recompute"},
    {"gradient_checkpointing", "recompute"},
    {"deterministic_mode", "deterministic"},
    {"checkpoints", "checkpoint"},
    {"save", "run.dir"},
    {"output_dir", "run.dir"},
    {"checkpoint_dir", "run.dir"},
    {"checkpoints_path", "run.dir"},
    {"job_name", "run.name"},
    {"run_name", "run.name"},
    {"save_interval", "checkpoint.interval"},
    {"save_steps", "checkpoint.interval"},
    {"checkpoint_interval", "checkpoint.interval"},
    {"ckpt_every_steps", "checkpoint.interval"},
    {"keep_latest_k", "checkpoint.keep"},
    {"save_total_limit", "checkpoint.keep"},
    {"keep_last_n_checkpoints", "checkpoint.keep"},
    {"load", "checkpoint.resume"},
    {"load_step", "checkpoint.resume"},
    {"resume_checkpoint_path", "checkpoint.resume"},
    {"resume_from_checkpoint", "checkpoint.resume"},
    {"exit_signal", "checkpoint.signal"},
    {"async_save", "checkpoint.async"},
    {"async_mode", "checkpoint.async"},
    {"initial_load_path", "model.checkpoint"},
    {"pretrained_checkpoint", "model.checkpoint"},
    {"model_name_or_path", "model.checkpoint"},
    {"base_model", "model.checkpoint"},
    {"eval_interval", "validation.interval"},
    {"eval_steps", "validation.interval"},
    {"val_check_interval", "validation.interval"},
    {"eval_iters", "validation.steps"},
    {"log_interval", "metrics.console"},
    {"logging_steps", "metrics.console"},
    {"log_freq", "metrics.console"},
    {"enable_tensorboard", "metrics.tensorboard"},
    {"tensorboard_dir", "metrics.tensorboard"},
};

constexpr Pair kWords[] = {{"gpu", "cuda"},          {"nvidia", "cuda"},
                           {"bfloat16", "bf16"},     {"float32", "fp32"},
                           {"float64", "fp64"},      {"double", "fp64"},
                           {"float", "fp32"},        {"full_attention", "dense"},
                           {"dsa", "sparse"},        {"fp8", "fp8_block"},
                           {"model", "all"},         {"everything", "all"},
                           {"vpp", "interleaved"},   {"zero_bubble", "zb_h1"},
                           {"zbvzerobubble", "zbv"}, {"sigusr1", "USR1"},
                           {"sigusr2", "USR2"},      {"sigterm", "TERM"},
                           {"wsd", "linear"}};

std::string Normal(absl::string_view word) {
  std::string out = absl::AsciiStrToLower(word);
  std::replace(out.begin(), out.end(), '-', '_');
  return out;
}

bool Holds(const std::vector<Field>& fields, absl::string_view key) {
  return std::any_of(fields.begin(), fields.end(), [&](const Field& f) { return f.key == key; });
}

// Paths of all keys called `key`; what a stage shares with the top level (`root`) is found there
// alone.
void FindKey(absl::string_view key, const std::string& path, const std::vector<Field>& fields,
             const std::vector<Field>& root, std::vector<std::string>& found) {
  for (const Field& field : fields) {
    if (path == "stages[]" && Holds(root, field.key)) continue;
    std::string here = JoinKey(path, field.key);
    if (Normal(field.key) == Normal(key)) found.push_back(here);
    if (field.type == Field::Type::kSectionList) here += "[]";
    FindKey(key, here, field.children, root, found);
  }
}

std::string DidYouMean(absl::string_view what) {
  return what.empty() ? "" : absl::StrCat("did you mean '", what, "'?");
}

}  // namespace

int EditDistance(absl::string_view a, absl::string_view b) {
  constexpr size_t kMost = 64;
  const std::string x = Normal(a.substr(0, kMost));
  const std::string y = Normal(b.substr(0, kMost));
  // Optimal string alignment: row i holds the distance of x[0, i) to each y[0, j).
  std::vector<int> before, previous(y.size() + 1), row(y.size() + 1);
  for (size_t j = 0; j <= y.size(); ++j) previous[j] = static_cast<int>(j);
  before = previous;
  for (size_t i = 1; i <= x.size(); ++i) {
    row[0] = static_cast<int>(i);
    for (size_t j = 1; j <= y.size(); ++j) {
      const int replace = previous[j - 1] + (x[i - 1] == y[j - 1] ? 0 : 1);
      row[j] = std::min({previous[j] + 1, row[j - 1] + 1, replace});
      const bool swapped = i > 1 && j > 1 && x[i - 1] == y[j - 2] && x[i - 2] == y[j - 1];
      if (swapped) row[j] = std::min(row[j], before[j - 2] + 1);
    }
    before = previous;
    previous = row;
  }
  return previous[y.size()];
}

std::string Nearest(absl::string_view word, const std::vector<std::string>& candidates) {
  int best = std::max<int>(1, static_cast<int>(std::min<size_t>(word.size(), 64)) / 3) + 1;
  std::string nearest;
  for (const std::string& candidate : candidates) {
    const int distance = EditDistance(word, candidate);
    // Replacing every letter of a short word makes any word.
    if (distance < best && distance < static_cast<int>(candidate.size())) {
      best = distance;
      nearest = candidate;
    }
  }
  return nearest;
}

std::string AliasOf(absl::string_view key) {
  const std::string normal = Normal(key);
  for (const auto& [alias, path] : kAliases) {
    if (alias == normal) return std::string(path);
  }
  return "";
}

std::string MeantKey(absl::string_view key, absl::string_view path,
                     const std::vector<Field>& siblings, const std::vector<Field>& root) {
  std::vector<std::string> names;
  for (const Field& field : siblings) names.push_back(field.key);
  const std::string near = Nearest(key, names);
  const std::string sibling = near.empty() ? "" : JoinKey(AnyStage(path), near);
  if (!near.empty() && EditDistance(key, near) <= 1) return sibling;
  std::vector<std::string> elsewhere;
  FindKey(key, "", root, root, elsewhere);
  if (elsewhere.size() == 1) return elsewhere[0];
  // An alias is only meant where the file has such a key: a model file has none of them.
  if (const std::string alias = AliasOf(key); !alias.empty()) {
    std::vector<std::string> found;
    FindKey(alias.substr(alias.rfind('.') + 1), "", root, root, found);
    if (std::find(found.begin(), found.end(), alias) != found.end()) return alias;
  }
  return sibling;
}

std::string SuggestKey(absl::string_view meant, absl::string_view path) {
  const std::string section = AnyStage(path);
  if (absl::StartsWith(meant, section + ".")) return DidYouMean(meant.substr(section.size() + 1));
  // What lies in a stage's own section of the same name, and what a stage calls by its path from
  // the top.
  const std::string plain = WithoutStage(path);
  if (plain.empty() || !absl::StartsWith(meant, plain + ".")) return DidYouMean(meant);
  return DidYouMean(meant.substr(plain.size() + 1));
}

std::string AnyStage(absl::string_view path) {
  const std::string plain = WithoutStage(path);
  return plain == path ? plain : plain.empty() ? "stages[]" : absl::StrCat("stages[].", plain);
}

std::string SuggestChoice(absl::string_view word, const std::vector<std::string>& choices) {
  const std::string normal = Normal(word);
  for (const auto& [alias, meant] : kWords) {
    const bool offered =
        std::find(choices.begin(), choices.end(), std::string(meant)) != choices.end();
    if (alias == normal && offered) return DidYouMean(meant);
  }
  return DidYouMean(Nearest(word, choices));
}

}  // namespace baleen
