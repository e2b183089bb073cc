// Which GPU a rank takes.
#pragma once

#include "kernels/core/status.h"

namespace baleen {

// `num_devices` GPUs are visible to this rank, one of `local_size` ranks of the host. Each takes
// the GPU of its number; where it sees a single one, that one: the launcher gave each rank its own,
// or lets them share it (NCCL refuses to share unasked: see nccl_communicator.h). EnvironmentError
// when there are fewer GPUs than ranks.
absl::StatusOr<int> ChooseDevice(int num_devices, int local_rank, int local_size);

}  // namespace baleen
