// How a row of dkv (576 columns) lies in the sorted buffer of the sparse attention backward: units
// of eight numbers, the way the accumulators of the matrix unit lie. Unit x has columns
// 32 (x / 4) + 2 (x % 4) + {0, 1} + 8 {0, 1, 2, 3}.
//
// As bf16 (1152 bytes): unit x is 16 bytes at 16 x.
//
// Short (896 bytes), where memory limits: the units of the first 512 columns share an exponent and
// have 12 bytes, three words a, b, c; the other 64 columns are bf16. The two units of a lane in a
// piece of 64 columns have 24 bytes, those of two pieces three times 16 (ScatterUnitPlace). Numbers
// are rounded to 1/512 of the power of two below the largest of their unit, two of eight to 1/256:
// for normal numbers an error of 1.0e-3 of their norm (bf16: 1.6e-3).
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#include "kernels/ops/attention/sparse_attention_backward_plan_cuda.h"

namespace baleen {

inline constexpr int kScatterColumns = 576;
inline constexpr int kScatterShortColumns = 512;
template <bool kShort>
inline constexpr int kScatterRowBytes = kShort ? kScatterRowBytesShort : kScatterRowBytesBf16;
static_assert(kScatterRowBytesBf16 == kScatterColumns * 2 &&
                  kScatterRowBytesShort ==
                      kScatterShortColumns / 8 * 12 + (kScatterColumns - kScatterShortColumns) * 2,
              "");

// The first column of unit x of a row as bf16.
__host__ __device__ inline int ScatterUnitColumn(int x) { return 32 * (x / 4) + 2 * (x % 4); }

// Where a lane finds its two units of a short row, 8 j + q and 8 j + q + 4 for lane 4 j + q: three
// words of the first and one of the second; the second's other two.
inline constexpr int kScatterTwoPiecesBytes = 192;
__host__ __device__ inline int ScatterUnitPlace(int lane) {
  return lane / 8 * kScatterTwoPiecesBytes + lane / 4 % 2 * 64 + lane % 4 * 16;
}
__host__ __device__ inline int ScatterUnitRest(int lane) {
  return lane / 8 * kScatterTwoPiecesBytes + 128 + lane % 4 * 16 + lane / 4 % 2 * 8;
}

__host__ __device__ inline uint32_t BitsOfFloat(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
__host__ __device__ inline float FloatOfBits(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The larger of |x| and |y|; NaN if one of them is.
__host__ __device__ inline float LargerOrNan(float x, float y) {
#ifdef __CUDA_ARCH__
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(fabsf(x)), "f"(fabsf(y)));
  return out;
#else
  return std::isnan(x) || std::isnan(y) ? NAN : std::fmax(std::fabs(x), std::fabs(y));
#endif
}

// Eight numbers in three words of 11 + 11 + 10, 11 + 11 + 10 and 11 + 11 bits + 8 of the exponent.
// Zeros stay zeros. If a number is not finite (or 2^127 and more), all eight are read as infinite.
struct ShortUnit {
  uint32_t words[3];

  __host__ __device__ explicit ShortUnit(const float (&x)[8]) {
    const float largest =
        LargerOrNan(LargerOrNan(LargerOrNan(x[0], x[1]), LargerOrNan(x[2], x[3])),
                    LargerOrNan(LargerOrNan(x[4], x[5]), LargerOrNan(x[6], x[7])));
    uint32_t exponent = BitsOfFloat(largest) >> 23;
    exponent = exponent < 16 ? 16 : exponent;                 // the scale below has one too
    const float scale = FloatOfBits((254 - exponent) << 23);  // |x| scale < 2
    // The sum's low bits are the number rounded, and half the range so that none is negative.
    const float fine = scale * 511.5f, coarse = scale * 255.5f;
    const auto field = [&](int j) { return BitsOfFloat(fmaf(x[j], fine, kOne + 1024)); };
    const auto coarse_field = [&](int j) { return BitsOfFloat(fmaf(x[j], coarse, kOne + 512)); };
    // Of the upper bits, 0x4B000000, only the first field's are left: 300 units of the last field.
    // The middle field takes them away: 724 times its range, 2048, are as many units.
    static_assert((0x4B000000u >> 22) + 724 == 1024);
    const auto middle_field = [&](int j) {
      return BitsOfFloat(fmaf(x[j], fine, kOne + 1024 + 724 * 2048));
    };
    words[0] = field(0) + (middle_field(1) << 11) + (coarse_field(2) << 22);
    words[1] = field(3) + (middle_field(4) << 11) + (coarse_field(5) << 22);
    words[2] = field(6) + (middle_field(7) << 11) + (exponent << 22);
    if (exponent >= 254) words[2] = 255u << 22;
  }

  static constexpr float kOne = 8388608;  // 2^23: one is its last bit
};

// Adds units to sums. The constants are variables so that the compiler keeps them in registers and
// takes a field out of its word in one instruction; `zero` is a zero that it does not know of.
struct ShortUnitAdder {
  uint32_t one, four_thousand;  // 2^23 and 2^12

  __host__ __device__ explicit ShortUnitAdder(uint32_t zero)
      : one(0x4B000000 + zero), four_thousand(0x45800000 + zero) {}

  // sums += the unit, in the order of its columns.
  __host__ __device__ void Add(uint32_t a, uint32_t b, uint32_t c, float2* sums) const {
    const float power = FloatOfBits(c >> 22 << 23);  // infinite for 255
    const float fine = power * (1 / 511.5f), coarse = power * (1 / 255.5f);
    constexpr float kLow = 8388608 + 1024, kMiddle = 4096 + 1024, kHigh = 8388608 + 512;
    const auto low = [&](uint32_t w) { return FloatOfBits((w & 0x7FF) | one) - kLow; };
    const auto middle = [&](uint32_t w) {
      return FloatOfBits((w & 0x3FF800) | four_thousand) - kMiddle;
    };
    const auto high = [&](uint32_t w) { return FloatOfBits((w >> 22) + one) - kHigh; };
    sums[0].x += low(a) * fine;
    sums[0].y += middle(a) * fine;
    sums[1].x += high(a) * coarse;
    sums[1].y += low(b) * fine;
    sums[2].x += middle(b) * fine;
    sums[2].y += high(b) * coarse;
    sums[3].x += low(c) * fine;
    sums[3].y += middle(c) * fine;
  }
};

}  // namespace baleen
