// The ranks of a test, with NCCL for what lies on the GPU.
#pragma once

#include <memory>

#include "parallel/communicator.h"

namespace baleen::testing {

// All ranks of mpirun; one for all tests that use it: NCCL takes a second to start.
Communicator& GpuWorld();
// This rank alone.
Communicator& GpuSelf();

}  // namespace baleen::testing
