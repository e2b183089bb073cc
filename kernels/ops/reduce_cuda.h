// Internal: the kernels behind reduce.h. Sums in fp64, in an order that depends on the count alone.
#pragma once

#include <cstdint>

namespace baleen {

enum class ReduceElement : unsigned char { kF32, kBF16, kF64, kI32 };
enum class ReduceTerm : unsigned char { kValue, kSquare, kProduct };  // x, x^2, x * y

// Doubles that a sum over `count` elements needs between its two passes.
int64_t ReduceWorkspaceDoubles(int64_t count);

struct ReduceCudaArgs {
  ReduceElement element = ReduceElement::kF32;
  ReduceTerm term = ReduceTerm::kValue;
  int64_t count = 0;
  const void* x = nullptr;
  const void* y = nullptr;  // kProduct only
  double factor = 1;
  double* workspace = nullptr;
  double* result = nullptr;  // [1]: += factor * sum
};
void ReduceCuda(const ReduceCudaArgs& args, void* stream);

// result += value.
void AddConstantCuda(double value, double* result, void* stream);

}  // namespace baleen
