// baleen eval: what a checkpoint's selection of keys costs against dense attention, and against
// selections that know nothing.
#include <algorithm>
#include <cstdio>
#include <memory>

#include "absl/strings/str_format.h"
#include "configs/schema/run_file.h"
#include "nlohmann/json.hpp"
#include "parallel/agree.h"
#include "parallel/mpi_communicator.h"
#include "trainer/arguments.h"
#include "trainer/checkpoint_path.h"
#include "trainer/commands.h"
#include "trainer/run_device.h"
#include "trainer/step.h"
#include "trainer/train_state.h"

namespace baleen {
namespace {

struct NamedResult {
  std::string name;
  ValidationResult result;
};

// The stage whose data and sizes are used: the last sparse one, else the last.
StageConfig EvalStage(const RunConfig& config) {
  StageConfig chosen = config.stages.back();
  for (const StageConfig& stage : config.stages) {
    if (stage.attention == AttentionMode::kSparse) chosen = stage;
  }
  // As a warm-up stage: indexers exist, only they own gradients, nothing else is allocated.
  chosen.attention = AttentionMode::kDense;
  chosen.train = TrainMode::kIndexer;
  return chosen;
}

double Mean(const std::vector<double>& values) {
  double sum = 0;
  for (double v : values) sum += v;
  return values.empty() ? 0 : sum / static_cast<double>(values.size());
}

// Mean loss of eight equal parts of the sequence.
std::vector<double> ByPosition(const std::vector<double>& losses) {
  constexpr size_t kParts = 8;
  std::vector<double> parts;
  for (size_t p = 0; p < kParts; ++p) {
    const size_t begin = losses.size() * p / kParts, end = losses.size() * (p + 1) / kParts;
    if (begin < end) parts.push_back(Mean({losses.begin() + begin, losses.begin() + end}));
  }
  return parts;
}

std::string AsText(const std::vector<NamedResult>& results) {
  std::string text =
      "selection          lm loss   mtp loss   loss by position (eighths of the sequence)\n";
  for (const NamedResult& r : results) {
    absl::StrAppendFormat(&text, "%-16s %9.4f  %9.4f  ", r.name, r.result.lm_loss,
                          r.result.mtp_loss.value_or(0));
    for (double loss : ByPosition(r.result.lm_loss_by_position))
      absl::StrAppendFormat(&text, " %.3f", loss);
    text += "\n";
  }
  const ValidationResult& dense = results.front().result;
  if (!dense.topk_mass_per_layer.empty()) {
    absl::StrAppendFormat(
        &text,
        "indexer: selected keys hold %.4f of the attention mass, the best ones would hold %.4f "
        "(ratio %.4f); recall %.4f\n",
        Mean(dense.topk_mass_per_layer), Mean(dense.topk_mass_of_best_per_layer),
        Mean(dense.topk_mass_per_layer) / Mean(dense.topk_mass_of_best_per_layer),
        Mean(dense.recall_per_layer));
  }
  return text;
}

std::string AsJson(const std::vector<NamedResult>& results) {
  nlohmann::json json;
  for (const NamedResult& r : results) {
    nlohmann::json& one = json[r.name];
    one["lm_loss"] = r.result.lm_loss;
    if (r.result.mtp_loss) one["mtp_loss"] = *r.result.mtp_loss;
    one["lm_loss_by_position"] = ByPosition(r.result.lm_loss_by_position);
  }
  const ValidationResult& dense = results.front().result;
  if (!dense.topk_mass_per_layer.empty()) {
    json["topk_mass"] = Mean(dense.topk_mass_per_layer);
    json["topk_mass_of_best"] = Mean(dense.topk_mass_of_best_per_layer);
    json["recall_at_k"] = Mean(dense.recall_per_layer);
    json["topk_mass_per_layer"] = dense.topk_mass_per_layer;
    json["topk_mass_of_best_per_layer"] = dense.topk_mass_of_best_per_layer;
  }
  return json.dump() + "\n";
}

absl::StatusOr<std::vector<NamedResult>> EvaluateAll(TrainingStage& stage, int64_t steps) {
  ModelOptions dense =
      stage.recipe()
          .options;  // indexer_loss kDense: the indexers run, so that they can be measured
  ModelOptions sparse = dense;
  // The same selection in either form; on GPUs the absorbed one is the faster at most lengths.
  sparse.attention = stage.context().device().kind == DeviceKind::kCuda
                         ? AttentionForm::kSparse
                         : AttentionForm::kMaskedDense;
  sparse.indexer_loss = IndexerLossKind::kNone;
  ModelOptions random = sparse, last = sparse;
  random.selection = SelectionKind::kRandom;
  last.selection = SelectionKind::kLast;
  std::vector<NamedResult> results;
  for (const auto& [name, options, measure] :
       {std::tuple{"dense", dense, true}, std::tuple{"sparse", sparse, false},
        std::tuple{"random", random, false}, std::tuple{"last", last, false}}) {
    ASSIGN_OR_RETURN(ValidationResult result, Validate(stage, {options, steps, measure}));
    results.push_back({name, std::move(result)});
  }
  return results;
}

// The table looks the same for an indexer that nobody has trained.
void WarnOfRandomWeights(const WeightSource& source, const StateReader* state, const Log& log) {
  const std::string path = source.AsFrozenSource().path;
  if (source.checkpoint() == nullptr && state == nullptr) {
    log.Warning(path, ": all weights are random, from run.seed; --checkpoint PATH takes others");
  }
  const std::vector<std::string>& drawn = source.accounting().initialised;
  const auto random = std::count_if(drawn.begin(), drawn.end(), [&](const std::string& name) {
    return state == nullptr || state->manifest().Find(name) == nullptr;
  });
  if (random > 0) {
    log.Warning(path, ": ", random, " indexer tensors are neither in the checkpoint nor in a ",
                "training state: they are random, and what is said of 'sparse' and of the ",
                "indexer is said of an untrained one");
  }
}

absl::Status Eval(const Arguments& arguments, MpiRuntime& mpi) {
  ASSIGN_OR_RETURN(
      const ParsedArguments parsed,
      ParsedArguments::Parse("eval", arguments, {{"checkpoint"}, {"steps"}, {"json", false}}));
  RETURN_IF_ERROR(
      parsed.CheckPositional(1, -1, "baleen eval RUN.yaml --checkpoint PATH [key=value ...]"));
  const auto& words = parsed.positional();
  ASSIGN_OR_RETURN(LoadedRun loaded, LoadRunConfig(words[0], {words.begin() + 1, words.end()}));
  RunConfig& config = loaded.config;
  Communicator& world = mpi.world();

  std::optional<StateReader> state;
  if (parsed.Has("checkpoint")) {
    ASSIGN_OR_RETURN(const CheckpointPath path,
                     ResolveCheckpointPath(parsed.Value("checkpoint", "")));
    if (path.kind == CheckpointPath::Kind::kHuggingFace) {
      config.model = {.checkpoint = path.path, .config = std::nullopt};
    } else {
      ASSIGN_OR_RETURN(StateReader reader, OpenState(path.path, world));
      state.emplace(std::move(reader));
    }
  }
  const StageConfig stage_config = EvalStage(config);
  if (stage_config.data.validation.empty()) {
    return ConfigError(words[0], ": data.validation is empty: there is nothing to evaluate on");
  }
  ASSIGN_OR_RETURN(WeightSource source,
                   WeightSource::Open(config.model, stage_config.dsa, config.run.seed));
  if (state) {
    RETURN_IF_ERROR(source.HashData(world));
    RETURN_IF_ERROR(CheckFrozenSources(*state, source, world));
  }
  if (world.rank() == 0) WarnOfRandomWeights(source, state ? &*state : nullptr, Log());
  ASSIGN_OR_RETURN(RunDevice device, RunDevice::Start(config.run.device, mpi));
  ASSIGN_OR_RETURN(const auto stage, TrainingStage::Make(config.run, stage_config, source.config(),
                                                         device.world(), device.context()));
  ChangedParameters changed;
  RETURN_IF_ERROR(
      Agree(world, LoadStage(*stage, source, state ? &*state : nullptr, false, changed)));
  ASSIGN_OR_RETURN(const int64_t steps, parsed.Integer("steps", stage_config.validation.steps, 1));
  ASSIGN_OR_RETURN(const std::vector<NamedResult> results, EvaluateAll(*stage, steps));
  if (world.rank() == 0) {
    const std::string text = parsed.Has("json") ? AsJson(results) : AsText(results);
    std::fwrite(text.data(), 1, text.size(), stdout);
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status EvalCommand(const Arguments& arguments, int* argc, char*** argv) {
  ASSIGN_OR_RETURN(const auto mpi, MpiRuntime::Start(argc, argv));
  return PrintOnce(Agree(mpi->world(), Eval(arguments, *mpi)), mpi->world());
}

}  // namespace baleen
