// RMSNorm on the CPU: sums over a row and over rows in fp64, everything else in T.
#include "kernels/ops/rms_norm_cpu.h"

#include <cmath>
#include <vector>

#include "kernels/ops/row_sums_cpu.h"

namespace baleen {

template <typename T>
void RmsNormCpu(int64_t rows, int64_t D, const T* __restrict x, const T* __restrict weight,
                double eps, T* __restrict y, T* __restrict rstd) {
  for (int64_t row = 0; row < rows; ++row, x += D, y += D) {
    const double sum = SumInLanes(D, [&](int64_t d) { return static_cast<double>(x[d]) * x[d]; });
    const T scale = static_cast<T>(1 / std::sqrt(sum / static_cast<double>(D) + eps));
    rstd[row] = scale;
    for (int64_t d = 0; d < D; ++d) y[d] = x[d] * scale * weight[d];
  }
}

template <typename T>
void RmsNormBackwardInputCpu(int64_t rows, int64_t D, const T* __restrict dy, const T* __restrict x,
                             const T* __restrict weight, const T* __restrict rstd,
                             T* __restrict dx) {
  for (int64_t row = 0; row < rows; ++row, dy += D, x += D, dx += D) {
    const double dot =
        SumInLanes(D, [&](int64_t d) { return static_cast<double>(dy[d]) * weight[d] * x[d]; });
    const T scale = rstd[row];
    const T along_x = static_cast<T>(dot / static_cast<double>(D) * scale * scale);
    for (int64_t d = 0; d < D; ++d) dx[d] = scale * (dy[d] * weight[d] - x[d] * along_x);
  }
}

template <typename T>
void RmsNormBackwardWeightCpu(int64_t rows, int64_t D, const T* __restrict dy,
                              const T* __restrict x, const T* __restrict rstd,
                              T* __restrict dweight) {
  std::vector<double> sums(D, 0.0);
  double* __restrict const sum = sums.data();
  for (int64_t row = 0; row < rows; ++row, dy += D, x += D) {
    const double scale = rstd[row];
    for (int64_t d = 0; d < D; ++d) sum[d] += static_cast<double>(dy[d]) * x[d] * scale;
  }
  for (int64_t d = 0; d < D; ++d) dweight[d] += static_cast<T>(sum[d]);
}

template void RmsNormCpu(int64_t, int64_t, const float*, const float*, double, float*, float*);
template void RmsNormBackwardInputCpu(int64_t, int64_t, const float*, const float*, const float*,
                                      const float*, float*);
template void RmsNormBackwardWeightCpu(int64_t, int64_t, const float*, const float*, const float*,
                                       float*);
template void RmsNormCpu(int64_t, int64_t, const double*, const double*, double, double*, double*);
template void RmsNormBackwardInputCpu(int64_t, int64_t, const double*, const double*, const double*,
                                      const double*, double*);
template void RmsNormBackwardWeightCpu(int64_t, int64_t, const double*, const double*,
                                       const double*, double*);

}  // namespace baleen
