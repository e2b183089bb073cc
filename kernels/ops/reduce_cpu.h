// Internal: the CPU definition behind reduce.h, for float and double (sums: int32_t too).
#pragma once

#include <cstdint>

namespace baleen {

template <typename T>
double SumOfSquaresCpu(int64_t count, const T* x);
template <typename T>
double SumCpu(int64_t count, const T* x);
template <typename T>
double DotCpu(int64_t count, const T* a, const T* b);

}  // namespace baleen
