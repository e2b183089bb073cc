// ModelConfig: the architecture of a V3.1 / V3.2 model, in the words of the checkpoint's
// config.json.
//
// Filled from config.json (checkpoints/hf_config) or from a model YAML (configs/model/*.yaml);
// every other part of Baleen reads sizes from here and from nowhere else. Counts are global: no
// sharding is known here.
#pragma once

#include <cstdint>
#include <optional>
#include <string>

#include "kernels/core/status.h"

namespace baleen {

// rope_scaling of type "yarn". Absent = plain RoPE and no mscale in the softmax scale.
struct YarnConfig {
  double factor = 40;
  int64_t original_max_position_embeddings = 4096;
  double beta_fast = 32;
  double beta_slow = 1;
  double mscale = 1;
  double mscale_all_dim = 1;
};

struct ModelConfig {
  int64_t vocab_size = 129280;
  int64_t hidden_size = 7168;
  int64_t num_hidden_layers = 61;
  int64_t first_k_dense_replace = 3;     // the first layers have a dense MLP
  int64_t num_nextn_predict_layers = 1;  // MTP modules; 0 or 1
  int64_t intermediate_size = 18432;     // dense MLP
  int64_t moe_intermediate_size = 2048;  // one expert
  int64_t n_routed_experts = 256;
  int64_t n_shared_experts = 1;
  int64_t num_experts_per_tok = 8;
  int64_t n_group = 8;
  int64_t topk_group = 4;
  double routed_scaling_factor = 2.5;
  bool norm_topk_prob = true;
  int64_t num_attention_heads = 128;
  int64_t q_lora_rank = 1536;
  int64_t kv_lora_rank = 512;
  int64_t qk_nope_head_dim = 128;
  int64_t qk_rope_head_dim = 64;
  int64_t v_head_dim = 128;
  double rms_norm_eps = 1e-6;
  double rope_theta = 10000;
  std::optional<YarnConfig> rope_scaling;
  int64_t max_position_embeddings = 163840;
  double initializer_range = 0.02;
  int64_t bos_token_id = 0;
  int64_t eos_token_id = 1;

  // The lightning indexer (V3.2). A V3.1 config has none of these keys: the run file's `dsa`
  // section fills them.
  int64_t index_n_heads = 64;
  int64_t index_head_dim = 128;
  int64_t index_topk = 2048;
  bool has_indexer = false;  // the config named index_* keys: the checkpoint holds indexer tensors

  int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }  // 192
  int64_t latent_dim() const { return kv_lora_rank + qk_rope_head_dim; }       // 576
  bool IsMoeLayer(int64_t layer) const { return layer >= first_k_dense_replace; }
  int64_t num_moe_layers() const { return num_hidden_layers - first_k_dense_replace; }
  // Softmax scale of the main attention: qk_head_dim^-0.5 times mscale squared under YaRN.
  double softmax_scale() const;
  // Folded indexer scale index_n_heads^-0.5 * index_head_dim^-0.5.
  double index_scale() const;

  // ConfigError that lists every impossible size or combination at once; `where` names the source.
  absl::Status Validate(absl::string_view where) const;

  bool operator==(const ModelConfig& other) const;
};

}  // namespace baleen
