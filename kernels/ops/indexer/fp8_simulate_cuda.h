// Internal: the kernels behind fp8_simulate.h.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// y = E4M3 rounding of `groups` groups of `group` neighbouring elements, each with its own scale.
void SimulateFp8Cuda(CudaElement element, int64_t groups, int64_t group, const void* x, void* y,
                     void* stream);

// The codes, a byte an element, and a scale a group.
void QuantiseFp8Cuda(CudaElement element, int64_t groups, int64_t group, const void* x, void* codes,
                     float* scales, void* stream);

}  // namespace baleen
