#include "trainer/bench/bench_stage.h"

#include <algorithm>

#include "checkpoints/hf_config.h"
#include "kernels/core/file.h"
#include "parallel/agree.h"
#include "trainer/bench/bench_weights.h"

namespace baleen {
namespace {

bool SelectsKeys(const TrainingStage& stage) {
  return stage.recipe().options.attention != AttentionForm::kDense;
}

}  // namespace

absl::StatusOr<ModelConfig> ReadBenchModel(const ModelSection& model) {
  if (model.config) return LoadModelYaml(*model.config);
  ASSIGN_OR_RETURN(HfConfig config, ReadHfConfig(JoinPath(*model.checkpoint, "config.json")));
  return config.model;
}

absl::StatusOr<BenchStage> MakeBenchStage(const RunSection& run, StageConfig config,
                                          const ModelConfig& model, RunDevice& device,
                                          int64_t seed) {
  // Two epochs' worth of a step at least: shuffling has something to choose from.
  const int64_t samples = std::max<int64_t>(4, 2 * config.global_batch_size);
  auto tokens = BenchTokens::Make(samples * (config.data.seq_length + 1), model.vocab_size, seed);
  RETURN_IF_ERROR(Agree(device.world(), tokens.status()));
  config.data.train = {{tokens->prefix(), 1.0}};
  config.data.validation.clear();
  config.data.document_mask = false;
  ASSIGN_OR_RETURN(auto stage,
                   TrainingStage::Make(run, config, model, device.world(), device.context()));
  FillBenchWeights(*stage, seed);
  return BenchStage{*std::move(tokens), std::move(stage)};
}

std::vector<BenchIds> IdsOf(const TrainingStage& stage, const BenchRequest& request) {
  return SelectsKeys(stage) ? request.ids : std::vector<BenchIds>{BenchIds::kIndexer};
}

void UseIds(TrainingStage& stage, BenchIds ids, int64_t seed) {
  if (!SelectsKeys(stage)) return;
  if (ids == BenchIds::kIndexer) return stage.ReplaceSelection(Tensor());
  const StageConfig& config = stage.config();
  const RowShare share = stage.row_share();
  const std::vector<int32_t> rows =
      ZigzagRows(config.micro_batch_size, config.data.seq_length, share.rank(), share.size());
  const int64_t topk = stage.model_config().index_topk;
  const ScopedUse use(stage.context(), "bench ids");
  stage.ReplaceSelection(
      IntTensor(stage.context(), MakeBenchIds(ids, rows, config.data.seq_length, topk, seed))
          .Reshaped({static_cast<int64_t>(rows.size()), topk}));
}

BenchResult DescribeStage(const TrainingStage& stage, BenchIds ids) {
  BenchResult result;
  result.stage = stage.config().name;
  result.ids = ids;
  result.kernel = stage.recipe().kernel;
  result.seq_length = stage.config().data.seq_length;
  result.world_size = stage.grid().world_size();
  return result;
}

}  // namespace baleen
