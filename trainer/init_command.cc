// baleen init: a random checkpoint. Values are a function of seed and name, so ranks share the
// writing and the result is the same for any number of them.
#include <cstdio>

#include "checkpoints/hf_init.h"
#include "configs/schema/run_file.h"
#include "parallel/agree.h"
#include "trainer/arguments.h"
#include "trainer/command_world.h"
#include "trainer/commands.h"
#include "trainer/parse_dtype.h"
#include "trainer/shared_export.h"

namespace baleen {
namespace {

struct InitJob {
  InitRequest request;
  TensorValues values;
  std::string to;
};

absl::StatusOr<InitJob> MakeJob(const Arguments& arguments) {
  ASSIGN_OR_RETURN(const ParsedArguments parsed,
                   ParsedArguments::Parse("init", arguments, {{"to"}, {"dtype"}, {"seed"}}));
  RETURN_IF_ERROR(parsed.CheckPositional(
      1, 1, "baleen init MODEL.yaml --to DIR [--dtype fp8|bf16] [--seed N]"));
  if (!parsed.Has("to")) return ConfigError("baleen init: --to DIR is missing");
  InitJob job;
  job.to = parsed.Value("to", "");
  ASSIGN_OR_RETURN(job.request.model, LoadModelYaml(parsed.positional()[0]));
  ASSIGN_OR_RETURN(job.request.dtype, ParseExportDType("init", parsed.Value("dtype", "fp8")));
  ASSIGN_OR_RETURN(const int64_t seed, parsed.Integer("seed", 0, 0));
  job.request.init.seed = static_cast<uint64_t>(seed);
  job.request.init.standard_deviation = job.request.model.initializer_range;
  ASSIGN_OR_RETURN(job.values, InitialValues(job.request));
  return job;
}

absl::Status Init(const Arguments& arguments, Communicator& world) {
  const absl::StatusOr<InitJob> job = MakeJob(arguments);
  RETURN_IF_ERROR(Agree(world, job.status()));
  RETURN_IF_ERROR(ExportShared(InitAsExport(job->request), job->values, job->to, world));
  if (world.rank() == 0) std::printf("wrote %s\n", job->to.c_str());
  return absl::OkStatus();
}

}  // namespace

absl::Status InitCommand(const Arguments& arguments, int* argc, char*** argv) {
  ASSIGN_OR_RETURN(CommandWorld world, CommandWorld::Start(argc, argv));
  return PrintOnce(Init(arguments, world.communicator()), world.communicator());
}

}  // namespace baleen
