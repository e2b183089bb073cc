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
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 24 & 0x80;
  uint32_t magnitude = bits & 0x7fffffffu;
  uint32_t code;
  if (magnitude > std::bit_cast<uint32_t>(INFINITY)) {
    code = 0x7f;
  } else if (magnitude >= std::bit_cast<uint32_t>(kMax)) {
    code = 0x7e;
  } else if (magnitude < std::bit_cast<uint32_t>(0x1p-6f)) {
    // Subnormal, steps of 2^-9: those that an fp32 near 2^14 has.
    const float shifted = std::bit_cast<float>(magnitude) + 0x1p14f;
    code = std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0x1p14f);
  } else {
    // Three of 23 mantissa bits stay, ties go to even; a carry moves into the exponent.
    magnitude += 0x7ffffu + (magnitude >> 20 & 1);
    code = (magnitude >> 20) - ((127 - 7) << 3);
  }
  return {static_cast<uint8_t>(sign | code)};
}

float Float8E4M3::ToFloat() const {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x80) << 24, code = bits & 0x7f;
  if (code == 0x7f) return std::nanf("");
  // The exponent field 0 means steps of 2^-9.
  const float magnitude = code < 8 ? static_cast<float>(code) * 0x1p-9f
                                   : std::bit_cast<float>((code << 20) + (uint32_t{127 - 7} << 23));
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

}  // namespace baleen
