// Plain loops over blocks. E4M3 has 256 values, so reading is a table; writing divides by a power
// of two, which is exact, so the only rounding is that to three mantissa bits.
#include "checkpoints/fp8_blocks.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "kernels/core/check.h"

namespace baleen {
namespace {

std::array<float, 256> E4M3Values() {
  std::array<float, 256> values;
  for (int bits = 0; bits < 256; ++bits) {
    values[static_cast<size_t>(bits)] = Float8E4M3{static_cast<uint8_t>(bits)}.ToFloat();
  }
  return values;
}

template <typename T>
void Dequantise(const uint8_t* values, const float* scales, const Fp8Slice& slice, T* out) {
  static const std::array<float, 256> kValues = E4M3Values();
  CHECK_LE(slice.row + slice.num_rows, slice.rows);
  CHECK_LE(slice.col + slice.num_cols, slice.cols);
  const int64_t grid_cols = (slice.cols + kFp8Block - 1) / kFp8Block;
  for (int64_t i = 0; i < slice.num_rows; ++i) {
    const int64_t r = slice.row + i;
    const float* scale_row = scales + r / kFp8Block * grid_cols;
    for (int64_t j = 0; j < slice.num_cols; ++j) {
      const int64_t c = slice.col + j;
      const T value = kValues[values[r * slice.cols + c]];
      out[i * slice.num_cols + j] = value * static_cast<T>(scale_row[c / kFp8Block]);
    }
  }
}

template <typename T>
void Quantise(const T* weight, int64_t rows, int64_t cols, uint8_t* values, float* scales) {
  const int64_t grid_cols = (cols + kFp8Block - 1) / kFp8Block;
  for (int64_t r0 = 0; r0 < rows; r0 += kFp8Block) {
    for (int64_t c0 = 0; c0 < cols; c0 += kFp8Block) {
      const int64_t r1 = std::min(r0 + kFp8Block, rows), c1 = std::min(c0 + kFp8Block, cols);
      float amax = 0;
      for (int64_t r = r0; r < r1; ++r) {
        for (int64_t c = c0; c < c1; ++c) {
          amax = std::max(amax, std::fabs(static_cast<float>(weight[r * cols + c])));
        }
      }
      const float scale = Ue8m0Scale(amax);
      scales[r0 / kFp8Block * grid_cols + c0 / kFp8Block] = scale;
      for (int64_t r = r0; r < r1; ++r) {
        for (int64_t c = c0; c < c1; ++c) {
          // Exact but for underflow: the divisor is a power of two.
          const float scaled = static_cast<float>(weight[r * cols + c]) / scale;
          values[r * cols + c] = Float8E4M3::FromFloat(scaled).bits;
        }
      }
    }
  }
}

}  // namespace

Shape Fp8ScaleShape(const Shape& weight_shape) {
  CHECK_EQ(weight_shape.size(), size_t{2});
  return {(weight_shape[0] + kFp8Block - 1) / kFp8Block,
          (weight_shape[1] + kFp8Block - 1) / kFp8Block};
}

float Ue8m0Scale(float amax) {
  CHECK(std::isfinite(amax)) << amax;
  // amax = f 2^e with f in [0.5, 1) and 448 = 0.875 2^9: the quotient is (f / 0.875) 2^(e - 9), in
  // (2^(e - 10), 2^(e - 9)] up to f = 0.875 and just above 2^(e - 9) beyond it.
  int exponent = 0;
  const float fraction = std::frexp(std::max(amax, kFp8AmaxFloor), &exponent);
  return std::ldexp(1.0f, fraction <= 0.875f ? exponent - 9 : exponent - 8);
}

bool IsPowerOfTwo(float value) {
  int exponent = 0;  // frexp gives zero, infinity and NaN back as they are
  return std::frexp(value, &exponent) == 0.5f;
}

void DequantiseFp8(const uint8_t* values, const float* scales, const Fp8Slice& slice, float* out) {
  Dequantise(values, scales, slice, out);
}

void DequantiseFp8(const uint8_t* values, const float* scales, const Fp8Slice& slice, double* out) {
  Dequantise(values, scales, slice, out);
}

void QuantiseFp8(const float* weight, int64_t rows, int64_t cols, uint8_t* values, float* scales) {
  Quantise(weight, rows, cols, values, scales);
}

void QuantiseFp8(const double* weight, int64_t rows, int64_t cols, uint8_t* values, float* scales) {
  Quantise(weight, rows, cols, values, scales);
}

}  // namespace baleen
