#include "tests/trainer/layout_cases.h"

#include "tests/trainer/model_rig.h"

namespace baleen::testing {

const char* Name(RecipeKind kind) {
  constexpr const char* kNames[] = {"dense", "warm-up", "sparse", "masked"};
  return kNames[static_cast<int>(kind)];
}

std::string Layout::DebugString() const {
  return absl::StrCat("tp ", tensor, " cp ", context, " pp ", pipeline, " ep ", expert, " dp ",
                      data, " ", baleen::Name(schedule), " recompute ", baleen::Name(recompute),
                      " node ", expert_node_size);
}

namespace {

// 7 layers for the deep pipelines, 3 for the others; every width divides by 8.
ModelConfig MatrixModel(int64_t layers) {
  ModelConfig c = TinyConfig();
  c.num_hidden_layers = layers;
  c.num_attention_heads = 8;
  c.hidden_size = 24;
  c.q_lora_rank = 12;
  c.kv_lora_rank = 12;
  c.qk_nope_head_dim = 6;
  c.v_head_dim = 5;
  c.index_n_heads = 2;
  c.index_head_dim = 12;
  c.vocab_size = 64;
  c.index_topk = 6;
  return c;
}

}  // namespace

RigCase MakeCase(RecipeKind kind, const Layout& layout, int64_t layers) {
  RigCase c;
  c.model = MatrixModel(layers);
  StageConfig& stage = c.stage;
  stage = DefaultStageConfig();
  stage.name = "matrix";
  stage.steps = 1;
  stage.attention = kind == RecipeKind::kSparse || kind == RecipeKind::kMasked
                        ? AttentionMode::kSparse
                        : AttentionMode::kDense;
  stage.train = kind == RecipeKind::kWarmUp ? TrainMode::kIndexer : TrainMode::kAll;
  stage.dsa.kernel =
      kind == RecipeKind::kMasked ? AttentionKernel::kMaskedDense : AttentionKernel::kSparse;
  stage.micro_batch_size = 1;
  stage.global_batch_size = 8;
  stage.data.seq_length = 32;
  stage.losses.balance = 0.3;  // large enough to matter in every gradient of a gate
  // An update that is as smooth in the gradient as the comparison is sharp.
  stage.optimizer.lr = 0.1;
  stage.optimizer.eps = 1e-2;
  stage.recompute = layout.recompute;
  ParallelismConfig& p = stage.parallelism;
  p.tensor = layout.tensor;
  p.context = layout.context;
  p.pipeline = layout.pipeline;
  p.expert = layout.expert;
  p.schedule = layout.schedule;
  if (layout.virtual_stages > 0) p.virtual_stages = layout.virtual_stages;
  if (layout.expert_node_size > 0) p.expert_node_size = layout.expert_node_size;
  return c;
}

RigCase OnOneRank(RigCase c) {
  c.stage.parallelism = DefaultStageConfig().parallelism;
  c.stage.parallelism.schedule = ScheduleName::k1F1B;
  c.stage.recompute = Recompute::kNone;
  c.expert_rows = -1;
  c.row_chunk = 0;
  c.sample_order.clear();
  return c;
}

std::string KeyOf(const RigCase& c) {
  return absl::StrCat(baleen::Name(c.stage.attention), baleen::Name(c.stage.train),
                      baleen::Name(c.stage.dsa.kernel), c.model.num_hidden_layers, c.document_mask,
                      c.measure_indexer, c.validate, " ", c.first_expert_bias, " ",
                      c.stage.micro_batch_size, " ", c.stage.global_batch_size, " ",
                      c.stage.data.seq_length);
}

std::vector<double> ValuesAt(const Box& box, const StepOutcome::Piece& whole) {
  const bool matrix = box.extent.size() == 2;
  const int64_t columns = matrix ? box.extent[1] : 1;
  const int64_t all_columns = matrix ? whole.box.extent[1] : 1;
  const int64_t first_column = matrix ? box.offset[1] : 0;
  std::vector<double> values;
  for (int64_t r = 0; r < box.extent[0]; ++r) {
    const auto row = whole.values.begin() + (box.offset[0] + r) * all_columns + first_column;
    values.insert(values.end(), row, row + columns);
  }
  return values;
}

}  // namespace baleen::testing
