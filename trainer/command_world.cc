#include "trainer/command_world.h"

#include <cstdlib>

#include "absl/strings/numbers.h"

namespace baleen {

bool StartedByLauncher() {
  // Open MPI's mpirun; PMIx and PMI (srun, Hydra) for direct starts.
  for (const char* name : {"OMPI_COMM_WORLD_SIZE", "PMIX_RANK", "PMI_RANK"}) {
    if (std::getenv(name) != nullptr) return true;
  }
  // srun without either: MPI says what is missing, better than one export per task. A batch
  // script's own shell is no step and has no such variable.
  int tasks = 0;
  const char* text = std::getenv("SLURM_STEP_NUM_TASKS");
  return text != nullptr && absl::SimpleAtoi(text, &tasks) && tasks > 1;
}

absl::StatusOr<CommandWorld> CommandWorld::Start(int* argc, char*** argv) {
  CommandWorld world;
  if (StartedByLauncher()) {
    ASSIGN_OR_RETURN(world.mpi_, MpiRuntime::Start(argc, argv));
  } else {
    world.self_ = MakeSelfCommunicator("world");
  }
  return world;
}

}  // namespace baleen
