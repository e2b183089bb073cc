// baleen export: from a run's training state (or a Hugging Face checkpoint) to a Hugging Face
// checkpoint, the work shared by the ranks of the job. Each phase that can fail ends in Agree.
#include <cstdio>
#include <filesystem>

#include "checkpoints/state_reader.h"
#include "configs/schema/run_file.h"
#include "kernels/core/file.h"
#include "kernels/core/log.h"
#include "parallel/agree.h"
#include "trainer/arguments.h"
#include "trainer/checkpoint_path.h"
#include "trainer/command_world.h"
#include "trainer/commands.h"
#include "trainer/parse_dtype.h"
#include "trainer/shared_export.h"
#include "trainer/train_state.h"
#include "trainer/weights.h"

namespace baleen {
namespace {

struct ExportOptions {
  std::string from, to, run;
  std::string dtype_word;
  ExportDType dtype = ExportDType::kFp8;
  std::string format;  // empty: v3.2 where there are trained indexers
  int64_t shard_bytes = kDefaultShardBytes;
};

// What the run file says about the model a state belongs to.
struct ModelOrigin {
  ModelSection model;
  DsaConfig dsa;
  int64_t seed = 0;
  std::string said_by;  // for messages: where a path of the model comes from; empty: the command
};

struct ExportInput {
  std::optional<WeightSource> source;
  std::optional<StateReader> state;

