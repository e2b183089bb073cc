// Internal: the kernels behind swiglu.h; flat arrays of `element`, arithmetic in fp32.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

void SwigluCuda(CudaElement element, int64_t count, const void* gate, const void* up, void* y,
                void* stream);
void SwigluBackwardCuda(CudaElement element, int64_t count, const void* dy, const void* gate,
                        const void* up, void* dgate, void* dup, void* stream);

}  // namespace baleen
