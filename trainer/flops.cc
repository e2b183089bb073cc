#include "trainer/flops.h"

#include <algorithm>

namespace baleen {
namespace {

// Mean over a causal sequence of the keys a row attends to: of all, or of at most k.
double MeanKeys(int64_t seq_length, int64_t at_most) {
  const auto length = static_cast<double>(seq_length);
  const auto k = static_cast<double>(std::min(seq_length, at_most));
  // Rows 1..k see their number of keys, the others k.
  return (k * (k + 1) / 2 + (length - k) * k) / length;
}

double AttentionProjections(const ModelConfig& c) {
  const auto heads = static_cast<double>(c.num_attention_heads);
  return static_cast<double>(c.hidden_size * (c.q_lora_rank + c.latent_dim())) +
         heads * static_cast<double>(c.q_lora_rank * c.qk_head_dim() +
                                     c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim) +
                                     c.v_head_dim * c.hidden_size);
}

double IndexerProjections(const ModelConfig& c) {
  return static_cast<double>(c.q_lora_rank * c.index_n_heads * c.index_head_dim +
                             c.hidden_size * (c.index_head_dim + c.index_n_heads));
}

double MoeLinear(const ModelConfig& c) {
  return static_cast<double>(3 * c.hidden_size * c.moe_intermediate_size *
                                 (c.num_experts_per_tok + c.n_shared_experts) +
                             c.hidden_size * c.n_routed_experts);
}

}  // namespace

TokenFlops ModelFlopsPerToken(const ModelConfig& c, const Recipe& recipe, int64_t seq_length) {
  const auto blocks = static_cast<double>(c.num_hidden_layers + c.num_nextn_predict_layers);
  const auto dense_blocks =
      static_cast<double>(std::min(c.first_k_dense_replace, c.num_hidden_layers));
  const auto mtp = static_cast<double>(c.num_nextn_predict_layers);
  const auto heads = static_cast<double>(c.num_attention_heads);
  const double head = static_cast<double>(c.hidden_size * c.vocab_size) * (1 + mtp);
  const double all_keys = MeanKeys(seq_length, seq_length);
  const bool sparse = recipe.options.attention != AttentionForm::kDense;

  TokenFlops flops;
  flops.linear = 2 * (blocks * AttentionProjections(c) +
                      dense_blocks * static_cast<double>(3 * c.hidden_size * c.intermediate_size) +
                      (blocks - dense_blocks) * MoeLinear(c) +
                      mtp * static_cast<double>(2 * c.hidden_size * c.hidden_size));
  if (!recipe.forward_only) flops.linear += 2 * head;
  flops.attention =
      sparse ? 2 * blocks * heads * static_cast<double>(c.latent_dim() + c.kv_lora_rank) *
                   MeanKeys(seq_length, c.index_topk)
             : 2 * blocks * heads * static_cast<double>(c.qk_head_dim() + c.v_head_dim) * all_keys;
  const double scores = 2 * blocks * static_cast<double>(c.index_n_heads * c.index_head_dim);
  if (recipe.options.indexer_loss != IndexerLossKind::kNone) {
    flops.indexer = scores * all_keys + 2 * blocks * IndexerProjections(c);
  }
  if (recipe.forward_only) {
    const double target = 2 * blocks * heads * static_cast<double>(c.qk_head_dim()) * all_keys;
    flops.total = flops.linear + flops.attention + flops.indexer + target + 3 * scores * all_keys +
                  2 * 2 * blocks * IndexerProjections(c);
  } else {
    flops.total = 3 * (flops.linear + flops.attention);
    if (sparse) {
      // The indexer learns on the selected keys only: two gradients of their scores.
      flops.total += flops.indexer + 2 * scores * MeanKeys(seq_length, c.index_topk) +
                     2 * 2 * blocks * IndexerProjections(c);
    }
  }
  return flops;
}

}  // namespace baleen
