// Rounds activations to E4M3, as the indexer's FP8 path does: groups of `group` along the last
// dimension, amax = max(|x|max, 1e-4), s = 2^ceil(log2(amax / 448)) (UE8M0), code = e4m3(clamp(x /
// s)), y = code * s. The backward passes gradients straight through (the rounding is not
// differentiated).
//
// On the CPU kF32 and kF64, on CUDA kF32 and kBF16; the same bits on both where the dtype is the
// same (a bf16 holds every product of an E4M3 code and a power of two).
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

// y, of x's dtype.
Tensor SimulateFp8(const Context& context, const Tensor& x, int64_t group);

// Codes and scales apart.
struct Fp8Codes {
  Tensor codes;   // kF8E4M3, like x
  Tensor scales;  // statistics of x's dtype, [.., dim(-1) / group]; powers of two
};

// Values that lie on a grid already, SimulateFp8's, come back exactly: code * s = x. (Their s may
// be half of the one they were rounded with, and the codes twice as large: where the largest was
// rounded down to 224 s.) A group with an infinity, or an element that is NaN, makes NaN of every
// product with it: its code, or the infinity's, is NaN.
Fp8Codes QuantiseFp8(const Context& context, const Tensor& x, int64_t group);

}  // namespace baleen
