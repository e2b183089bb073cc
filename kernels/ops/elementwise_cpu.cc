// CPU definitions of the elementwise operations.
#include "kernels/ops/elementwise_cpu.h"

#include <cstring>
#include <type_traits>

#include "kernels/core/dtype.h"

namespace baleen {

// a and sum may be the same array, but for each element only: the loop still vectorises after a
// run-time check.
template <typename T>
void AddCpu(int64_t count, const T* a, const T* b, T* sum) {
  for (int64_t i = 0; i < count; ++i) sum[i] = a[i] + b[i];
}

template <typename T>
void ScaleCpu(int64_t count, T factor, T* a) {
  for (int64_t i = 0; i < count; ++i) a[i] *= factor;
}

template <typename From, typename To>
void CastCpu(int64_t count, const From* __restrict from, To* __restrict to) {
  for (int64_t i = 0; i < count; ++i) {
    if constexpr (std::is_same_v<From, To>) {
      to[i] = from[i];
    } else if constexpr (std::is_same_v<From, BFloat16>) {
      to[i] = from[i].ToFloat();
    } else if constexpr (std::is_same_v<To, BFloat16>) {
      to[i] = BFloat16::FromFloat(static_cast<float>(from[i]));  // fp64 is rounded to fp32 first
    } else {
      to[i] = static_cast<To>(from[i]);
    }
  }
}

void CopyRowsCpu(int64_t rows, int64_t row_bytes, const void* source, int64_t source_stride_bytes,
                 void* target, int64_t target_stride_bytes) {
  if (row_bytes == 0) return;
  for (int64_t r = 0; r < rows; ++r) {
    std::memcpy(static_cast<char*>(target) + r * target_stride_bytes,
                static_cast<const char*>(source) + r * source_stride_bytes,
                static_cast<size_t>(row_bytes));
  }
}

template void AddCpu(int64_t, const float*, const float*, float*);
template void AddCpu(int64_t, const double*, const double*, double*);
template void ScaleCpu(int64_t, float, float*);
template void ScaleCpu(int64_t, double, double*);
template void CastCpu(int64_t, const float*, float*);
template void CastCpu(int64_t, const float*, double*);
template void CastCpu(int64_t, const float*, BFloat16*);
template void CastCpu(int64_t, const double*, float*);
template void CastCpu(int64_t, const double*, double*);
template void CastCpu(int64_t, const double*, BFloat16*);
template void CastCpu(int64_t, const BFloat16*, float*);
template void CastCpu(int64_t, const BFloat16*, double*);
template void CastCpu(int64_t, const BFloat16*, BFloat16*);

}  // namespace baleen
