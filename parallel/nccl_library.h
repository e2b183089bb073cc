// NCCL is loaded when first needed (kernels/core/shared_library.h); <nccl.h> is used as documented.
#pragma once

#include "kernels/core/status.h"

namespace baleen {

// EnvironmentError when NCCL is missing or too old. Before it no NCCL function may be called.
absl::Status LoadNccl();

}  // namespace baleen
