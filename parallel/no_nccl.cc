// What nccl_communicator.h offers in a build without CUDA.
#include "parallel/nccl_communicator.h"

namespace baleen {

absl::StatusOr<std::unique_ptr<Communicator>> MakeNcclCommunicator(const Context&,
                                                                   std::unique_ptr<Communicator>,
                                                                   const NcclOptions&) {
  return EnvironmentError("NCCL: this build has no CUDA backend; build the preset cuda");
}

}  // namespace baleen
