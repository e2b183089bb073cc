// ModelRig: a model with a checkpoint's weights on one rank, run on given tokens; and the stored
// expectations of the fixtures (docs/fixtures.md).
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "checkpoints/hf_checkpoint.h"
#include "checkpoints/safetensors.h"
#include "trainer/training_stage.h"

namespace baleen::testing {

// Tensors of a safetensors file as doubles.
class Expectations {
 public:
  explicit Expectations(const std::string& path);
  bool Has(const std::string& name) const { return Find(name) != nullptr; }
  Shape ShapeOf(const std::string& name) const;
  std::vector<double> Values(const std::string& name) const;

 private:
  const SafetensorsEntry* Find(const std::string& name) const;
  SafetensorsFile file_;
};

struct RigOptions {
  std::string checkpoint;
  DType dtype = DType::kF64;
  ModelOptions model;
  bool use_indexer = true;
  std::vector<ParameterGroup> trained = {ParameterGroup::kMain, ParameterGroup::kTensor,
                                         ParameterGroup::kEmbedding, ParameterGroup::kExpert,
                                         ParameterGroup::kIndexer};
  int64_t index_topk = 0;  // 0: the checkpoint's
};

class ModelRig {
 public:
  explicit ModelRig(const RigOptions& options);
  // The same with any config and random weights (no checkpoint).
  ModelRig(const RigOptions& options, const ModelConfig& config, uint64_t seed);

  // One microbatch of whole sequences from tokens [B, T + 1].
  Batch BatchOf(const std::vector<double>& tokens, int64_t sequences) const;
  ModelContext context() { return {context_, config_, options_.model, store_, rope_, axes_}; }

  StepStats NewStats() const {
    return StepStats::Zeros(context_, config_.num_hidden_layers + 1, config_.n_routed_experts);
  }
  // Forward, input gradient and weight gradient.
  void Train(const Batch& batch, const PassOptions& pass, StepStats& stats,
             ModelPart::Saved& saved);
  // The network as one part.
  const ModelPart& network() const { return model_->parts()[0]; }

  Context context_ = Context::Cpu();
  RigOptions options_;
  ModelConfig config_;
  ParameterStore store_;
  std::unique_ptr<Model> model_;
  RopeTable rope_;
  GridCommunicators axes_ = MakeSelfGrid();

 private:
  void Build();
};

// A tiny V3-shaped configuration: 1 dense + 2 MoE layers + MTP, 4 expert groups, YaRN in effect.
ModelConfig TinyConfig();

}  // namespace baleen::testing
