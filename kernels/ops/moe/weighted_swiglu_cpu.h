// Internal: the CPU definition of weighted_swiglu.h, for float and double; rows of F elements.
#pragma once

#include <cstdint>

namespace baleen {

template <typename T>
void WeightedSwigluCpu(int64_t rows, int64_t F, const T* gate, const T* up, const T* weight, T* y);
template <typename T>
void WeightedSwigluBackwardCpu(int64_t rows, int64_t F, const T* dy, const T* gate, const T* up,
                               const T* weight, T* dgate, T* dup, T* dweight);

}  // namespace baleen
