// baleen bench ops: flags, the run file's sizes, the table.
#pragma once

#include "configs/schema/run_file.h"
#include "parallel/mpi_communicator.h"
#include "trainer/bench/ops_bench.h"
#include "trainer/commands.h"

namespace baleen {

struct OpsArguments {
  OpRequest request;
  OpsOptions options;
  int64_t seed = 0;
  StageConfig stage;  // whose sizes are taken
  std::string json;   // a file; empty: none
  LoadedRun loaded;
};
absl::StatusOr<OpsArguments> ReadOpsArguments(const Arguments& arguments);

absl::Status BenchOpsCommand(const Arguments& arguments, MpiRuntime& mpi);

}  // namespace baleen
