#include "tests/cuda/layout_case_support.h"

#include <algorithm>

namespace baleen::testing {

RigCase MakeGpuCase(RecipeKind kind, const Layout& layout) {
  RigCase c = MakeCase(kind, layout, 3);
  ModelConfig& m = c.model;
  m.vocab_size = 256;
  m.hidden_size = 256;
  m.intermediate_size = 256;
  m.moe_intermediate_size = 64;
  m.num_attention_heads = 8;
  m.q_lora_rank = 128;
  m.kv_lora_rank = 512;
  m.qk_nope_head_dim = 128;
  m.qk_rope_head_dim = 64;
  m.v_head_dim = 128;
  m.index_n_heads = 64;
  m.index_head_dim = 128;
  m.index_topk = 128;
  m.initializer_range = 0.04;
  c.stage.data.seq_length = 256;
  c.document_mask = kind == RecipeKind::kWarmUp || kind == RecipeKind::kSparse;
  // Enough microbatches for two parts on each of two pipeline ranks.
  c.stage.global_batch_size = layout.pipeline > 1 ? 4 * layout.data : std::max(2, layout.data);
  c.bucket_elements = 1000000;
  c.stage.losses.balance = 1e-2;
  return c;
}

}  // namespace baleen::testing