  const TensorRecord* Trained(const std::string& name) const {
    return state ? state->manifest().Find(name) : nullptr;
  }
};

absl::StatusOr<ExportOptions> ParseOptions(const Arguments& arguments) {
  ASSIGN_OR_RETURN(
      const ParsedArguments parsed,
      ParsedArguments::Parse("export", arguments,
                             {{"to"}, {"dtype"}, {"format"}, {"run"}, {"shard-bytes"}}));
  RETURN_IF_ERROR(
      parsed.CheckPositional(1, 1, "baleen export RUN_OR_CHECKPOINT --to DIR [--dtype fp8|bf16]"));
  if (!parsed.Has("to")) return ConfigError("baleen export: --to DIR is missing");
  ExportOptions options;
  options.from = parsed.positional()[0];
  options.to = parsed.Value("to", "");
  options.run = parsed.Value("run", "");
  options.dtype_word = parsed.Value("dtype", "fp8");
  ASSIGN_OR_RETURN(options.dtype, ParseExportDType("export", options.dtype_word));
  options.format = parsed.Value("format", "");
  if (parsed.Has("format") && options.format != "v3.2" && options.format != "v3.1") {
    return ConfigError("baleen export: --format = '", options.format, "': expected v3.2 or v3.1");
  }
  ASSIGN_OR_RETURN(options.shard_bytes, parsed.Integer("shard-bytes", kDefaultShardBytes, 1));
  return options;
}

// Rank 0 looks: to another rank a run that trains could show another newest state.
absl::StatusOr<CheckpointPath> ResolveOnce(const std::string& from, Communicator& world) {
  CheckpointPath path;
  absl::Status status;
  if (world.rank() == 0) {
    absl::StatusOr<CheckpointPath> resolved = ResolveCheckpointPath(from);
    status = resolved.status();
    if (resolved.ok()) path = *std::move(resolved);
  }
  RETURN_IF_ERROR(Agree(world, status));
  const bool is_hf = path.kind == CheckpointPath::Kind::kHuggingFace;
  const std::string kind = BroadcastString(world, "export kind", is_hf ? "hf" : "state", 0);
  path.kind = kind == "hf" ? CheckpointPath::Kind::kHuggingFace : CheckpointPath::Kind::kState;
  path.path = BroadcastString(world, "export path", path.path, 0);
  path.run_dir = BroadcastString(world, "export run", path.run_dir, 0);
  return path;
}

absl::StatusOr<ModelOrigin> ReadOrigin(const CheckpointPath& path, const std::string& run_flag) {
  ModelOrigin origin;
  if (path.kind == CheckpointPath::Kind::kHuggingFace) {
    origin.model.checkpoint = path.path;
    return origin;
  }
  const std::string run_dir = run_flag.empty() ? path.run_dir : run_flag;
  if (run_dir.empty()) {
    return ConfigError("baleen export: ", path.path,
                       " lies in no run directory; give the run with --run DIR");
  }
  const std::string file = JoinPath(run_dir, "run.yaml");
  ASSIGN_OR_RETURN(const LoadedRun run, LoadRunConfig(file));
  std::error_code error;
  origin.said_by = absl::StrCat(
      "the model of ", file, ", as seen from ", std::filesystem::current_path(error).string(),
      " (paths are relative to where the run was started: start the export there, and ",
      "where the model has moved leave a symbolic link)");
  origin.model = run.config.model;
  origin.dsa = run.config.stages[0].dsa;
  origin.seed = run.config.run.seed;
  return origin;
}

// The state must have been trained from this source: hash for what was frozen, shapes for the rest.
absl::Status CheckStateFits(const StateReader& state, WeightSource& source, Communicator& world) {
  RETURN_IF_ERROR(source.HashData(world));
  RETURN_IF_ERROR(CheckFrozenSources(state, source, world));
  for (const CatalogEntry& entry : TensorCatalog(source.config(), {.with_indexer = true})) {
    const TensorRecord* record = state.manifest().Find(entry.name);
    if (record != nullptr && record->shape != entry.shape) {
      return DataError(state.directory(), ": tensor ", entry.name, ": the state has shape ",
                       ShapeString(record->shape), ", the model of the run file ",
                       ShapeString(entry.shape));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<ExportInput> OpenInput(const ExportOptions& options, const CheckpointPath& path,
                                      Communicator& world) {
  ExportInput input;
  const absl::StatusOr<ModelOrigin> origin = ReadOrigin(path, options.run);
  RETURN_IF_ERROR(Agree(world, origin.status()));
  if (path.kind != CheckpointPath::Kind::kHuggingFace) {
    // Each file is hashed by one rank.
    ASSIGN_OR_RETURN(StateReader state, OpenState(path.path, world));
    input.state.emplace(std::move(state));
  }
  absl::StatusOr<WeightSource> source =
      WeightSource::Open(origin->model, origin->dsa, origin->seed);
  RETURN_IF_ERROR(Agree(world, origin->said_by.empty()
                                   ? source.status()
                                   : Annotate(source.status(), origin->said_by)));
  if (input.state) RETURN_IF_ERROR(CheckStateFits(*input.state, *source, world));
  input.source.emplace(*std::move(source));
  return input;
}

bool HasTrainedIndexer(const ExportInput& input) {
  if (input.state) {
    for (const TensorRecord& tensor : input.state->manifest().tensors) {
      if (tensor.name.find(".indexer.") != std::string::npos) return true;
    }
  }
  return input.source->checkpoint() != nullptr && input.source->checkpoint()->config().has_indexer;
}

// Rows of a tensor as the state has them, else as the source has them.
absl::StatusOr<Tensor> ReadBand(ExportInput& input, BandBuffer& buffer, const std::string& name,
                                const Box& band) {
  const TensorRecord* record = input.Trained(name);
  // A run in double keeps its digits until here.
  const bool wide = record != nullptr && record->dtype == DType::kF64;
  const Tensor tensor = buffer.Take(wide ? DType::kF64 : DType::kF32, band.extent);
  if (record != nullptr) {
    RETURN_IF_ERROR(
        input.state->Read(name, band, 0, tensor.num_elements(), tensor.dtype(), tensor.raw()));
  } else {
    RETURN_IF_ERROR(input.source->Load(name, band, tensor.dtype(), tensor.raw()));
  }
  return tensor;
}

absl::Status Export(const Arguments& arguments, Communicator& world) {
  const absl::StatusOr<ExportOptions> options = ParseOptions(arguments);
  RETURN_IF_ERROR(Agree(world, options.status()));
  ASSIGN_OR_RETURN(const CheckpointPath path, ResolveOnce(options->from, world));
  ASSIGN_OR_RETURN(ExportInput input, OpenInput(*options, path, world));
  const bool indexer = HasTrainedIndexer(input);
  const std::string format =
      !options->format.empty() ? options->format : (indexer ? "v3.2" : "v3.1");
  ExportRequest request;
  request.model = input.source->config();
  request.architecture = format == "v3.2" ? HfArchitecture::kV32 : HfArchitecture::kV31;
  request.dtype = options->dtype;
  request.source = input.source->checkpoint();
  request.max_shard_bytes = options->shard_bytes;
  request.trained = [&](const std::string& name) { return input.Trained(name) != nullptr; };
  if (request.architecture == HfArchitecture::kV32 && !indexer && world.rank() == 0) {
    WriteLog(Severity::kWarning, "",
             "the indexers of this export were never trained: they select at random");
  }
  if (request.architecture == HfArchitecture::kV31 && indexer && world.rank() == 0) {
    WriteLog(
        Severity::kWarning, "",
        "v3.1 has no indexers: the trained ones are not in this export; --format v3.2 has them");
  }
  BandBuffer buffer;
  const TensorValues values = [&](const std::string& name, const Box& band) {
    return ReadBand(input, buffer, name, band);
  };
  RETURN_IF_ERROR(ExportShared(request, values, options->to, world));
  if (world.rank() == 0) {
    std::printf("wrote %s (%s, %s) from %s\n", options->to.c_str(), format.c_str(),
                options->dtype_word.c_str(), path.path.c_str());
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status ExportCommand(const Arguments& arguments, int* argc, char*** argv) {
  ASSIGN_OR_RETURN(CommandWorld world, CommandWorld::Start(argc, argv));
  return PrintOnce(Export(arguments, world.communicator()), world.communicator());
}

}  // namespace baleen
