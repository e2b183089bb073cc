#include "configs/schema/model_config.h"

#include <cmath>
#include <tuple>
#include <vector>

#include "absl/strings/str_join.h"

namespace baleen {
namespace {

auto Fields(const YarnConfig& c) {
  return std::tie(c.factor, c.original_max_position_embeddings, c.beta_fast, c.beta_slow, c.mscale,
                  c.mscale_all_dim);
}

auto Fields(const ModelConfig& c) {
  return std::tie(c.vocab_size, c.hidden_size, c.num_hidden_layers, c.first_k_dense_replace,
                  c.num_nextn_predict_layers, c.intermediate_size, c.moe_intermediate_size,
                  c.n_routed_experts, c.n_shared_experts, c.num_experts_per_tok, c.n_group,
                  c.topk_group, c.routed_scaling_factor, c.norm_topk_prob, c.num_attention_heads,
                  c.q_lora_rank, c.kv_lora_rank, c.qk_nope_head_dim, c.qk_rope_head_dim,
                  c.v_head_dim, c.rms_norm_eps, c.rope_theta, c.max_position_embeddings,
                  c.initializer_range, c.bos_token_id, c.eos_token_id, c.index_n_heads,
                  c.index_head_dim, c.index_topk, c.has_indexer);
}

}  // namespace

bool ModelConfig::operator==(const ModelConfig& other) const {
  if (rope_scaling.has_value() != other.rope_scaling.has_value()) return false;
  if (rope_scaling && Fields(*rope_scaling) != Fields(*other.rope_scaling)) return false;
  return Fields(*this) == Fields(other);
}

double ModelConfig::softmax_scale() const {
  double scale = 1 / std::sqrt(static_cast<double>(qk_head_dim()));
  if (rope_scaling && rope_scaling->factor > 1 && rope_scaling->mscale_all_dim != 0) {
    const double m = 0.1 * rope_scaling->mscale_all_dim * std::log(rope_scaling->factor) + 1;
    scale *= m * m;
  }
  return scale;
}

double ModelConfig::index_scale() const {
  return 1 / std::sqrt(static_cast<double>(index_n_heads) * static_cast<double>(index_head_dim));
}

absl::Status ModelConfig::Validate(absl::string_view where) const {
  std::vector<std::string> errors;
  auto require = [&](bool ok, const std::string& what) {
    if (!ok) errors.push_back(what);
  };
  const std::vector<std::pair<absl::string_view, int64_t>> positive = {
      {"vocab_size", vocab_size},
      {"hidden_size", hidden_size},
      {"num_hidden_layers", num_hidden_layers},
      {"intermediate_size", intermediate_size},
      {"moe_intermediate_size", moe_intermediate_size},
      {"n_routed_experts", n_routed_experts},
      {"num_experts_per_tok", num_experts_per_tok},
      {"n_group", n_group},
      {"topk_group", topk_group},
      {"num_attention_heads", num_attention_heads},
      {"q_lora_rank", q_lora_rank},
      {"kv_lora_rank", kv_lora_rank},
      {"qk_nope_head_dim", qk_nope_head_dim},
      {"qk_rope_head_dim", qk_rope_head_dim},
      {"v_head_dim", v_head_dim},
      {"max_position_embeddings", max_position_embeddings},
      {"index_n_heads", index_n_heads},
      {"index_head_dim", index_head_dim},
      {"index_topk", index_topk}};
  constexpr int64_t kLargest = int64_t{1} << 31;  // keeps every product of two sizes inside int64
  for (const auto& [name, value] : positive) {
    require(value > 0 && value < kLargest,
            absl::StrCat(name, " = ", value, ": expected a number from 1 to 2^31-1"));
  }
  require(n_shared_experts >= 0 && n_shared_experts <= 64,
          absl::StrCat("n_shared_experts = ", n_shared_experts, ": expected 0 to 64"));
  require(first_k_dense_replace >= 0 && first_k_dense_replace <= num_hidden_layers,
          absl::StrCat("first_k_dense_replace = ", first_k_dense_replace,
                       ": expected 0 to num_hidden_layers = ", num_hidden_layers));
  require(num_nextn_predict_layers == 0 || num_nextn_predict_layers == 1,
          absl::StrCat("num_nextn_predict_layers = ", num_nextn_predict_layers,
                       ": expected 0 or 1 (one MTP module is trained)"));
  require(n_group > 0 && n_routed_experts % std::max<int64_t>(1, n_group) == 0,
          absl::StrCat("n_group = ", n_group,
                       " does not divide n_routed_experts = ", n_routed_experts));
  require(topk_group <= n_group,
          absl::StrCat("topk_group = ", topk_group, " is more than n_group = ", n_group));
  if (n_group > 0 && n_routed_experts % n_group == 0) {
    const int64_t selectable = n_routed_experts / n_group * topk_group;
    require(num_experts_per_tok <= selectable,
            absl::StrCat("num_experts_per_tok = ", num_experts_per_tok, " is more than the ",
                         selectable, " experts of ", topk_group, " groups"));
    require(n_group == 1 || n_routed_experts / n_group >= 2,
            "a group needs two experts or more: its score is the sum of its two best");
  }
  require(qk_rope_head_dim % 2 == 0,
          absl::StrCat("qk_rope_head_dim = ", qk_rope_head_dim, " must be even"));
  require(index_head_dim >= qk_rope_head_dim,
          absl::StrCat("index_head_dim = ", index_head_dim, " is less than qk_rope_head_dim = ",
                       qk_rope_head_dim, " (the indexer rotates that many of its dimensions)"));
  require(rms_norm_eps > 0 && rms_norm_eps < 1,
          absl::StrCat("rms_norm_eps = ", rms_norm_eps, ": expected above 0 and below 1"));
  require(rope_theta > 1, absl::StrCat("rope_theta = ", rope_theta, ": expected more than 1"));
  require(std::isfinite(routed_scaling_factor), "routed_scaling_factor is not finite");
  if (rope_scaling) {
    require(rope_scaling->factor >= 1,
            absl::StrCat("rope_scaling.factor = ", rope_scaling->factor, ": expected 1 or more"));
    require(rope_scaling->original_max_position_embeddings > 0,
            "rope_scaling.original_max_position_embeddings must be positive");
    require(rope_scaling->beta_fast > rope_scaling->beta_slow && rope_scaling->beta_slow > 0,
            "rope_scaling: expected beta_fast > beta_slow > 0");
  }
  if (errors.empty()) return absl::OkStatus();
  return ConfigError(where, ": ", errors.size(), " error(s) in the model configuration:\n  ",
                     absl::StrJoin(errors, "\n  "));
}

}  // namespace baleen
