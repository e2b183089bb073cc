#include "trainer/training_stage.h"

#include <cstring>

#include "parallel/agree.h"

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

absl::Status CheckLayout(const StageConfig& stage, const ProcessGrid& grid) {
  const ParallelismConfig& asked = stage.parallelism;
  const std::vector<std::pair<const char*, int64_t>> axes = {
      {"tensor", asked.tensor},
      {"pipeline", asked.pipeline},
      {"expert", asked.expert},
      {"context", asked.context},
      {"virtual_stages", asked.virtual_stages.value_or(1)}};
  for (const auto& [name, value] : axes) {
    if (value != 1) {
      return ConfigError("stage '", stage.name, "': parallelism.", name, " = ", value,
                         ": this version trains with data parallelism only; set it to 1 and the ",
                         grid.world_size(), " ranks become data-parallel");
    }
  }
  if (!asked.layer_split.empty()) {
    return ConfigError("stage '", stage.name,
                       "': parallelism.layer_split needs a pipeline; leave it out");
  }
  const int64_t samples = stage.micro_batch_size * grid.dp_size();
  if (stage.global_batch_size % samples != 0) {
    return ConfigError("stage '", stage.name, "': global_batch_size = ", stage.global_batch_size,
                       " is no multiple of micro_batch_size ", stage.micro_batch_size, " x data ",
                       grid.dp_size(), " = ", samples, "; the next that fits is ",
                       (stage.global_batch_size / samples + 1) * samples);
  }
  return absl::OkStatus();
}

Tensor IntTensor(const Context& context, const std::vector<int32_t>& values) {
  const Tensor tensor = context.Empty(DType::kI32, {static_cast<int64_t>(values.size())});
  std::memcpy(tensor.raw(), values.data(), values.size() * sizeof(int32_t));
  return tensor;
}

}  // namespace

Batch MakeBatch(const Context& context, const Microbatch& microbatch) {
  Batch batch;
  batch.num_sequences = microbatch.num_samples;
  batch.seq_length = microbatch.seq_length;
  batch.tokens_T = IntTensor(context, microbatch.tokens);
  batch.targets_T = IntTensor(context, microbatch.targets);
  batch.mtp_tokens_T = IntTensor(context, microbatch.mtp_tokens);
  batch.mtp_targets_T = IntTensor(context, microbatch.mtp_targets);
  batch.positions_T = IntTensor(context, microbatch.positions);
  batch.windows.begin_T = IntTensor(context, microbatch.key_begin);
  std::vector<int32_t> end(microbatch.tokens.size()), sequence(microbatch.tokens.size());
  for (size_t row = 0; row < end.size(); ++row) {
    end[row] = static_cast<int32_t>(row) + 1;
    sequence[row] = static_cast<int32_t>(static_cast<int64_t>(row) / microbatch.seq_length);
  }
  batch.windows.end_T = IntTensor(context, end);
  batch.sequence_T = IntTensor(context, sequence);
  return batch;
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
                             ProcessGrid grid, Communicator& world)
    : config_(config),
      model_config_(std::move(model)),
      recipe_(std::move(recipe)),
      grid_(grid),
      world_(world),
      axes_(SplitGrid(world, grid)),
      dtype_(config.precision.compute == Compute::kFp64 ? DType::kF64 : DType::kF32) {}

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
  const auto size = [](int64_t value) {
    return static_cast<int>(std::min<int64_t>(value, 1 << 20));
  };
  ASSIGN_OR_RETURN(ProcessGrid grid,
                   ProcessGrid::Make(world.size(), {.tensor = size(config.parallelism.tensor),
                                                    .pipeline = size(config.parallelism.pipeline),
                                                    .expert = size(config.parallelism.expert),
                                                    .context = size(config.parallelism.context)}));
  RETURN_IF_ERROR(CheckLayout(config, grid));
  std::unique_ptr<TrainingStage> stage(
      new TrainingStage(config, effective, std::move(recipe), grid, world));
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

void TrainingStage::Build() {
  // The indexers are declared in every recipe but plain dense training, which knows nothing of
  // them.
  model_.emplace(model_config_, recipe_.use_indexer, parameters_);
  parameters_.Allocate(context_, dtype_, axes_.dp_cp->size(), recipe_.trained);
  rope_ = MakeModelRope(context_, model_config_, dtype_, config_.data.seq_length);
  optimizer_.emplace(context_, parameters_, config_.optimizer, recipe_.trained, axes_, world_);
}

}  // namespace baleen
