// baleen bench layer: one block between embedding and head, its phases taken step by step, as the
// pipeline engine may.
#include "kernels/core/check.h"
#include "parallel/agree.h"
#include "trainer/bench/bench_stage.h"
#include "trainer/flops.h"
#include "trainer/make_batch.h"

namespace baleen {
namespace {

// In the order in which they run. Forward: ModelPart's steps; a full recompute is part of the
// backward of what was combined last.
const std::vector<std::string>& Phases() {
  static const auto* const phases = new std::vector<std::string>{"embedding",
                                                                 "forward attention",
                                                                 "forward dispatch",
                                                                 "forward experts",
                                                                 "forward combine",
                                                                 "head",
                                                                 "head backward",
                                                                 "backward combine",
                                                                 "backward experts",
                                                                 "backward dispatch",
                                                                 "backward attention",
                                                                 "embedding backward",
                                                                 "weights",
                                                                 "warm-up"};
  return *phases;
}
constexpr int kHead = 5, kHeadBackward = 6, kBackwardAttention = 10, kEmbeddingBackward = 11,
              kWeights = 12, kWarmUp = 13;

bool OfBlock(int phase) {
  return phase != 0 && phase != kHead && phase != kHeadBackward && phase != kEmbeddingBackward;
}

ModelConfig OneBlock(ModelConfig model, bool moe) {
  model.num_hidden_layers = 1;
  model.first_k_dense_replace = moe ? 0 : 1;
  model.num_nextn_predict_layers = 0;
  return model;
}

// One microbatch through the block, forward and backward.
class LayerPass {
 public:
  LayerPass(TrainingStage& stage, Batch batch) : stage_(stage), batch_(std::move(batch)) {
    const auto rows = static_cast<double>(batch_.num_keys());
    const Recipe& recipe = stage.recipe();
    pass_.scales = {.lm = 1 / rows,
                    .kl = recipe.indexer_weight / rows,
                    .balance = recipe.balance_weight / static_cast<double>(batch_.num_sequences)};
  }

  absl::Status Run(const Workload::Watch& watch) {
    const auto begin = [&](int phase) {
      if (watch) watch(phase);
    };
    const ModelContext model = stage_.model_context();
    const ModelPart& part = stage_.model().parts().front();
    StepStats stats = StepStats::Zeros(stage_.context(), 1, model.config.n_routed_experts);
    if (stage_.recipe().forward_only) {
      begin(kWarmUp);
      part.WarmUp(model, batch_, pass_, Tensor(), stats);
      return absl::OkStatus();
    }
    ModelPart::Saved saved;
    ModelPart::Begin(Tensor(), saved);
    for (int step = 0; step <= kHead; ++step) {
      begin(step);
      part.ForwardStep(model, batch_, pass_, stats, saved);
    }
    ModelPart::Begin(Tensor(), saved);
    for (int step = kHeadBackward; step <= kEmbeddingBackward; ++step) {
      begin(step);
      part.BackwardStep(model, batch_, pass_, saved);
      if (step == kBackwardAttention) {
        begin(kWeights);
        part.FormBlockWeights(model, batch_, pass_, stats, saved);
      }
    }
    begin(kWeights);
    part.BackwardWeight(model, batch_, pass_, stats, saved);
    CHECK(saved.blocks.front().x.empty()) << "the block's weight gradients were not formed";
    return absl::OkStatus();
  }

 private:
  TrainingStage& stage_;
  Batch batch_;
  PassOptions pass_;
};

}  // namespace

absl::StatusOr<std::vector<BenchResult>> BenchLayer(const RunSection& run, const StageConfig& stage,
                                                    const ModelConfig& model, bool moe,
                                                    RunDevice& device,
                                                    const BenchRequest& request) {
  StageConfig config = stage;
  config.parallelism.layer_split.clear();
  if (config.parallelism.pipeline != 1) {
    return ConfigError("baleen bench layer: parallelism.pipeline = ", config.parallelism.pipeline,
                       ": one block is on one pipeline rank; set it to 1");
  }
  ASSIGN_OR_RETURN(const BenchStage bench,
                   MakeBenchStage(run, config, OneBlock(model, moe), device, request.seed));
  TrainingStage& on_rank = *bench.stage;
  auto microbatches = on_rank.train_data().Step(
      0, config.global_batch_size, config.micro_batch_size, on_rank.dp_rank(), on_rank.dp_size());
  RETURN_IF_ERROR(Agree(on_rank.world(), microbatches.status()));
  LayerPass pass(on_rank, MakeBatch(on_rank.context(), microbatches->front(), on_rank.row_share()));
  std::vector<BenchResult> results;
  for (const BenchIds ids : IdsOf(on_rank, request)) {
    UseIds(on_rank, ids, request.seed);
    BenchResult result = DescribeStage(on_rank, ids);
    result.what = moe ? "layer, moe" : "layer, dense";
    on_rank.optimizer().BeginStep();
    ASSIGN_OR_RETURN(
        result.measured,
        Measure(on_rank.context(), on_rank.world(),
                {Phases(), [&](const Workload::Watch& watch) { return pass.Run(watch); }},
                request.measure));
    double all = 0, of_block = 0;
    for (size_t n = 0; n < result.measured.phases.size(); ++n) {
      all += result.measured.phases[n].seconds;
      if (OfBlock(static_cast<int>(n))) of_block += result.measured.phases[n].seconds;
    }
    result.seconds = result.measured.median_seconds * (all > 0 ? of_block / all : 1);
    result.tokens = config.micro_batch_size * config.data.seq_length * on_rank.dp_size();
    result.flops_per_token =
        BlockCosts(on_rank.model_config(), on_rank.recipe(), config.data.seq_length).layers.front();
    results.push_back(std::move(result));
  }
  return results;
}

}  // namespace baleen
