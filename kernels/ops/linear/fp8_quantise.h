// Matrices as block FP8: E4M3 codes and fp32 scales that multiply, value = code * scale
// (DeepSeek-V3 report 3.3).
//
//   activations, gradients   a scale for 1 x 128 elements along the dimension that is summed over
//   weights                  a scale for 128 x 128 elements
//
// Scales are powers of two (UE8M0), s = 2^ceil(log2(amax / 448)), so that dividing by them is
// exact. Unlike stored weights (fp8_simulate.h) amax has no floor: the gradients of a mean over
// many tokens are far below 1e-4. Zeros have scale 1, the smallest scale is 2^-126. NaN stays NaN
// (one code); an infinity makes NaN of all that shares its scale.
//
// CPU: from kF32 and kF64. CUDA: from kBF16. The same bits from the same values.
#pragma once

#include "kernels/core/context.h"
#include "kernels/core/tensor.h"

namespace baleen {

inline constexpr int64_t kFp8Depth = 128;       // elements along the sum that share a scale
inline constexpr int64_t kFp8RowMultiple = 16;  // of rows and widths of a product

enum class Fp8Scaling : uint8_t { kRuns, kBlocks };  // 1 x 128, 128 x 128

// An operand of a product, summed over its last dimension: [batch, outer, depth].
struct Fp8Operand {
  // kF8E4M3 [batch * outer_stored, depth_stored], zeros behind the extents. kRuns: outer_stored and
  // depth_stored are multiples of 16 and 128; kBlocks: outer_stored = outer.
  Tensor codes;
  // kF32. kRuns: [depth_stored / 128, outer_stored]. kBlocks: [batch * ceil(outer / 128),
  // depth_stored / 128 rounded up to 4].
  Tensor scales;
  Fp8Scaling scaling = Fp8Scaling::kRuns;
  int64_t batch = 1, outer = 0, depth = 0;  // without padding
  DType source = DType::kF32;               // of the values

  int64_t outer_stored() const { return codes.dim(0) / batch; }
  int64_t depth_stored() const { return codes.dim(1); }
};

// x [.., K] as rows, summed over K (kRuns): outer N = all dimensions but the last.
Fp8Operand QuantiseRows(const Context& context, const Tensor& x);
// x [.., C] as its transpose, summed over rows (kRuns): outer C, depth N. For gradients of weights.
Fp8Operand QuantiseColumns(const Context& context, const Tensor& x);

// Both, from one look at x: for a gradient, which multiplies the weight and the activations.
struct Fp8RowsAndColumns {
  Fp8Operand rows, columns;
};
Fp8RowsAndColumns QuantiseRowsAndColumns(const Context& context, const Tensor& x);

enum class Fp8Side : uint8_t { kColumns, kRows };  // which dimension of W the product sums over
// W [R, C] or [L, R, C] (kBlocks): kColumns for y = W x (outer R, depth C), kRows for dx = W^T dy
// (outer C, depth R). Codes and scales of the two are the same numbers.
Fp8Operand QuantiseWeight(const Context& context, const Tensor& weight, Fp8Side summed);

// The values back, [batch, outer, depth] in `dtype` (kF32, kF64): CPU only.
Tensor Dequantise(const Context& context, const Fp8Operand& operand, DType dtype);

}  // namespace baleen
