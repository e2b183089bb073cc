#include "parallel/choose_device.h"

namespace baleen {

absl::StatusOr<int> ChooseDevice(int num_devices, int local_rank, int local_size) {
  if (num_devices == 0) {
    return EnvironmentError(
        "no GPU is visible: look at nvidia-smi and CUDA_VISIBLE_DEVICES, or use run.device: cpu");
  }
  if (num_devices == 1) return 0;
  if (local_size > num_devices) {
    return EnvironmentError(local_size, " ranks on this host, but only ", num_devices,
                            " GPUs are visible: start at most one rank a GPU");
  }
  return local_rank;
}

}  // namespace baleen
