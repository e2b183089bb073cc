#include "tests/trainer/model_rig.h"

#include <cstring>

#include "checkpoints/hf_init.h"
#include "trainer/make_batch.h"

namespace baleen::testing {
namespace {

SafetensorsFile OpenOrDie(const std::string& path) {
  auto file = SafetensorsFile::Open(path);
  CHECK(file.ok()) << file.status().ToString();
  return std::move(file).value();
}

template <typename T>
std::vector<double> Convert(absl::Span<const uint8_t> bytes) {
  std::vector<double> values(bytes.size() / sizeof(T));
  for (size_t i = 0; i < values.size(); ++i) {
    T value;
    std::memcpy(&value, bytes.data() + i * sizeof(T), sizeof(T));
    values[i] = static_cast<double>(value);
  }
  return values;
}

}  // namespace

Expectations::Expectations(const std::string& path) : file_(OpenOrDie(path)) {}

const SafetensorsEntry* Expectations::Find(const std::string& name) const {
  for (const SafetensorsEntry& entry : file_.entries()) {
    if (entry.name == name) return &entry;
  }
  return nullptr;
}

Shape Expectations::ShapeOf(const std::string& name) const {
  const SafetensorsEntry* entry = Find(name);
  CHECK(entry != nullptr) << name;
  return entry->shape;
}

std::vector<double> Expectations::Values(const std::string& name) const {
  const SafetensorsEntry* entry = Find(name);
  CHECK(entry != nullptr) << name;
  const auto bytes = file_.Data(entry->begin, entry->end);
  if (entry->dtype == DType::kF64) return Convert<double>(bytes);
  if (entry->dtype == DType::kF32) return Convert<float>(bytes);
  CHECK(entry->dtype == DType::kI32) << name << " " << entry->dtype;
  return Convert<int32_t>(bytes);
}

ModelRig::ModelRig(const RigOptions& options) : options_(options) {
  auto checkpoint = HfCheckpoint::Open(options.checkpoint);
  CHECK(checkpoint.ok()) << checkpoint.status().ToString();
  config_ = checkpoint->config();
  Build();
  for (const Parameter& p : store_.parameters()) {
    const Tensor& value = store_.value(p.id);
    CHECK_OK(checkpoint->Read(p.name, p.box, value.dtype(), value.raw()));
  }
}

ModelRig::ModelRig(const RigOptions& options, const ModelConfig& config, uint64_t seed)
    : options_(options), config_(config) {
  Build();
  const InitOptions init{.seed = seed, .standard_deviation = config.initializer_range};
  for (const CatalogEntry& entry : TensorCatalog(config_, {.with_indexer = options.use_indexer})) {
    const int id = store_.Find(entry.name);
    if (id < 0) continue;  // the MTP layer's copies of embedding and head
    const Parameter& p = store_.at(id);
    FillInitial(entry, init, p.box, store_.value(id).dtype(), store_.value(id).raw());
  }
}

void ModelRig::Build() {
  if (options_.index_topk > 0) config_.index_topk = options_.index_topk;
  model_ = std::make_unique<Model>(config_, Model::OnePart(config_), options_.use_indexer,
                                   Placement(), store_);
  store_.Allocate(context_, options_.dtype, axes_, options_.trained);
  rope_ = MakeModelRope(context_, config_, options_.dtype, 4096);
}

Batch ModelRig::BatchOf(const std::vector<double>& tokens, int64_t sequences) const {
  const int64_t width = static_cast<int64_t>(tokens.size()) / sequences;
  std::vector<Sample> samples(sequences);
  for (Sample& sample : samples) sample.document_begins = {0};
  for (int64_t b = 0; b < sequences; ++b) {
    for (int64_t i = 0; i < width; ++i) {
      samples[b].tokens.push_back(static_cast<int32_t>(tokens[b * width + i]));
    }
  }
  return MakeBatch(context_, MakeMicrobatch(samples, /*document_mask=*/false), RowShare());
}

void ModelRig::Train(const Batch& batch, const PassOptions& pass, StepStats& stats,
                     ModelPart::Saved& saved) {
  network().Forward(context(), batch, pass, Tensor(), stats, saved);
  network().BackwardInput(context(), batch, pass, Tensor(), stats, saved);
  network().BackwardWeight(context(), batch, pass, stats, saved);
}

ModelConfig TinyConfig() {
  ModelConfig c;
  c.vocab_size = 96;
  c.hidden_size = 32;
  c.num_hidden_layers = 3;
  c.first_k_dense_replace = 1;
  c.num_nextn_predict_layers = 1;
  c.intermediate_size = 48;
  c.moe_intermediate_size = 16;
  c.n_routed_experts = 8;
  c.n_shared_experts = 1;
  c.num_experts_per_tok = 3;
  c.n_group = 4;
  c.topk_group = 2;
  c.num_attention_heads = 4;
  c.q_lora_rank = 24;
  c.kv_lora_rank = 16;
  c.qk_nope_head_dim = 8;
  c.qk_rope_head_dim = 8;
  c.v_head_dim = 12;
  c.max_position_embeddings = 4096;
  c.rope_scaling = YarnConfig{.factor = 8, .original_max_position_embeddings = 32};
  c.initializer_range = 0.15;
  c.index_n_heads = 4;
  c.index_head_dim = 16;
  c.index_topk = 8;
  c.has_indexer = true;
  return c;
}

}  // namespace baleen::testing
