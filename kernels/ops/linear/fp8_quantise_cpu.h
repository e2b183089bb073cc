// The CPU definition behind fp8_quantise.h, for float and double. fp8_quantise.cc has made the
// operand and checked the arguments.
#pragma once

#include "kernels/ops/linear/fp8_quantise.h"

namespace baleen {

// How the outer dimension and the depth of an operand lie in the values: as rows and columns, or as
// columns and rows.
enum class Fp8Source : uint8_t { kAsStored, kTransposed };

template <typename T>
void Fp8QuantiseCpu(const Tensor& x, Fp8Source source, const Fp8Operand& operand);
template <typename T>
void Fp8DequantiseCpu(const Fp8Operand& operand, const Tensor& values);

}  // namespace baleen
