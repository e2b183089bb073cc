#include "tests/cuda/nccl_world_support.h"

#include "parallel/mpi_communicator.h"
#include "parallel/nccl_communicator.h"
#include "tests/cuda/gpu.h"

namespace baleen::testing {
namespace {

// Never destroyed: the driver is gone when statics are.
Communicator* Make(std::unique_ptr<Communicator> host) {
  auto made = MakeNcclCommunicator(Gpu(), std::move(host));
  CHECK_OK(made.status());
  return made->release();
}

}  // namespace

Communicator& GpuWorld() {
  static Communicator* const world = Make(WrapMpiWorld());
  return *world;
}

Communicator& GpuSelf() {
  static Communicator* const self = Make(MakeSelfCommunicator());
  return *self;
}

}  // namespace baleen::testing
