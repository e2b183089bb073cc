// Sums on the CPU, in fp64 and in the order of SumInLanes.
#include "kernels/ops/reduce_cpu.h"

#include "kernels/ops/row_sums_cpu.h"

namespace baleen {

template <typename T>
double SumOfSquaresCpu(int64_t count, const T* x) {
  return SumInLanes(count, [&](int64_t i) { return static_cast<double>(x[i]) * x[i]; });
}

template <typename T>
double SumCpu(int64_t count, const T* x) {
  return SumInLanes(count, [&](int64_t i) { return static_cast<double>(x[i]); });
}

template <typename T>
double DotCpu(int64_t count, const T* a, const T* b) {
  return SumInLanes(count, [&](int64_t i) { return static_cast<double>(a[i]) * b[i]; });
}

template double SumOfSquaresCpu(int64_t, const float*);
template double SumOfSquaresCpu(int64_t, const double*);
template double SumCpu(int64_t, const float*);
template double SumCpu(int64_t, const double*);
template double SumCpu(int64_t, const int32_t*);
template double DotCpu(int64_t, const float*, const float*);
template double DotCpu(int64_t, const double*, const double*);

}  // namespace baleen
