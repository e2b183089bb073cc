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

// One block's share of a token.
TokenFlops BlockFlops(const ModelConfig& c, const Recipe& recipe, int64_t seq_length, bool moe) {
  const auto heads = static_cast<double>(c.num_attention_heads);
  const double all_keys = MeanKeys(seq_length, seq_length);
  const double selected_keys = MeanKeys(seq_length, c.index_topk);
  const bool sparse = recipe.options.attention != AttentionForm::kDense;
  const double mlp =
      moe ? MoeLinear(c) : static_cast<double>(3 * c.hidden_size * c.intermediate_size);
  TokenFlops flops;
  flops.linear = 2 * (AttentionProjections(c) + mlp);
  flops.attention =
      sparse ? 2 * heads * static_cast<double>(c.latent_dim() + c.kv_lora_rank) * selected_keys
             : 2 * heads * static_cast<double>(c.qk_head_dim() + c.v_head_dim) * all_keys;
  const double scores = 2 * static_cast<double>(c.index_n_heads * c.index_head_dim);
  const double projections = 2 * IndexerProjections(c);
  if (recipe.options.indexer_loss != IndexerLossKind::kNone)
    flops.indexer = scores * all_keys + projections;
  if (recipe.forward_only) {
    const double target = 2 * heads * static_cast<double>(c.qk_head_dim()) * all_keys;
    flops.total = flops.linear + flops.attention + flops.indexer + target + 3 * scores * all_keys +
                  2 * projections;
  } else {
    flops.total = 3 * (flops.linear + flops.attention);
    // The indexer learns on the selected keys only: two gradients of their scores.
    if (sparse) flops.total += flops.indexer + 2 * scores * selected_keys + 2 * projections;
  }
  return flops;
}

void AddTo(TokenFlops& sum, const TokenFlops& flops) {
  sum.linear += flops.linear;
  sum.attention += flops.attention;
  sum.indexer += flops.indexer;
  sum.total += flops.total;
}

// Behind the last block: the head, and the MTP module with its own pass through it.
TokenFlops EndFlops(const ModelConfig& c, const Recipe& recipe, int64_t seq_length) {
  const auto mtp = static_cast<double>(c.num_nextn_predict_layers);
  TokenFlops flops;
  if (!recipe.forward_only)
    flops.linear += 2 * static_cast<double>(c.hidden_size * c.vocab_size) * (1 + mtp);
  flops.linear += 2 * mtp * static_cast<double>(2 * c.hidden_size * c.hidden_size);
  flops.total = (recipe.forward_only ? 1 : 3) * flops.linear;
  for (int64_t n = 0; n < c.num_nextn_predict_layers; ++n)
    AddTo(flops, BlockFlops(c, recipe, seq_length, c.IsMoeLayer(c.num_hidden_layers)));
  return flops;
}

}  // namespace

StageCosts BlockCosts(const ModelConfig& c, const Recipe& recipe, int64_t seq_length) {
  StageCosts costs;
  for (int64_t layer = 0; layer < c.num_hidden_layers; ++layer)
    costs.layers.push_back(BlockFlops(c, recipe, seq_length, c.IsMoeLayer(layer)).total);
  costs.head = EndFlops(c, recipe, seq_length).total;
  return costs;
}

TokenFlops ModelFlopsPerToken(const ModelConfig& c, const Recipe& recipe, int64_t seq_length) {
  TokenFlops flops = EndFlops(c, recipe, seq_length);
  for (int64_t layer = 0; layer < c.num_hidden_layers; ++layer)
    AddTo(flops, BlockFlops(c, recipe, seq_length, c.IsMoeLayer(layer)));
  return flops;
}

}  // namespace baleen
