// Model: the parts of the network that one rank holds (one, or several where the pipeline schedule
// gives it more).
#pragma once

#include <utility>
#include <vector>

#include "trainer/model/model_part.h"

namespace baleen {

class Model {
 public:
  Model(const ModelConfig& config, const std::vector<PartLayers>& parts, bool use_indexer,
        const Placement& placement, ParameterStore& store) {
    for (const PartLayers& layers : parts)
      parts_.emplace_back(config, layers, use_indexer, placement, store);
  }

  // The whole network as one part.
  static std::vector<PartLayers> OnePart(const ModelConfig& config) {
    return {{.part = 0, .begin = 0, .end = config.num_hidden_layers, .first = true, .last = true}};
  }

  const std::vector<ModelPart>& parts() const { return parts_; }
  // `part` is its number in the pipeline.
  const ModelPart& part(int part) const {
    for (const ModelPart& candidate : parts_) {
      if (candidate.layers().part == part) return candidate;
    }
    CHECK(false) << "part " << part << " is not on this rank";
    __builtin_unreachable();
  }

  // (row of StepStats, parameter id) of every correction bias on this rank.
  std::vector<std::pair<int64_t, int>> correction_biases() const {
    std::vector<std::pair<int64_t, int>> biases;
    for (const ModelPart& part : parts_) {
      for (const auto& bias : part.correction_biases()) biases.push_back(bias);
    }
    return biases;
  }

 private:
  std::vector<ModelPart> parts_;
};

}  // namespace baleen
