// TrainingStage: everything one training stage of the run file works with on this rank, made when
// the stage begins and gone when it ends: grid, communicators, parameters, model, optimizer, data.
// Weights come from weights.h, state.h.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "configs/schema/run_config.h"
#include "data/loader.h"
#include "parallel/grid_communicators.h"
#include "trainer/model/model.h"
#include "trainer/optimizer.h"
#include "trainer/recipe.h"
#include "trainer/stage_layout.h"

namespace baleen {

class TrainingStage {
 public:
  // ConfigError: a layout, size or recipe that cannot be. DataError: token files. Every rank calls
  // it; nothing large is allocated before all of them agree. `context`: what to compute on, with a
  // world that carries its tensors (run_device.h).
  static absl::StatusOr<std::unique_ptr<TrainingStage>> Make(
      const RunSection& run, const StageConfig& config, const ModelConfig& model,
      Communicator& world, const Context& context = Context::Cpu());
  // The same errors, and nothing made.
  static absl::Status Check(const RunSection& run, const StageConfig& config,
                            const ModelConfig& model, Communicator& world,
                            const Context& context = Context::Cpu());

  const StageConfig& config() const { return config_; }
  const ModelConfig& model_config() const { return model_config_; }
  const Recipe& recipe() const { return recipe_; }
  const StageLayout& layout() const { return layout_; }
  const ProcessGrid& grid() const { return layout_.grid; }
  const GridCommunicators& axes() const { return axes_; }
  Communicator& world() const { return world_; }
  int dp_rank() const { return axes_.dp->rank(); }
  int dp_size() const { return axes_.dp->size(); }
  RowShare row_share() const { return layout_.RowShareOf(world_.rank()); }
  DType dtype() const { return dtype_; }
  // This rank's pipeline actions of a training step, and of a pass without backward.
  const Program& program() const { return program_; }
  const Program& validation_program() const { return validation_program_; }

  // Measurements: these keys [rows of a microbatch on this rank, top-k] stand in for the
  // indexer's choice in every layer.
  void ReplaceSelection(const Tensor& ids_RK) { recipe_.options.replaced_ids_RK = ids_RK; }

  Context& context() { return context_; }
  // Host memory for what ranks tell each other: counts, flags.
  Context& host_context() { return host_context_; }
  ParameterStore& parameters() { return parameters_; }
  const Model& model() const { return *model_; }
  Optimizer& optimizer() { return *optimizer_; }
  Loader& train_data() { return *train_data_; }
  Loader* validation_data() { return validation_data_ ? &*validation_data_ : nullptr; }
  // What modules are handed; valid while this object lives.
  ModelContext model_context() {
    return {context_, model_config_, recipe_.options, parameters_, rope_, axes_};
  }
  // The same model with other options (validation without indexer loss, controls of baleen eval).
  ModelContext model_context(const ModelOptions& options) {
    return {context_, model_config_, options, parameters_, rope_, axes_};
  }

 private:
  // All that can fail: Make without Build.
  static absl::StatusOr<std::unique_ptr<TrainingStage>> Open(const RunSection& run,
                                                             const StageConfig& config,
                                                             const ModelConfig& model,
                                                             Communicator& world,
                                                             const Context& context);
  TrainingStage(const StageConfig& config, ModelConfig model, Recipe recipe, StageLayout layout,
                Communicator& world, const Context& context);
  absl::Status MakePrograms();
  void Build();

  StageConfig config_;
  ModelConfig model_config_;
  Recipe recipe_;
  StageLayout layout_;
  Communicator& world_;
  GridCommunicators axes_;
  DType dtype_;
  Program program_, validation_program_;
  Context context_;
  Context host_context_ = Context::Cpu();
  ParameterStore parameters_;
  RopeTable rope_;
  std::optional<Model> model_;
  std::optional<Optimizer> optimizer_;
  std::optional<Loader> train_data_;
  std::optional<Loader> validation_data_;
};

// ConfigError: a key of the stage asks for what the device cannot do.
absl::Status CheckBackend(const StageConfig& stage, DeviceKind device);

// Tables for RoPE up to `positions`, in the stage's dtype.
RopeTable MakeModelRope(const Context& context, const ModelConfig& config, DType dtype,
                        int64_t positions);

}  // namespace baleen
