// Rounds activations through E4M3 and back, as the indexer's FP8 path does: groups of
// `group` along the last dimension, amax = max(|x|max, 1e-4), s = 2^ceil(log2(amax / 448)) (UE8M0),
// y = e4m3(clamp(x / s)) * s. The backward passes gradients straight through (the rounding is not
// differentiated).
//
// On the CPU kF32 and kF64, on CUDA kF32 and kBF16; the same bits on both where the dtype is the
// same (a bf16 holds every product of an E4M3 code and a power of two).
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

Tensor SimulateFp8(const Context& context, const Tensor& x, int64_t group);

}  // namespace baleen
