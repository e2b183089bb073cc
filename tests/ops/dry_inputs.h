// Inputs of the cases of dry_cases.h and dry_attention_cases.h.
//
// Legend: T rows (more than one block of the attention's definition), S keys, K chosen, A experts
// per token, E experts.
#pragma once

#include <functional>

#include "kernels/core/context.h"
#include "tests/support/random_tensor.h"

namespace baleen::testing {

inline constexpr int64_t kT = 70, kS = 70, kH = 2, kQ = 6, kV = 4, kK = 16, kI = 3, kJ = 8,
                         kD = 300;
inline constexpr int64_t kE = 5, kA = 3;

// Makes the inputs, and returns what calls the op on them.
using Call = std::function<std::vector<Tensor>()>;
struct OpCase {
  const char* name;
  std::function<Call(const Context&, DType)> make;
};

// The tests' bf16 tensors exist dry only: nothing computes on them.
inline Tensor In(const Context& context, DType dtype, Shape shape, uint64_t seed = 1) {
  if (dtype == DType::kBF16) return context.Zeros(dtype, std::move(shape));
  return RandomTensor(context, dtype, std::move(shape), seed);
}
inline Tensor Sums(const Context& context, DType dtype, Shape shape) {
  return In(context, dtype == DType::kF64 ? DType::kF64 : DType::kF32, std::move(shape), 9);
}
inline Tensor Ints(const Context& context, Shape shape, int32_t modulus) {
  std::vector<int32_t> values(NumElements(shape));
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<int32_t>(i % modulus);
  return IntTensorOf(context, std::move(shape), values);
}
// Row t names key 0 and its last kK - 1 keys.
inline Tensor ListedKeys(const Context& context) {
  std::vector<int32_t> ids;
  for (int64_t t = 0; t < kT; ++t) {
    const int64_t first = std::max<int64_t>(0, t + 1 - kK);
    ids.push_back(0);
    for (int64_t i = 1; i < kK; ++i) {
      ids.push_back(first + i <= t ? static_cast<int32_t>(first + i) : -1);
    }
  }
  return IntTensorOf(context, {kT, kK}, ids);
}

}  // namespace baleen::testing
