// Internal: the CPU definition behind layer_norm.h, for float and double. x, y, dy, dx [rows, D];
// weight, bias [D].
#pragma once

#include <cstdint>

namespace baleen {

template <typename T>
void LayerNormCpu(int64_t rows, int64_t D, const T* x, const T* weight, const T* bias, double eps,
                  T* y, T* mean, T* rstd);
template <typename T>
void LayerNormBackwardInputCpu(int64_t rows, int64_t D, const T* dy, const T* x, const T* weight,
                               const T* mean, const T* rstd, T* dx);
template <typename T>
void LayerNormBackwardWeightCpu(int64_t rows, int64_t D, const T* dy, const T* x, const T* mean,
                                const T* rstd, T* dweight, T* dbias);

}  // namespace baleen
