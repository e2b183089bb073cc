// Internal: the CPU definition behind reduce.h, for float and double.
#pragma once

#include <cstdint>

namespace baleen {

template <typename T>
double SumOfSquaresCpu(int64_t count, const T* x);
template <typename T>
double SumCpu(int64_t count, const T* x);

}  // namespace baleen
