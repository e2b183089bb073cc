#include "trainer/training_stage.h"

#include "kernels/ops/linear/fp8_check.h"
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

// What the backend cannot do is refused by name before anything is allocated: a key is honoured or
// it is an error.
absl::Status CheckCpu(const StageConfig& stage, const std::string& where) {
  if (stage.precision.compute == Compute::kBf16) {
    return ConfigError(
        where,
        "precision.compute = bf16 needs device: cuda; on the CPU use fp32 (or fp64 for checking)");
  }
  if (stage.optimizer.moments == MomentsDType::kBf16) {
    return ConfigError(where, "optimizer.moments = bf16 needs device: cuda; use fp32");
  }
  if (stage.dsa.indexer_dtype == IndexerDType::kBf16) {
    return ConfigError(where,
                       "dsa.indexer_dtype = bf16 needs device: cuda; on the CPU use auto, fp32 or "
                       "fp8 (simulated)");
  }
  return absl::OkStatus();
}

absl::Status CheckCuda(const StageConfig& stage, const std::string& where) {
  if (stage.precision.compute == Compute::kFp64) {
    return ConfigError(where,
                       "precision.compute = fp64 is for checking on the CPU (run.device: cpu); on "
                       "GPUs use bf16 or fp32");
  }
  const bool bf16 = ComputeDType(stage.precision, DeviceKind::kCuda) == DType::kBF16;
  if (bf16 && stage.dsa.indexer_dtype == IndexerDType::kFp32) {
    return ConfigError(
        where,
        "dsa.indexer_dtype = fp32 beside precision.compute bf16: the indexer "
        "computes in the model's dtype; use auto or bf16, or precision.compute: fp32");
  }
  if (!bf16 && stage.dsa.indexer_dtype == IndexerDType::kBf16) {
    return ConfigError(where,
                       "dsa.indexer_dtype = bf16 beside precision.compute fp32: the indexer "
                       "computes in the model's dtype; use auto or fp32");
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckBackend(const StageConfig& stage, DeviceKind device) {
  const std::string where = absl::StrCat("stage '", stage.name, "': ");
  return device == DeviceKind::kCuda ? CheckCuda(stage, where) : CheckCpu(stage, where);
}

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
                             StageLayout layout, Communicator& world, const Context& context)
    : config_(config),
      model_config_(std::move(model)),
      recipe_(std::move(recipe)),
      layout_(std::move(layout)),
      world_(world),
      axes_(SplitGrid(world, layout_.grid, layout_.embedding_stages, layout_.expert_node_size)),
      dtype_(ComputeDType(config.precision, context.device().kind)),
      context_(context) {
  recipe_.options.expert_rows = layout_.expert_rows;
}

absl::StatusOr<std::unique_ptr<TrainingStage>> TrainingStage::Make(const RunSection& run,
                                                                   const StageConfig& config,
                                                                   const ModelConfig& model,
                                                                   Communicator& world,
                                                                   const Context& context) {
  ASSIGN_OR_RETURN(auto stage, Open(run, config, model, world, context));
  stage->Build();
  return stage;
}

absl::Status TrainingStage::Check(const RunSection& run, const StageConfig& config,
                                  const ModelConfig& model, Communicator& world,
                                  const Context& context) {
  return Open(run, config, model, world, context).status();
}

absl::StatusOr<std::unique_ptr<TrainingStage>> TrainingStage::Open(const RunSection& run,
                                                                   const StageConfig& config,
                                                                   const ModelConfig& model,
                                                                   Communicator& world,
                                                                   const Context& context) {
  RETURN_IF_ERROR(CheckBackend(config, context.device().kind));
  const ModelConfig effective = EffectiveModel(model, config.dsa);
  RETURN_IF_ERROR(effective.Validate(absl::StrCat("stage '", config.name, "'")));
  if (config.data.seq_length > effective.max_position_embeddings) {
    return ConfigError(
        "data.seq_length = ", config.data.seq_length,
        " is more than the model's max_position_embeddings = ", effective.max_position_embeddings);
  }
  ASSIGN_OR_RETURN(Recipe recipe, MakeRecipe(config, effective, context.device().kind));
  ASSIGN_OR_RETURN(StageLayout layout, MakeStageLayout(config, effective, recipe, world.size()));
  if (recipe.options.gemm == GemmKind::kFp8Block) RETURN_IF_ERROR(Agree(world, CheckFp8(context)));
  std::unique_ptr<TrainingStage> stage(
      new TrainingStage(config, effective, std::move(recipe), std::move(layout), world, context));
  RETURN_IF_ERROR(stage->MakePrograms());
  LoaderOptions training = MakeLoaderOptions(config, config.data.train, run.seed,
                                             effective.vocab_size, SampleOrder::kShuffled);
  training.first_sample = config.data.first_sample;
  auto train = Loader::Open(std::move(training));
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
  context_.pool().ResetPeak();  // the peak of this stage is reported
  // The indexers are declared in every recipe but plain dense training, which knows nothing of
  // them.
  model_.emplace(model_config_, layout_.PartsOf(axes_.pp->rank()), recipe_.use_indexer,
                 layout_.PlacementOf(world_.rank()), parameters_);
  parameters_.Allocate(context_, dtype_, axes_, recipe_.trained);
  rope_ = MakeModelRope(context_, model_config_, dtype_, config_.data.seq_length);
  optimizer_.emplace(context_, parameters_, config_.optimizer, recipe_.trained, axes_, world_);
}

}  // namespace baleen
