// The builder spells each name once, in the order of a forward pass; counts and size limits are
// derived from it.
#include "checkpoints/tensor_catalog.h"

#include "absl/strings/match.h"
#include "absl/strings/strip.h"
#include "checkpoints/safetensors.h"

namespace baleen {
namespace {

// Larger than any model that could be trained.
constexpr double kMaxParameters = 1e15;
constexpr absl::string_view kWeightSuffix = ".weight";
constexpr absl::string_view kScaleSuffix = ".weight_scale_inv";

// Appends the tensors of one model to a list, in the order of the catalog.
class CatalogBuilder {
 public:
  CatalogBuilder(const ModelConfig& config, CatalogOptions options)
      : config_(config), options_(options) {}

  std::vector<CatalogEntry> Build() {
    const ModelConfig& c = config_;
    Bf16("model.embed_tokens.weight", {c.vocab_size, c.hidden_size});
    for (int64_t layer = 0; layer < c.num_hidden_layers; ++layer) {
      Layer(absl::StrCat("model.layers.", layer, "."), c.IsMoeLayer(layer));
    }
    Norm("model.norm.weight", c.hidden_size);
    Bf16("lm_head.weight", {c.vocab_size, c.hidden_size});
    if (c.num_nextn_predict_layers > 0) {
      MtpLayer(absl::StrCat("model.layers.", c.num_hidden_layers, "."));
    }
    return std::move(entries_);
  }

 private:
  CatalogEntry& Add(std::string name, Shape shape, TensorStorage storage,
                    TensorRole role = TensorRole::kWeight) {
    return entries_.emplace_back(CatalogEntry{
        .name = std::move(name), .shape = std::move(shape), .storage = storage, .role = role});
  }
  CatalogEntry& Linear(std::string name, int64_t out, int64_t in) {
    return Add(std::move(name), {out, in}, TensorStorage::kF8Block);
  }
  CatalogEntry& Bf16(std::string name, Shape shape) {
    return Add(std::move(name), std::move(shape), TensorStorage::kBF16);
  }
  CatalogEntry& Norm(std::string name, int64_t width) {
    return Add(std::move(name), {width}, TensorStorage::kF32, TensorRole::kNorm);
  }

  void Layer(const std::string& at, bool moe) {
    Norm(at + "input_layernorm.weight", config_.hidden_size);
    Norm(at + "post_attention_layernorm.weight", config_.hidden_size);
    Attention(at + "self_attn.");
    if (options_.with_indexer) Indexer(at + "self_attn.indexer.");
    if (moe) {
      Moe(at + "mlp.");
    } else {
      Mlp(at + "mlp.", config_.intermediate_size);
    }
  }

  void Attention(const std::string& at) {
    const ModelConfig& c = config_;
    Linear(at + "q_a_proj.weight", c.q_lora_rank, c.hidden_size);
    Norm(at + "q_a_layernorm.weight", c.q_lora_rank);
    Linear(at + "q_b_proj.weight", c.num_attention_heads * c.qk_head_dim(), c.q_lora_rank);
    Linear(at + "kv_a_proj_with_mqa.weight", c.latent_dim(), c.hidden_size);
    Norm(at + "kv_a_layernorm.weight", c.kv_lora_rank);
    Linear(at + "kv_b_proj.weight", c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim),
           c.kv_lora_rank);
    Linear(at + "o_proj.weight", c.hidden_size, c.num_attention_heads * c.v_head_dim);
  }

  void Indexer(const std::string& at) {
    const ModelConfig& c = config_;
    const size_t first = entries_.size();
    Linear(at + "wq_b.weight", c.index_n_heads * c.index_head_dim, c.q_lora_rank);
    Linear(at + "wk.weight", c.index_head_dim, c.hidden_size);
    Norm(at + "k_norm.weight", c.index_head_dim);
    Add(at + "k_norm.bias", {c.index_head_dim}, TensorStorage::kF32, TensorRole::kNormBias);
    Bf16(at + "weights_proj.weight", {c.index_n_heads, c.hidden_size});
    for (size_t i = first; i < entries_.size(); ++i) entries_[i].indexer = true;
  }

  void Mlp(const std::string& at, int64_t width) {
    Linear(at + "gate_proj.weight", width, config_.hidden_size);
    Linear(at + "up_proj.weight", width, config_.hidden_size);
    Linear(at + "down_proj.weight", config_.hidden_size, width);
  }

