// Internal: the kernel behind hadamard.h; rows of `element`, arithmetic in fp32,
// one rounding.
#pragma once

#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

// The longest row of the transform.
inline constexpr int64_t kHadamardCudaMaxDim = 8192;

// y = H x / sqrt(dim) for each of `rows` rows of dim (a power of two) elements.
void HadamardCuda(CudaElement element, int64_t rows, int64_t dim, const void* x, void* y,
                  void* stream);

}  // namespace baleen
