// baleen export: from a run's training state (or a Hugging Face checkpoint) to a Hugging Face
// checkpoint.
#include <cstdio>

#include "checkpoints/state_reader.h"
#include "configs/schema/run_file.h"
#include "kernels/core/context.h"
#include "kernels/core/file.h"
#include "kernels/core/log.h"
#include "trainer/arguments.h"
#include "trainer/checkpoint_path.h"
#include "trainer/commands.h"
#include "trainer/parse_dtype.h"
#include "trainer/weights.h"

namespace baleen {
namespace {

struct ExportInput {
  std::optional<WeightSource> source;
  std::optional<StateReader> state;
};

bool IsIndexer(const std::string& name) { return name.find(".indexer.") != std::string::npos; }

absl::StatusOr<ExportInput> OpenInput(const CheckpointPath& path, const std::string& run_flag) {
  ExportInput input;
  ModelSection model;
  DsaConfig dsa;
  int64_t seed = 0;
  if (path.kind == CheckpointPath::Kind::kHuggingFace) {
    model.checkpoint = path.path;
  } else {
    const std::string run_dir = run_flag.empty() ? path.run_dir : run_flag;
    if (run_dir.empty()) {
      return ConfigError("baleen export: ", path.path,
                         " lies in no run directory; give the run with --run DIR");
    }
    ASSIGN_OR_RETURN(const LoadedRun run, LoadRunConfig(JoinPath(run_dir, "run.yaml")));
    model = run.config.model;
    dsa = run.config.stages[0].dsa;
    seed = run.config.run.seed;
    ASSIGN_OR_RETURN(StateReader state, StateReader::Open(path.path));
    RETURN_IF_ERROR(state.VerifyAllFiles());
    input.state.emplace(std::move(state));
  }
  ASSIGN_OR_RETURN(WeightSource source, WeightSource::Open(model, dsa, seed));
  input.source.emplace(std::move(source));
  if (input.state) {
    const FrozenSource frozen = input.source->AsFrozenSource();
    RETURN_IF_ERROR(
        input.state->CheckSources([&](const std::string& p) -> absl::StatusOr<std::string> {
          if (p != frozen.path) return DataError(p, " is not the run's model");
          return frozen.hash;
        }));
  }
  return input;
}

bool HasTrainedIndexer(const ExportInput& input) {
  if (!input.state) return input.source->checkpoint()->config().has_indexer;
  for (const TensorRecord& tensor : input.state->manifest().tensors) {
    if (IsIndexer(tensor.name)) return true;
  }
  return input.source->checkpoint() != nullptr && input.source->checkpoint()->config().has_indexer;
}

}  // namespace

absl::Status ExportCommand(const Arguments& arguments, int*, char***) {
  ASSIGN_OR_RETURN(
      const ParsedArguments parsed,
      ParsedArguments::Parse("export", arguments,
                             {{"to"}, {"dtype"}, {"format"}, {"run"}, {"shard-bytes"}}));
  RETURN_IF_ERROR(
      parsed.CheckPositional(1, 1, "baleen export RUN_OR_CHECKPOINT --to DIR [--dtype fp8|bf16]"));
  if (!parsed.Has("to")) return ConfigError("baleen export: --to DIR is missing");
  ASSIGN_OR_RETURN(const CheckpointPath path, ResolveCheckpointPath(parsed.positional()[0]));
  ASSIGN_OR_RETURN(ExportInput input, OpenInput(path, parsed.Value("run", "")));
  const bool indexer = HasTrainedIndexer(input);
  const std::string format = parsed.Value("format", indexer ? "v3.2" : "v3.1");
  if (format != "v3.2" && format != "v3.1") {
    return ConfigError("baleen export: --format = '", format, "': expected v3.2 or v3.1");
  }
  ExportRequest request;
  request.model = input.source->config();
  request.architecture = format == "v3.2" ? HfArchitecture::kV32 : HfArchitecture::kV31;
  ASSIGN_OR_RETURN(request.dtype, ParseExportDType("export", parsed.Value("dtype", "fp8")));
  request.source = input.source->checkpoint();
  ASSIGN_OR_RETURN(request.max_shard_bytes, parsed.Integer("shard-bytes", kDefaultShardBytes, 1));
  if (input.state) {
    request.trained = [&](const std::string& name) {
      return input.state->manifest().Find(name) != nullptr;
    };
  }
  const Context context = Context::Cpu();
  std::map<std::string, Shape> shapes;
  for (const CatalogEntry& entry : TensorCatalog(request.model, {.with_indexer = true})) {
    shapes[entry.name] = entry.shape;
  }
  const TensorValues values = [&](const std::string& name) -> absl::StatusOr<Tensor> {
    const Tensor tensor = context.Empty(DType::kF32, shapes.at(name));
    const Box box = WholeBox(tensor.shape());
    if (input.state) {
      if (const TensorRecord* record = input.state->manifest().Find(name)) {
        // A run in double keeps its digits until here.
        const Tensor stored = context.Empty(record->dtype, shapes.at(name));
        RETURN_IF_ERROR(
            input.state->Read(name, box, 0, stored.num_elements(), stored.dtype(), stored.raw()));
        return stored;
      }
    }
    RETURN_IF_ERROR(input.source->Load(name, box, DType::kF32, tensor.raw()));
    return tensor;
  };
  if (request.architecture == HfArchitecture::kV32 && !indexer) {
    WriteLog(Severity::kWarning, "",
             "the indexers of this export were never trained: they select at random");
  }
  RETURN_IF_ERROR(ExportHf(request, values, parsed.Value("to", "")));
  std::printf("wrote %s (%s, %s) from %s\n", parsed.Value("to", "").c_str(), format.c_str(),
              parsed.Value("dtype", "fp8").c_str(), path.path.c_str());
  return absl::OkStatus();
}

}  // namespace baleen
