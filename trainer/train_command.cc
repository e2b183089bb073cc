// baleen train: starts MPI, reads the run file on every rank, compares, runs.
#include <algorithm>

#include "configs/schema/run_file.h"
#include "parallel/agree.h"
#include "parallel/mpi_communicator.h"
#include "trainer/commands.h"
#include "trainer/run.h"
#include "trainer/stop_signal.h"

namespace baleen {
namespace {

// Another run file or another binary on one rank would train something nobody asked for.
absl::Status CompareRunFiles(const LoadedRun& loaded, Communicator& world) {
  const std::string mine = PrintRunConfig(loaded);
  const std::string first = BroadcastString(world, "run file", mine, 0);
  return Agree(world,
               mine == first
                   ? absl::OkStatus()
                   : ConfigError(loaded.path, ": this rank read another run file than rank 0; ",
                                 "every rank must see the same file and the same overrides"));
}

absl::Status Train(const Arguments& arguments, MpiRuntime& mpi) {
  RunOptions options;
  std::vector<std::string> rest;
  for (const std::string& argument : arguments) {
    if (argument == "--dry-run") {
      options.dry_run = true;
    } else {
      rest.push_back(argument);
    }
  }
  if (rest.empty())
    return ConfigError(
        "baleen train: no run file given; usage: baleen train RUN.yaml [key=value ...]");
  for (const std::string& word : rest) {
    if (word[0] == '-' && word.find('=') == std::string::npos) {
      return ConfigError("baleen train: no flag ", word, "; there is: --dry-run; ",
                         "usage: baleen train RUN.yaml [key=value ...] [--dry-run]");
    }
  }
  auto loaded = LoadRunConfig(rest[0], {rest.begin() + 1, rest.end()});
  RETURN_IF_ERROR(Agree(mpi.world(), loaded.status()));
  RETURN_IF_ERROR(CompareRunFiles(*loaded, mpi.world()));
  absl::StatusOr<RunDevice> device = RunDevice::Start(loaded->config.run.device, mpi);
  RETURN_IF_ERROR(Agree(mpi.world(), device.status()));
  return RunTraining(*loaded, options, *device);
}

}  // namespace

absl::Status TrainCommand(const Arguments& arguments, int* argc, char*** argv) {
  // On many nodes MPI and NCCL take minutes to start: the signal that most run files mean must not
  // kill the process before they are read.
  ListenFor(CheckpointSignal::kUsr1);
  ASSIGN_OR_RETURN(const auto mpi, MpiRuntime::Start(argc, argv));
  return PrintOnce(Train(arguments, *mpi), mpi->world());
}

}  // namespace baleen
