// MPI: starts the job, names ranks and hosts, and carries host memory (device memory is NCCL's).
#pragma once

#include <memory>
#include <string>

#include "kernels/core/status.h"
#include "parallel/communicator.h"

namespace baleen {

// MPI_Init .. MPI_Finalize as an object: one per process, made first in main(), destroyed last.
class MpiRuntime {
 public:
  // EnvironmentError when MPI cannot start. Started without a launcher, the world has one rank.
  static absl::StatusOr<std::unique_ptr<MpiRuntime>> Start(int* argc, char*** argv);
  ~MpiRuntime();

  Communicator& world() { return *world_; }
  int local_rank() const { return local_rank_; }  // among the ranks of this host
  int local_size() const { return local_size_; }

 private:
  MpiRuntime() = default;
  std::unique_ptr<Communicator> world_;
  int local_rank_ = 0;
  int local_size_ = 1;
};

// What the MPI library calls itself, version first: "Open MPI v4.1.4, package: ...".
std::string MpiLibraryVersion();

// MPI's world as a Communicator, where somebody else runs MPI_Init (tests).
std::unique_ptr<Communicator> WrapMpiWorld();

// Prints `message` and the world's exit code is `exit_code`: every rank is stopped. Does not
// return.
[[noreturn]] void AbortAllRanks(const std::string& message, int exit_code);

}  // namespace baleen
