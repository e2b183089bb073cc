// Element types: what tensors in memory and in checkpoints are made of, and the bit formats bf16
// and E4M3.
#pragma once

#include <bit>
#include <cstdint>
#include <ostream>

#include "absl/strings/string_view.h"

namespace baleen {

enum class DType : uint8_t { kF64, kF32, kBF16, kF8E4M3, kI64, kI32, kU8 };

// Bytes of one element.
int DTypeBytes(DType dtype);

// The name safetensors uses: "F64", "F32", "BF16", "F8_E4M3", "I64", "I32", "U8".
absl::string_view DTypeName(DType dtype);

// What is summed over rows or keys is kept in fp32, whatever the operands are; fp64 stays fp64.
inline DType StatisticsOf(DType dtype) { return dtype == DType::kF64 ? DType::kF64 : DType::kF32; }

inline std::ostream& operator<<(std::ostream& out, DType dtype) {
  const absl::string_view name = DTypeName(dtype);
  return out.write(name.data(), static_cast<std::streamsize>(name.size()));
}

// bfloat16: the upper half of an fp32. Rounds to nearest, ties to even; NaN stays NaN.
struct BFloat16 {
  uint16_t bits = 0;

  static BFloat16 FromFloat(float value) {
    const uint32_t raw = std::bit_cast<uint32_t>(value);
    if ((raw & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>((raw >> 16) | 0x40u)};
    return {static_cast<uint16_t>((raw + 0x7fffu + ((raw >> 16) & 1u)) >> 16)};
  }
  float ToFloat() const { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }
};

// FP8 E4M3 in the "fn" form: 4 exponent bits (bias 7), 3 mantissa bits, no infinity, largest finite
// 448, NaN 0x7f/0xff.
struct Float8E4M3 {
  uint8_t bits = 0;

  static constexpr float kMax = 448.0f;
  // Rounds to nearest, ties to even; saturates to +-448; NaN stays NaN.
  static Float8E4M3 FromFloat(float value);
  float ToFloat() const;
};

template <typename T>
struct DTypeOf;
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kF64;
};
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kF32;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::kBF16;
};
template <>
struct DTypeOf<Float8E4M3> {
  static constexpr DType value = DType::kF8E4M3;
};
template <>
struct DTypeOf<int64_t> {
  static constexpr DType value = DType::kI64;
};
template <>
struct DTypeOf<int32_t> {
  static constexpr DType value = DType::kI32;
};
template <>
struct DTypeOf<uint8_t> {
  static constexpr DType value = DType::kU8;
};

}  // namespace baleen
