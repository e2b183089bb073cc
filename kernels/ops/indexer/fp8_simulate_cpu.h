// The CPU definitions behind fp8_simulate.h, for float and double. fp8_simulate.cc has checked the
// arguments.
#pragma once

#include "kernels/ops/indexer/fp8_simulate.h"

namespace baleen {

template <typename T>
Tensor SimulateFp8Cpu(const Context& context, const Tensor& x, int64_t group);

template <typename T>
void QuantiseFp8Cpu(const Tensor& x, int64_t group, const Fp8Codes& result);

}  // namespace baleen
