// FP8 blocks: W[r, c] = E4M3(values[r, c]) * scale_inv[r / 128, c / 128]; the scale multiplies,
// whatever its name says.
//
// Edge blocks are partial. Quantising rounds the scale up to a power of two first (UE8M0) and
// divides by that, so |value / scale| <= 448 and dequantising is exact. Scales read from files may
// be any finite non-negative number.
#pragma once

#include <cstdint>

#include "kernels/core/dtype.h"
#include "kernels/core/tensor.h"

namespace baleen {

inline constexpr int64_t kFp8Block = 128;
// Blocks whose largest value is below this are scaled as if it were this; it defines the scale of a
// zero block.
inline constexpr float kFp8AmaxFloor = 1e-4f;

// [ceil(rows / 128), ceil(cols / 128)] of a weight's shape (rank 2).
Shape Fp8ScaleShape(const Shape& weight_shape);

// The smallest power of two s with max(amax, floor) / s <= 448.
float Ue8m0Scale(float amax);
bool IsPowerOfTwo(float value);

// A rectangle of a [rows, cols] weight.
struct Fp8Slice {
  int64_t rows, cols;  // of the whole weight
  int64_t row, col;    // first element of the rectangle
  int64_t num_rows, num_cols;
};

// `values` and `scales` are those of the whole weight; `out` receives the rectangle, row-major and
// dense.
void DequantiseFp8(const uint8_t* values, const float* scales, const Fp8Slice& slice, float* out);
void DequantiseFp8(const uint8_t* values, const float* scales, const Fp8Slice& slice, double* out);

// Quantises a whole [rows, cols] weight; `scales` has Fp8ScaleShape. The values must be finite.
void QuantiseFp8(const float* weight, int64_t rows, int64_t cols, uint8_t* values, float* scales);
void QuantiseFp8(const double* weight, int64_t rows, int64_t cols, uint8_t* values, float* scales);

}  // namespace baleen
