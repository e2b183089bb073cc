// NCCL is loaded when first needed (kernels/core/shared_library.h); <nccl.h> is used as documented.
#pragma once

#include <string>

#include "kernels/core/status.h"

namespace baleen {

// EnvironmentError when NCCL is missing or too old. Before it no NCCL function may be called.
absl::Status LoadNccl();

// "2.28.3"; empty when NCCL cannot be loaded or asked. Not in a build without CUDA.
std::string NcclVersion();

}  // namespace baleen