  void Moe(const std::string& at) {
    const ModelConfig& c = config_;
    Bf16(at + "gate.weight", {c.n_routed_experts, c.hidden_size});
    Add(at + "gate.e_score_correction_bias", {c.n_routed_experts}, TensorStorage::kF32,
        TensorRole::kCorrectionBias);
    for (int64_t expert = 0; expert < c.n_routed_experts; ++expert) {
      Mlp(absl::StrCat(at, "experts.", expert, "."), c.moe_intermediate_size);
    }
    // The shared experts are one MLP of their joint width.
    if (c.n_shared_experts > 0) {
      Mlp(at + "shared_experts.", c.n_shared_experts * c.moe_intermediate_size);
    }
  }

  void MtpLayer(const std::string& at) {
    const ModelConfig& c = config_;
    const Shape table = {c.vocab_size, c.hidden_size};
    Bf16(at + "embed_tokens.weight", table).duplicate_of = "model.embed_tokens.weight";
    Norm(at + "enorm.weight", c.hidden_size);
    Norm(at + "hnorm.weight", c.hidden_size);
    Bf16(at + "eh_proj.weight", {c.hidden_size, 2 * c.hidden_size});
    Layer(at, /*moe=*/true);
    Norm(at + "shared_head.norm.weight", c.hidden_size);
    Bf16(at + "shared_head.head.weight", table).duplicate_of = "lm_head.weight";
  }

  const ModelConfig& config_;
  CatalogOptions options_;
  std::vector<CatalogEntry> entries_;
};

// The number of entries with indexers, in floating point: absurd counts must not overflow.
double CatalogSize(const ModelConfig& config) {
  const double attention = 9 + 5;
  const double moe = 2 + 3.0 * static_cast<double>(config.n_routed_experts) + 3;
  const double layers = static_cast<double>(config.num_hidden_layers);
  const double dense = static_cast<double>(config.first_k_dense_replace);
  const double mtp = config.num_nextn_predict_layers > 0 ? 6 + attention + moe : 0;
  return 3 + layers * attention + dense * 3 + (layers - dense) * moe + mtp;
}

}  // namespace

std::vector<CatalogEntry> TensorCatalog(const ModelConfig& config, CatalogOptions options) {
  return CatalogBuilder(config, options).Build();
}

absl::Status CheckModelSize(const ModelConfig& config, absl::string_view where) {
  const CatalogOptions options{.with_indexer = true};
  const double tensors = CatalogSize(config);
  if (tensors > static_cast<double>(kMaxCheckpointTensors)) {
    return ConfigError(where, ": num_hidden_layers = ", config.num_hidden_layers,
                       " and n_routed_experts = ", config.n_routed_experts, " make ", tensors,
                       " tensors, the limit is ", kMaxCheckpointTensors);
  }
  double parameters = 0;
  for (const CatalogEntry& entry : TensorCatalog(config, options)) {
    double elements = 1;
    for (const int64_t extent : entry.shape) elements *= static_cast<double>(extent);
    parameters += elements;
  }
  if (parameters <= kMaxParameters) return absl::OkStatus();
  return ConfigError(where, ": the configuration names ", parameters, " parameters, the limit is ",
                     kMaxParameters);
}

std::string ScaleName(absl::string_view weight_name) {
  return absl::StrCat(weight_name, "_scale_inv");
}

std::optional<std::string> WeightOfScale(absl::string_view name) {
  if (!absl::EndsWith(name, kScaleSuffix)) return std::nullopt;
  return absl::StrCat(absl::StripSuffix(name, kScaleSuffix), kWeightSuffix);
}

ParameterCount CountParameters(const ModelConfig& config, CatalogOptions options) {
  const std::string mtp_prefix = absl::StrCat("model.layers.", config.num_hidden_layers, ".");
  ParameterCount count;
  double routed = 0;
  for (const CatalogEntry& entry : TensorCatalog(config, options)) {
    if (!entry.duplicate_of.empty()) continue;
    const int64_t elements = NumElements(entry.shape);
    if (entry.indexer) {
      count.indexer += elements;
    } else if (absl::StartsWith(entry.name, mtp_prefix)) {
      count.mtp += elements;
    } else {
      count.main += elements;
      if (absl::StrContains(entry.name, ".mlp.experts.")) routed += static_cast<double>(elements);
    }
  }
  // A token meets num_experts_per_tok of the routed experts.
  const double idle = routed * (1 - static_cast<double>(config.num_experts_per_tok) /
                                        static_cast<double>(config.n_routed_experts));
  count.active = count.main - static_cast<int64_t>(idle);
  return count;
}

}  // namespace baleen
