#include "configs/schema/model_fields.h"

namespace baleen {
namespace {

constexpr double kLargestSize = 2147483647;  // as ModelConfig::Validate

Field& Size(Fields& f, absl::string_view key, int64_t* target) {
  return f.Add(key, target).Between(1, kLargestSize);
}

void VisitLayers(ModelConfig& c, Fields& f) {
  Size(f, "vocab_size", &c.vocab_size).Doc("Rows of the embedding and of the head.");
  Size(f, "hidden_size", &c.hidden_size).Doc("Width of the residual stream.");
  Size(f, "num_hidden_layers", &c.num_hidden_layers).Doc("Layers without the MTP module.");
  f.Add("first_k_dense_replace", &c.first_k_dense_replace)
      .Between(0, kLargestSize)
      .Doc("First layers whose MLP is dense.");
  f.Add("num_nextn_predict_layers", &c.num_nextn_predict_layers)
      .Default("0")
      .Between(0, 1)
      .Doc("MTP modules.");
  Size(f, "intermediate_size", &c.intermediate_size).Doc("Width of the dense MLP.");
  Size(f, "moe_intermediate_size", &c.moe_intermediate_size).Doc("Width of one expert.");
}

void VisitExperts(ModelConfig& c, Fields& f) {
  Size(f, "n_routed_experts", &c.n_routed_experts).Doc("Experts of a layer.");
  f.Add("n_shared_experts", &c.n_shared_experts)
      .Between(0, 64)
      .Doc("Experts that every token takes.");
  Size(f, "num_experts_per_tok", &c.num_experts_per_tok).Doc("Routed experts of a token.");
  Size(f, "n_group", &c.n_group).Doc("Groups that the experts form.");
  Size(f, "topk_group", &c.topk_group).Doc("Groups that a token may choose from.");
  f.Add("routed_scaling_factor", &c.routed_scaling_factor)
      .DefaultIsCurrent()
      .Above(0)
      .Doc("Factor on the weights of the routed experts.");
  f.Add("norm_topk_prob", &c.norm_topk_prob)
      .DefaultIsCurrent()
      .Doc("Divide the chosen experts' weights by their sum.");
}

void VisitAttention(ModelConfig& c, Fields& f) {
  Size(f, "num_attention_heads", &c.num_attention_heads).Doc("Heads of the main attention.");
  Size(f, "q_lora_rank", &c.q_lora_rank).Doc("Width of the query latent.");
  Size(f, "kv_lora_rank", &c.kv_lora_rank).Doc("Width of the key and value latent.");
  Size(f, "qk_nope_head_dim", &c.qk_nope_head_dim).Doc("Width of a head's part without position.");
  Size(f, "qk_rope_head_dim", &c.qk_rope_head_dim).Doc("Width of a head's rotated part; even.");
  Size(f, "v_head_dim", &c.v_head_dim).Doc("Width of a head's values.");
}

}  // namespace

void Visit(YarnConfig& c, Fields& f) {
  f.AddChoice(
       "type", {"yarn"}, [](size_t) {}, [] { return size_t{0}; })
      .Doc("The only kind there is.");
  f.Add("factor", &c.factor).AtLeast(1).Doc("Extended length over the original one.");
  f.Add("original_max_position_embeddings", &c.original_max_position_embeddings)
      .Between(1, kLargestSize)
      .Unit("tokens")
      .Doc("Length that the model was trained with before.");
  f.Add("beta_fast", &c.beta_fast)
      .DefaultIsCurrent()
      .Above(0)
      .Doc(
          "Dimensions with more rotations than this over the original length keep their "
          "frequency.");
  f.Add("beta_slow", &c.beta_slow)
      .DefaultIsCurrent()
      .Above(0)
      .Doc("Dimensions with fewer rotations than this are interpolated in full.");
  f.Add("mscale", &c.mscale).DefaultIsCurrent().AtLeast(0).Doc("Scale of the rotated part.");
  f.Add("mscale_all_dim", &c.mscale_all_dim)
      .DefaultIsCurrent()
      .AtLeast(0)
      .Doc("Scale of all dimensions: enters the softmax scale squared.");
}

void Visit(ModelConfig& c, Fields& f) {
  VisitLayers(c, f);
  VisitExperts(c, f);
  VisitAttention(c, f);
  f.Add("rms_norm_eps", &c.rms_norm_eps)
      .DefaultIsCurrent()
      .Above(0)
      .Below(1)
      .Doc("Added to the mean square.");
  f.Add("rope_theta", &c.rope_theta)
      .DefaultIsCurrent()
      .Above(1)
      .Doc("Base of the rotation frequencies.");
  f.OptionalSection("rope_scaling", &c.rope_scaling).Doc("YaRN. Absent: plain rotary embedding.");
  Size(f, "max_position_embeddings", &c.max_position_embeddings)
      .Unit("tokens")
      .Doc("Longest sequence the model is said to stand.");
  f.Add("initializer_range", &c.initializer_range)
      .DefaultIsCurrent()
      .Above(0)
      .Doc("Standard deviation of random weights.");
  f.Add("bos_token_id", &c.bos_token_id)
      .DefaultIsCurrent()
      .AtLeast(0)
      .Doc("Token that begins a text.");
  f.Add("eos_token_id", &c.eos_token_id)
      .DefaultIsCurrent()
      .AtLeast(0)
      .Doc("Token that ends a document.");
  Size(f, "index_n_heads", &c.index_n_heads)
      .DefaultIsCurrent()
      .Doc("Heads of the lightning indexer.");
  Size(f, "index_head_dim", &c.index_head_dim).DefaultIsCurrent().Doc("Width of an indexer head.");
  Size(f, "index_topk", &c.index_topk).DefaultIsCurrent().Doc("Keys selected for a query.");
}

std::vector<Field> ModelFields(ModelConfig& config) { return Fields::Of(config); }

}  // namespace baleen
