// baleen bench: how fast a training stage of a run file is on this machine, and where its time
// goes. Random weights and tokens; no checkpoint and no run directory is read or written.
#include <algorithm>
#include <cstdio>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "configs/schema/run_file.h"
#include "kernels/core/cuda_context.h"
#include "kernels/core/file.h"
#include "parallel/agree.h"
#include "parallel/mpi_communicator.h"
#include "trainer/arguments.h"
#include "trainer/bench/bench_report.h"
#include "trainer/bench/bench_stage.h"
#include "trainer/bench/ops_command.h"
#include "trainer/commands.h"

namespace baleen {
namespace {

const char kUsage[] = "baleen bench step|layer|ops RUN.yaml [--stage NAME,...] [KEY=VALUE ...]";

struct BenchOptions {
  bool layer = false;
  bool moe = true;  // the block of a layer
  BenchRequest request;
  std::vector<std::string> stages;  // empty: all
  std::string json, trace;          // files; empty: none
  LoadedRun loaded;
};

absl::Status CheckStages(const BenchOptions& options) {
  std::vector<std::string> names;
  for (const StageConfig& stage : options.loaded.config.stages) names.push_back(stage.name);
  for (const std::string& wanted : options.stages) {
    if (std::find(names.begin(), names.end(), wanted) == names.end()) {
      return ConfigError("baleen bench: --stage ", wanted, ": ", options.loaded.path, " has ",
                         absl::StrJoin(names, ", "));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<BenchOptions> ReadOptions(const Arguments& arguments) {
  ASSIGN_OR_RETURN(const ParsedArguments parsed, ParsedArguments::Parse("bench", arguments,
                                                                        {{"stage"},
                                                                         {"block"},
                                                                         {"ids"},
                                                                         {"steps"},
                                                                         {"warmup"},
                                                                         {"json"},
                                                                         {"trace"},
                                                                         {"no-trace", false}}));
  RETURN_IF_ERROR(parsed.CheckPositional(2, -1, kUsage));
  const std::vector<std::string>& words = parsed.positional();
  BenchOptions options;
  if (words[0] != "step" && words[0] != "layer") {
    return ConfigError("baleen bench: expected 'step', 'layer' or 'ops' first, found '", words[0],
                       "'; usage: ", kUsage);
  }
  options.layer = words[0] == "layer";
  const std::string block = parsed.Value("block", "moe");
  if (block != "moe" && block != "dense") {
    return ConfigError("baleen bench: --block ", block, ": known are moe and dense");
  }
  if (parsed.Has("block") && !options.layer) {
    return ConfigError("baleen bench step: --block is for baleen bench layer");
  }
  options.moe = block == "moe";
  MeasureOptions& measure = options.request.measure;
  ASSIGN_OR_RETURN(measure.steps, parsed.Integer("steps", measure.steps, 1));
  ASSIGN_OR_RETURN(measure.warmup, parsed.Integer("warmup", measure.warmup, 0));
  measure.trace = !parsed.Has("no-trace");
  for (absl::string_view name : absl::StrSplit(parsed.Value("ids", "indexer"), ',')) {
    ASSIGN_OR_RETURN(const BenchIds ids, ParseBenchIds(name));
    options.request.ids.push_back(ids);
  }
  options.stages = absl::StrSplit(parsed.Value("stage", ""), ',', absl::SkipEmpty());
  options.json = parsed.Value("json", "");
  options.trace = parsed.Value("trace", "");
  if (!options.trace.empty() && !measure.trace) {
    return ConfigError("baleen bench: --trace FILE and --no-trace exclude each other");
  }
  ASSIGN_OR_RETURN(options.loaded, LoadRunConfig(words[1], {words.begin() + 2, words.end()}));
  options.request.seed = options.loaded.config.run.seed;
  RETURN_IF_ERROR(CheckStages(options));
  return options;
}

BenchDevice Describe(RunDevice& device) {
  BenchDevice described{.name = "CPU", .cuda = device.cuda()};
  if (device.cuda()) described.name = device.context().cuda().properties().name;
  described.matmul_flops = MatmulCeiling(device.context());
  return described;
}

// Rank 0's trace of the last result.
absl::Status WriteFiles(const BenchOptions& options, const BenchDevice& device,
                        const std::vector<BenchResult>& results) {
  if (!options.json.empty())
    RETURN_IF_ERROR(WriteFileDurably(options.json, BenchJson(device, results)));
  if (options.trace.empty() || results.empty()) return absl::OkStatus();
  const Measured& measured = results.back().measured;
  if (measured.records.empty()) {
    return EnvironmentError("baleen bench: --trace ", options.trace, ": there is no trace: ",
                            measured.no_trace.empty() ? "this is the CPU" : measured.no_trace);
  }
  std::vector<std::string> phases;
  for (const PhaseTime& phase : measured.phases) phases.push_back(phase.name);
  return WriteFileDurably(options.trace, ChromeTrace(measured.records, phases));
}

absl::Status Bench(const Arguments& arguments, MpiRuntime& mpi) {
  absl::StatusOr<BenchOptions> options = ReadOptions(arguments);
  RETURN_IF_ERROR(Agree(mpi.world(), options.status()));
  const RunConfig& config = options->loaded.config;
  absl::StatusOr<ModelConfig> model = ReadBenchModel(config.model);
  RETURN_IF_ERROR(Agree(mpi.world(), model.status()));
  absl::StatusOr<RunDevice> started = RunDevice::Start(config.run.device, mpi);
  RETURN_IF_ERROR(Agree(mpi.world(), started.status()));
  RunDevice device = *std::move(started);
  const bool first = mpi.world().rank() == 0;
  const BenchDevice described = Describe(device);
  if (first) {
    std::printf("%s, matmul %.1f %s\n", described.name.c_str(),
                described.matmul_flops / (described.cuda ? 1e12 : 1e9),
                described.cuda ? "TFLOP/s" : "GFLOP/s");
  }
  std::vector<BenchResult> results;
  for (const StageConfig& stage : config.stages) {
    const std::vector<std::string>& wanted = options->stages;
    if (!wanted.empty() && std::find(wanted.begin(), wanted.end(), stage.name) == wanted.end())
      continue;
    ASSIGN_OR_RETURN(
        std::vector<BenchResult> of_stage,
        options->layer
            ? BenchLayer(config.run, stage, *model, options->moe, device, options->request)
            : BenchSteps(config.run, stage, *model, device, options->request));
    for (BenchResult& result : of_stage) {
      if (first) {
        std::fputs(absl::StrCat("\n", BenchText(described, result)).c_str(), stdout);
        std::fflush(stdout);
      }
      results.push_back(std::move(result));
    }
  }
  return Agree(mpi.world(), first ? WriteFiles(*options, described, results) : absl::OkStatus());
}

}  // namespace

absl::Status BenchCommand(const Arguments& arguments, int* argc, char*** argv) {
  ASSIGN_OR_RETURN(const auto mpi, MpiRuntime::Start(argc, argv));
  const bool ops = !arguments.empty() && arguments[0] == "ops";
  return PrintOnce(ops ? BenchOpsCommand(arguments, *mpi) : Bench(arguments, *mpi), mpi->world());
}

}  // namespace baleen
