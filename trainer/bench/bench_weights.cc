#include "trainer/bench/bench_weights.h"

#include <algorithm>
#include <map>

#include "checkpoints/tensor_catalog.h"
#include "kernels/core/random.h"
#include "trainer/bench/random_table.h"

namespace baleen {

void FillBenchWeights(TrainingStage& stage, int64_t seed) {
  const Context& context = stage.context();
  const ModelConfig& model = stage.model_config();
  std::map<std::string, TensorRole> roles;
  for (const CatalogEntry& entry : TensorCatalog(model, {.with_indexer = true})) {
    roles[entry.name] = entry.role;
  }
  const RandomTable normal(context, stage.dtype(), NormalValues(seed, model.initializer_range));
  const int64_t widest = std::max({model.hidden_size, model.q_lora_rank, model.n_routed_experts,
                                   model.kv_lora_rank, model.index_head_dim});
  const auto constant = [&](double value) {
    return RandomTable(
        context, stage.dtype(), [=](int64_t) { return value; }, widest);
  };
  const RandomTable ones = constant(1), zeros = constant(0);
  const ParameterStore& parameters = stage.parameters();
  for (const OptimizerShard& shard : stage.optimizer().shards()) {
    for (const int id : parameters.buckets()[shard.bucket].parameters) {
      const Parameter& parameter = parameters.at(id);
      const TensorRole role = roles.at(parameter.name);
      const RandomTable& table = role == TensorRole::kWeight ? normal
                                 : role == TensorRole::kNorm ? ones
                                                             : zeros;
      const auto first = static_cast<int64_t>(NameStream(parameter.name) % RandomTable::kElements);
      const int64_t count = parameter.num_elements();
      table.Lay(context, first, parameters.value(id).Reshaped({count}));
      if (shard.master.empty()) continue;
      const int64_t begin = std::max(parameter.begin, shard.begin);
      const int64_t end = std::min(parameter.begin + count, shard.begin + shard.count);
      if (begin >= end) continue;
      table.Lay(context, first + begin - parameter.begin,
                shard.master.Flat(begin - shard.begin, end - begin));
    }
  }
}

}  // namespace baleen
