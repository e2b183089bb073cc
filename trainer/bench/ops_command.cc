#include "trainer/bench/ops_command.h"

#include <cstdio>

#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "configs/schema/scalar.h"
#include "kernels/core/cuda_context.h"
#include "kernels/core/file.h"
#include "parallel/agree.h"
#include "trainer/arguments.h"
#include "trainer/bench/bench_stage.h"
#include "trainer/bench/ops_report.h"
#include "trainer/run_device.h"

namespace baleen {
namespace {

const char kUsage[] = "baleen bench ops RUN.yaml [--ops PATTERN,...] [KEY=VALUE ...]";
constexpr int64_t kMostHeads = 1024;
constexpr int64_t kMostTokens = int64_t{256} << 10;  // what the top-k kernel takes in a row

// "4Ki,32Ki": whole numbers from 1 to `most`; none where the flag is not given.
absl::StatusOr<std::vector<int64_t>> IntegerList(const ParsedArguments& parsed, const char* flag,
                                                 int64_t most) {
  std::vector<int64_t> values;
  if (!parsed.Has(flag)) return values;
  for (absl::string_view word : absl::StrSplit(parsed.Value(flag, ""), ',')) {
    int64_t value = 0;
    const std::string error = ParseInteger(word, value);
    if (!error.empty() || value < 1 || value > most) {
      return ConfigError("baleen bench ops: --", flag, " ", parsed.Value(flag, ""), ": '", word,
                         "': expected whole numbers from 1 to ", most,
                         ", separated by commas, like 4Ki,32Ki");
    }
    values.push_back(value);
  }
  return values;
}

absl::StatusOr<std::vector<BenchIds>> IdsList(const ParsedArguments& parsed) {
  std::vector<BenchIds> all;
  for (absl::string_view name : absl::StrSplit(parsed.Value("ids", "near,random"), ',')) {
    const auto ids = ParseBenchIds(name);
    if (!ids.ok() || *ids == BenchIds::kIndexer) {
      return ConfigError("baleen bench ops: --ids ", name, ": known are near and random");
    }
    all.push_back(*ids);
  }
  return all;
}

// The named stage, or the last one: where the run ends.
absl::StatusOr<StageConfig> StageOf(const ParsedArguments& parsed, const LoadedRun& loaded) {
  const std::vector<StageConfig>& stages = loaded.config.stages;
  if (!parsed.Has("stage")) return stages.back();
  const std::string wanted = parsed.Value("stage", "");
  std::vector<std::string> names;
  for (const StageConfig& stage : stages) {
    if (stage.name == wanted) return stage;
    names.push_back(stage.name);
  }
  return ConfigError("baleen bench ops: --stage ", wanted, ": ", loaded.path, " has ",
                     absl::StrJoin(names, ", "));
}

BenchDevice Describe(RunDevice& device, const OpCeilings& ceilings) {
  BenchDevice described{.name = "CPU", .cuda = device.cuda()};
  if (device.cuda()) described.name = device.context().cuda().properties().name;
  described.matmul_flops = ceilings.matmul_flops;
  return described;
}

void Print(const std::string& text) {
  std::fputs(text.c_str(), stdout);
  std::fflush(stdout);
}

absl::Status CheckAlone(MpiRuntime& mpi) {
  if (mpi.world().size() == 1) return absl::OkStatus();
  return ConfigError("baleen bench ops: found ", mpi.world().size(),
                     " ranks: one process measures one device; start it without mpirun. The sizes "
                     "are those of one rank of the run file's parallelism");
}

}  // namespace

absl::StatusOr<OpsArguments> ReadOpsArguments(const Arguments& arguments) {
  ASSIGN_OR_RETURN(const ParsedArguments parsed, ParsedArguments::Parse("bench ops", arguments,
                                                                        {{"ops"},
                                                                         {"ids"},
                                                                         {"heads"},
                                                                         {"tokens"},
                                                                         {"rows"},
                                                                         {"steps"},
                                                                         {"stage"},
                                                                         {"json"},
                                                                         {"no-trace", false}}));
  RETURN_IF_ERROR(parsed.CheckPositional(2, -1, kUsage));
  const std::vector<std::string>& words = parsed.positional();
  OpsArguments read;
  read.request.ops = parsed.Value("ops", "*");
  ASSIGN_OR_RETURN(read.request.heads, IntegerList(parsed, "heads", kMostHeads));
  ASSIGN_OR_RETURN(read.request.tokens, IntegerList(parsed, "tokens", kMostTokens));
  ASSIGN_OR_RETURN(const std::vector<int64_t> rows, IntegerList(parsed, "rows", kMostTokens));
  if (rows.size() > 1)
    return ConfigError("baleen bench ops: --rows ", parsed.Value("rows", ""), ": expected one");
  if (!rows.empty()) read.request.query_rows = rows[0];
  ASSIGN_OR_RETURN(read.request.ids, IdsList(parsed));
  ASSIGN_OR_RETURN(read.options.steps, parsed.Integer("steps", read.options.steps, 1));
  read.options.trace = !parsed.Has("no-trace");
  read.json = parsed.Value("json", "");
  ASSIGN_OR_RETURN(read.loaded, LoadRunConfig(words[1], {words.begin() + 2, words.end()}));
  read.seed = read.loaded.config.run.seed;
  ASSIGN_OR_RETURN(read.stage, StageOf(parsed, read.loaded));
  return read;
}

absl::Status BenchOpsCommand(const Arguments& arguments, MpiRuntime& mpi) {
  RETURN_IF_ERROR(CheckAlone(mpi));
  ASSIGN_OR_RETURN(OpsArguments read, ReadOpsArguments(arguments));
  const RunConfig& config = read.loaded.config;
  ASSIGN_OR_RETURN(const ModelConfig model, ReadBenchModel(config.model));
  ASSIGN_OR_RETURN(RunDevice device, RunDevice::Start(config.run.device, mpi));
  ASSIGN_OR_RETURN(const OpSizes sizes, MakeOpSizes(read.stage, model, device.cuda()));
  ASSIGN_OR_RETURN(const std::vector<OpCase> cases, MakeOpCases(sizes, read.request));
  Context& context = device.context();
  OpInputs inputs(context, sizes.dtype, read.seed);
  const OpCeilings before = MeasureCeilings(inputs);
  const BenchDevice described = Describe(device, before);
  read.options.memory_bytes = UsableMemory(context);
  Print(OpsHeading(described, before));
  std::string no_trace;
  const std::vector<OpResult> results = BenchOps(
      inputs, sizes, cases, read.options,
      [&](const OpResult& result) { Print(OpLine(described, before, result)); }, no_trace);
  const OpCeilings after = MeasureCeilings(inputs);
  Print(OpsSummary(described, before, after, results, no_trace));
  if (read.json.empty()) return absl::OkStatus();
  return WriteFileDurably(read.json, OpsJson(described, sizes, before, after, results));
}

}  // namespace baleen
