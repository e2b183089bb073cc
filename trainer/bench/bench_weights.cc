#include "trainer/bench/bench_weights.h"

#include <algorithm>
#include <map>

#include "checkpoints/tensor_catalog.h"
#include "kernels/core/random.h"
#include "kernels/core/transfer.h"
#include "kernels/ops/elementwise.h"

namespace baleen {
namespace {

// A prime, so that rows of matrices fall on different places of the table.
constexpr int64_t kTableElements = 4194301;

// What a run of parameters is filled from, in the dtypes of masters and of the model's copies.
struct Table {
  Tensor statistics, working;
};

Table MakeTable(const Context& context, DType working, double scale, int64_t seed) {
  const DType statistics = StatisticsOf(working);
  const Tensor host = Context::Cpu().Empty(DType::kF32, {kTableElements});
  const RandomStream random(static_cast<uint64_t>(seed), NameStream("bench weights"));
  for (int64_t i = 0; i < kTableElements; ++i) {
    host.data<float>()[i] = static_cast<float>(scale * random.Normal(static_cast<uint64_t>(i)));
  }
  Table table;
  table.statistics = InDtype(context, CopyToDevice(context, host), statistics);
  table.working = InDtype(context, table.statistics, working);
  return table;
}

Table ConstantTable(const Context& context, DType working, double value, int64_t elements) {
  const DType statistics = StatisticsOf(working);
  const Tensor host = Context::Cpu().Empty(DType::kF32, {elements});
  std::fill_n(host.data<float>(), elements, static_cast<float>(value));
  const Tensor on_device = InDtype(context, CopyToDevice(context, host), statistics);
  return {on_device, InDtype(context, on_device, working)};
}

// Element i of `to` becomes element (first + i) mod n of the table's tensor of that dtype.
void Lay(const Context& context, const Table& table, int64_t first, const Tensor& to) {
  const Tensor& from = to.dtype() == table.working.dtype() ? table.working : table.statistics;
  const int64_t count = to.num_elements(), period = from.num_elements();
  for (int64_t done = 0; done < count;) {
    const int64_t begin = (first + done) % period;
    const int64_t size = std::min(count - done, period - begin);
    Copy(context, from.Flat(begin, size), to.Flat(done, size));
    done += size;
  }
}

}  // namespace

void FillBenchWeights(TrainingStage& stage, int64_t seed) {
  const Context& context = stage.context();
  const ModelConfig& model = stage.model_config();
  std::map<std::string, TensorRole> roles;
  for (const CatalogEntry& entry : TensorCatalog(model, {.with_indexer = true})) {
    roles[entry.name] = entry.role;
  }
  const Table normal = MakeTable(context, stage.dtype(), model.initializer_range, seed);
  const int64_t widest = std::max({model.hidden_size, model.q_lora_rank, model.n_routed_experts,
                                   model.kv_lora_rank, model.index_head_dim});
  const Table ones = ConstantTable(context, stage.dtype(), 1, widest);
  const Table zeros = ConstantTable(context, stage.dtype(), 0, widest);
  const ParameterStore& parameters = stage.parameters();
  for (const OptimizerShard& shard : stage.optimizer().shards()) {
    for (const int id : parameters.buckets()[shard.bucket].parameters) {
      const Parameter& parameter = parameters.at(id);
      const TensorRole role = roles.at(parameter.name);
      const Table& table = role == TensorRole::kWeight ? normal
                           : role == TensorRole::kNorm ? ones
                                                       : zeros;
      const auto first = static_cast<int64_t>(NameStream(parameter.name) % kTableElements);
      const int64_t count = parameter.value.num_elements();
      Lay(context, table, first, parameter.value.Reshaped({count}));
      if (shard.master.empty()) continue;
      const int64_t begin = std::max(parameter.begin, shard.begin);
      const int64_t end = std::min(parameter.begin + count, shard.begin + shard.count);
      if (begin >= end) continue;
      Lay(context, table, first + begin - parameter.begin,
          shard.master.Flat(begin - shard.begin, end - begin));
    }
  }
}

}  // namespace baleen
