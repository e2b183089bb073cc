#include "trainer/training_stage.h"

#include "parallel/agree.h"
#include "parallel/pipeline_engine.h"

namespace baleen {
namespace {

LoaderOptions MakeLoaderOptions(const StageConfig& config, const std::vector<DataSource>& sources,
                                int64_t seed, int64_t vocab_size, SampleOrder order) {
  LoaderOptions options;
  for (const DataSource& source : sources) options.sources.push_back({source.path, source.weight});
  options.seq_length = config.data.seq_length;
  options.seed = static_cast<uint64_t>(seed);
  options.vocab_size = vocab_size;
  options.document_mask = config.data.document_mask;
  options.order = order;
  return options;
}

// What this backend cannot do is refused by name before anything is allocated: a key is honoured or
// it is an error.
absl::Status CheckBackend(const RunSection& run, const StageConfig& stage) {
  const std::string where = absl::StrCat("stage '", stage.name, "': ");
  if (run.device == DeviceChoice::kCuda) {
    return ConfigError(
        "run.device = cuda: this version trains on the CPU only; use run.device: cpu (or auto)");
  }
  if (stage.precision.compute == Compute::kBf16) {
    return ConfigError(
        where,
        "precision.compute = bf16 needs device: cuda; on the CPU use fp32 (or fp64 for checking)");
  }
  if (stage.precision.gemm == GemmPrecision::kFp8Block) {
    return ConfigError(where, "precision.gemm = fp8_block needs device: cuda; leave it at auto");
  }
  if (stage.optimizer.moments == MomentsDType::kBf16) {
    return ConfigError(where, "optimizer.moments = bf16 needs device: cuda; use fp32");
  }
  if (stage.dsa.indexer_dtype == IndexerDType::kBf16) {
    return ConfigError(where,
                       "dsa.indexer_dtype = bf16 needs device: cuda; on the CPU use auto, fp32 or "
                       "fp8 (simulated)");
  }
  if (!stage.deterministic) {
    return ConfigError(
        where,
        "deterministic = false: the CPU backend has no faster variant to allow; leave it true");
  }
  if (stage.checkpoint.async) {
    return ConfigError(where,
                       "checkpoint.async = true: this version writes checkpoints in the "
                       "foreground; set it to false");
  }
  return absl::OkStatus();
}

}  // namespace

RopeTable MakeModelRope(const Context& context, const ModelConfig& config, DType dtype,
                        int64_t positions) {
  RopeFrequencyParams params;
  params.dim = config.qk_rope_head_dim;
  params.theta = config.rope_theta;
  if (config.rope_scaling) {
    params.factor = config.rope_scaling->factor;
    params.original_max_position = config.rope_scaling->original_max_position_embeddings;
    params.beta_fast = config.rope_scaling->beta_fast;
    params.beta_slow = config.rope_scaling->beta_slow;
  }
  return MakeRopeTable(context, dtype, RopeFrequencies(params), positions);
}

TrainingStage::TrainingStage(const StageConfig& config, ModelConfig model, Recipe recipe,
                             StageLayout layout, Communicator& world)
    : config_(config),
      model_config_(std::move(model)),
      recipe_(std::move(recipe)),
      layout_(std::move(layout)),
      world_(world),
      axes_(SplitGrid(world, layout_.grid, layout_.embedding_stages, layout_.expert_node_size)),
      dtype_(config.precision.compute == Compute::kFp64 ? DType::kF64 : DType::kF32) {
  recipe_.options.expert_rows = layout_.expert_rows;
}

absl::StatusOr<std::unique_ptr<TrainingStage>> TrainingStage::Make(const RunSection& run,
                                                                   const StageConfig& config,
                                                                   const ModelConfig& model,
                                                                   Communicator& world) {
  ASSIGN_OR_RETURN(auto stage, Open(run, config, model, world));
  stage->Build();
  return stage;
}

absl::Status TrainingStage::Check(const RunSection& run, const StageConfig& config,
                                  const ModelConfig& model, Communicator& world) {
  return Open(run, config, model, world).status();
}

absl::StatusOr<std::unique_ptr<TrainingStage>> TrainingStage::Open(const RunSection& run,
                                                                   const StageConfig& config,
                                                                   const ModelConfig& model,
                                                                   Communicator& world) {
  RETURN_IF_ERROR(CheckBackend(run, config));
  const ModelConfig effective = EffectiveModel(model, config.dsa);
  RETURN_IF_ERROR(effective.Validate(absl::StrCat("stage '", config.name, "'")));
  if (config.data.seq_length > effective.max_position_embeddings) {
    return ConfigError(
        "data.seq_length = ", config.data.seq_length,
        " is more than the model's max_position_embeddings = ", effective.max_position_embeddings);
  }
  ASSIGN_OR_RETURN(Recipe recipe, MakeRecipe(config, effective));
  ASSIGN_OR_RETURN(StageLayout layout, MakeStageLayout(config, effective, recipe, world.size()));
  std::unique_ptr<TrainingStage> stage(
      new TrainingStage(config, effective, std::move(recipe), std::move(layout), world));
  RETURN_IF_ERROR(stage->MakePrograms());
  auto train = Loader::Open(MakeLoaderOptions(config, config.data.train, run.seed,
                                              effective.vocab_size, SampleOrder::kShuffled));
  RETURN_IF_ERROR(Agree(world, train.status()));
  stage->train_data_.emplace(std::move(train).value());
  if (!config.data.validation.empty()) {
    auto validation = Loader::Open(MakeLoaderOptions(
        config, config.data.validation, run.seed, effective.vocab_size, SampleOrder::kFileOrder));
    RETURN_IF_ERROR(Agree(world, validation.status()));
    stage->validation_data_.emplace(std::move(validation).value());
  }
  return stage;
}

// Every rank makes and checks the whole schedule: the same numbers give the same lists everywhere.
absl::Status TrainingStage::MakePrograms() {
  ScheduleSpec spec = layout_.schedule;
  ASSIGN_OR_RETURN(const CheckedSchedule train, MakeCheckedSchedule(spec));
  spec.forward_only = true;
  ASSIGN_OR_RETURN(const CheckedSchedule validation, MakeCheckedSchedule(spec));
  program_ = train.schedule.programs[axes_.pp->rank()];
  validation_program_ = validation.schedule.programs[axes_.pp->rank()];
  return absl::OkStatus();
}

void TrainingStage::Build() {
  // The indexers are declared in every recipe but plain dense training, which knows nothing of
  // them.
  model_.emplace(model_config_, layout_.PartsOf(axes_.pp->rank()), recipe_.use_indexer,
                 layout_.PlacementOf(world_.rank()), parameters_);
  parameters_.Allocate(context_, dtype_, axes_, recipe_.trained);
  rope_ = MakeModelRope(context_, model_config_, dtype_, config_.data.seq_length);
  optimizer_.emplace(context_, parameters_, config_.optimizer, recipe_.trained, axes_, world_);
}

}  // namespace baleen
