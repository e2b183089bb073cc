#include "kernels/core/dtype.h"

#include <cmath>

#include "kernels/core/check.h"

namespace baleen {

int DTypeBytes(DType dtype) {
  switch (dtype) {
    case DType::kF64:
    case DType::kI64:
      return 8;
    case DType::kF32:
    case DType::kI32:
      return 4;
    case DType::kBF16:
      return 2;
    case DType::kF8E4M3:
    case DType::kU8:
      return 1;
  }
  CHECK(false) << "unknown dtype " << static_cast<int>(dtype);
  return 0;
}

absl::string_view DTypeName(DType dtype) {
  switch (dtype) {
    case DType::kF64:
      return "F64";
    case DType::kF32:
      return "F32";
    case DType::kBF16:
      return "BF16";
    case DType::kF8E4M3:
      return "F8_E4M3";
    case DType::kI64:
      return "I64";
    case DType::kI32:
      return "I32";
    case DType::kU8:
      return "U8";
  }
  CHECK(false) << "unknown dtype " << static_cast<int>(dtype);
  return "";
}

Float8E4M3 Float8E4M3::FromFloat(float value) {
  const uint8_t sign = std::signbit(value) ? 0x80 : 0;
  if (std::isnan(value)) return {static_cast<uint8_t>(sign | 0x7f)};
  const float magnitude = std::fabs(value);
  if (magnitude >= kMax) return {static_cast<uint8_t>(sign | 0x7e)};
  // The quantum is 2^(exponent - 3); below 2^-6 the format is subnormal with the fixed quantum
  // 2^-9.
  int exponent = magnitude > 0 ? std::ilogb(magnitude) : -9;
  if (exponent < -6) exponent = -6;
  const float quantum = std::ldexp(1.0f, exponent - 3);
  // Exact: the quotient has at most 24 bits. nearbyint rounds ties to even in the default rounding
  // mode.
  int steps = static_cast<int>(std::nearbyint(magnitude / quantum));
  if (steps == 16) {
    steps = 8;
    ++exponent;
  }
  // steps < 8 only where the value is subnormal: then the exponent field is 0.
  const int field = steps >= 8 ? ((exponent + 7) << 3) | (steps - 8) : steps;
  return {static_cast<uint8_t>(sign | field)};
}

float Float8E4M3::ToFloat() const {
  const float sign = (bits & 0x80) ? -1.0f : 1.0f;
  const int exponent = (bits >> 3) & 0xf;
  const int mantissa = bits & 0x7;
  if (exponent == 15 && mantissa == 7) return std::nanf("");
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -9);
  return sign * std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
}

}  // namespace baleen
