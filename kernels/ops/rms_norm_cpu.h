// Internal: the CPU definition behind rms_norm.h, for float and double. Shapes: x, y, dy, dx [rows,
// D]; weight [D].
#pragma once

#include <cstdint>

namespace baleen {

template <typename T>
void RmsNormCpu(int64_t rows, int64_t D, const T* x, const T* weight, double eps, T* y, T* rstd);
template <typename T>
void RmsNormBackwardInputCpu(int64_t rows, int64_t D, const T* dy, const T* x, const T* weight,
                             const T* rstd, T* dx);
template <typename T>
void RmsNormBackwardWeightCpu(int64_t rows, int64_t D, const T* dy, const T* x, const T* rstd,
                              T* dweight);

}  // namespace baleen
