// Memory pools of the CUDA backend: device memory in stream order, and page-locked host memory.
#pragma once

#include <memory>

#include "kernels/core/context.h"
#include "kernels/core/cuda_context.h"
#include "kernels/core/status.h"

namespace baleen {

// Memory of GPU `device_index`, taken and given back in the order of `stream`: what is freed may be
// handed out while its last reader still runs. Memory once got from the driver stays with the
// process. Work on another stream must be ordered before the tensor is dropped.
absl::StatusOr<std::shared_ptr<MemoryPool>> MakeCudaPool(int device_index,
                                                         std::shared_ptr<CudaStream> stream);

// See CudaDevice::pinned_pool.
std::shared_ptr<MemoryPool> MakePinnedPool(std::shared_ptr<CudaStream> stream);

}  // namespace baleen
