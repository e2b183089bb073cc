// CUDA_CHECK: a failed CUDA call cannot be repaired in the process: message, values, abort.
// Included by .cc files of the CUDA backend only.
#pragma once

#include <cuda_runtime_api.h>

#include "kernels/core/check.h"

#define CUDA_CHECK(call)                                                               \
  if (const cudaError_t baleen_cuda = (call); baleen_cuda == cudaSuccess) [[likely]] { \
  } else /* NOLINT */                                                                  \
    ::baleen::check_internal::Failure(__FILE__, __LINE__, #call).stream()              \
        << "(" << cudaGetErrorName(baleen_cuda) << ": " << cudaGetErrorString(baleen_cuda) << ") "
