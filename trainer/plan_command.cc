// baleen plan: what a run file needs on a number of ranks, without any of them.
#include <cstdio>

#include "absl/strings/numbers.h"
#include "checkpoints/hf_config.h"
#include "configs/schema/run_file.h"
#include "kernels/core/file.h"
#include "trainer/arguments.h"
#include "trainer/commands.h"
#include "trainer/plan.h"

namespace baleen {
namespace {

constexpr int64_t kMostRanks = int64_t{1} << 24;

void Print(const std::string& text) { std::fwrite(text.data(), 1, text.size(), stdout); }

// The sizes of the run's model. A plan is wanted before the checkpoint is there: then those of
// DeepSeek-V3.1, which this project is about, and the plan says so.
absl::StatusOr<ModelConfig> ReadModel(const ModelSection& model, std::string& note) {
  if (model.config) return LoadModelYaml(*model.config);
  if (DirectoryExists(*model.checkpoint)) {
    ASSIGN_OR_RETURN(HfConfig config, ReadHfConfig(JoinPath(*model.checkpoint, "config.json")));
    return config.model;
  }
  note = absl::StrCat("model     ", *model.checkpoint,
                      " is not here: planned with the sizes of DeepSeek-V3.1 (671B); for others "
                      "say model.checkpoint= or model.config=\n");
  ModelConfig published;
  published.rope_scaling = YarnConfig();
  return published;
}

// The smallest world in which the layout of every stage can be.
absl::StatusOr<int> SmallestWorld(const RunConfig& config, const ModelConfig& model) {
  constexpr int kMost = 1 << 16;
  absl::Status status;
  for (int world = 1; world <= kMost; ++world) {
    status = absl::OkStatus();
    for (const StageConfig& stage : config.stages) {
      const ModelConfig effective = EffectiveModel(model, stage.dsa);
      ASSIGN_OR_RETURN(const Recipe recipe, MakeRecipe(stage, effective));
      const auto layout = MakeStageLayout(stage, effective, recipe, world);
      if (!layout.ok()) status = layout.status();
      if (!status.ok()) break;
    }
    if (status.ok()) return world;
  }
  return Annotate(status, "baleen plan: no world size fits every stage; give one with --world");
}

std::string NearestText(const PlanRequest& request) {
  const std::vector<FittingLayout> nearest = NearestFittingLayouts(request, 2);
  if (nearest.empty()) {
    return "  no layout near the asked one fits: more ranks, or shorter sequences\n";
  }
  std::string text = "  nearest layouts that fit:\n";
  for (const FittingLayout& layout : nearest) {
    absl::StrAppend(&text, "    ", layout.changes, ": ", layout.needed_bytes / (int64_t{1} << 20),
                    " MiB a rank\n");
  }
  return text;
}

}  // namespace

absl::Status PlanCommand(const Arguments& arguments, int*, char***) {
  ASSIGN_OR_RETURN(
      const ParsedArguments parsed,
      ParsedArguments::Parse("plan", arguments,
                             {{"world"}, {"gpu"}, {"schedule", false}, {"json", false}}));
  RETURN_IF_ERROR(parsed.CheckPositional(1, -1, "baleen plan RUN.yaml [KEY=VALUE ...]"));
  const std::vector<std::string>& words = parsed.positional();
  ASSIGN_OR_RETURN(const LoadedRun loaded,
                   LoadRunConfig(words[0], {words.begin() + 1, words.end()}));
  const RunConfig& config = loaded.config;
  std::string note;
  ASSIGN_OR_RETURN(const ModelConfig model, ReadModel(config.model, note));
  ASSIGN_OR_RETURN(int64_t world, parsed.Integer("world", 0, 1));
  if (world > kMostRanks) {
    return ConfigError("baleen plan: --world = ", world, ": expected at most ", kMostRanks);
  }
  if (!parsed.Has("world")) {
    ASSIGN_OR_RETURN(world, SmallestWorld(config, model));
  }
  const std::string gpu = parsed.Value("gpu", DefaultDevice(config.run.device));
  const bool json = parsed.Has("json");
  std::vector<StagePlan> plans;
  absl::Status status;
  for (const StageConfig& stage : config.stages) {
    ASSIGN_OR_RETURN(const DeviceSpec device, FindDevice(gpu));
    const PlanRequest request{stage, model, static_cast<int>(world), device};
    if (!json && &stage == &config.stages[0]) {
      Print(absl::StrCat(loaded.path, " on ", world, " ranks\ndevice    ", device.description, "\n",
                         note));
    }
    absl::StatusOr<StagePlan> plan = PlanStage(request);
    // The other stages' plans are of use all the same.
    if (!plan.ok()) {
      if (status.ok()) status = plan.status();
      continue;
    }
    if (!json) {
      Print(absl::StrCat("\n", PlanText(*plan, {.schedule_grid = parsed.Has("schedule")})));
      if (!plan->Fits()) Print(NearestText(request));
    }
    plans.push_back(*std::move(plan));
  }
  if (json) Print(PlanJson(plans));
  return status;
}

}  // namespace baleen
