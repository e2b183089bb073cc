// The ranks of a command that shares its work where it can and needs no launcher: export, init.
//
// Under mpirun or srun it is MPI's world. Started by itself it is one rank, and MPI is not even
// initialised: a machine without a working MPI can still write a checkpoint.
#pragma once

#include <memory>

#include "parallel/mpi_communicator.h"

namespace baleen {

class CommandWorld {
 public:
  static absl::StatusOr<CommandWorld> Start(int* argc, char*** argv);

  Communicator& communicator() { return mpi_ ? mpi_->world() : *self_; }

 private:
  CommandWorld() = default;
  std::unique_ptr<MpiRuntime> mpi_;     // null without a launcher
  std::unique_ptr<Communicator> self_;  // null with one
};

// What launchers leave in the environment of the processes they start.
bool StartedByLauncher();

}  // namespace baleen
