// An operand twice: on the GPU in the dtype under test, and in host memory as fp64 with exactly the
// same values, for the CPU definition.
#pragma once

#include <cmath>
#include <cstring>
#include <utility>

#include "tests/cuda/gpu.h"
#include "tests/support/random_tensor.h"

namespace baleen::testing {

struct OperandPair {
  Tensor host;  // kF64
  Tensor gpu;
};

// Normal(0, 1) rounded to `dtype` (kBF16 or kF32).
inline OperandPair RandomPair(DType dtype, const Shape& shape, uint64_t seed) {
  const Context host = Context::Cpu();
  const Tensor values = RandomTensor(host, DType::kF32, shape, seed);
  const Tensor rounded = host.Empty(dtype, shape), exact = host.Empty(DType::kF64, shape);
  for (int64_t i = 0; i < values.num_elements(); ++i) {
    float value = values.data<float>()[i];
    if (dtype == DType::kBF16) {
      rounded.data<BFloat16>()[i] = BFloat16::FromFloat(value);
      value = rounded.data<BFloat16>()[i].ToFloat();
    } else {
      rounded.data<float>()[i] = value;
    }
    exact.data<double>()[i] = value;
  }
  return {exact, OnGpu(rounded)};
}

// ||error|| / ||result|| that a sum of `terms` products of operands of `dtype`, kept in `result`,
// may have. bf16 (8 bits) rounds once, by 2^-8 at most. fp32 sums of fp32 products: roundings of
// 2^-24 that do not line up. The tensor cores cut the running sum off at each 16 products instead
// of rounding, so theirs may line up: 2^-23 each.
inline double ProductTolerance(DType dtype, DType result, int64_t terms) {
  if (result == DType::kBF16) return 0x1p-8;
  const double count = static_cast<double>(terms);
  return dtype == DType::kF32 ? 0x1p-24 * (4 + std::sqrt(count)) : 0x1p-23 * (4 + count / 16);
}

inline double ErrorOf(const Tensor& gpu, const Tensor& expected) {
  return RelativeError(ToDoubles(OnHost(gpu)), ToDoubles(expected));
}

}  // namespace baleen::testing
