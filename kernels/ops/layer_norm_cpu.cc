// LayerNorm on the CPU: sums over a row and over rows in fp64, everything else in T. The variance
// is of the deviations from the mean as stored (two passes), so that a large mean costs no bits.
#include "kernels/ops/layer_norm_cpu.h"

#include <cmath>
#include <vector>

#include "kernels/ops/row_sums_cpu.h"

namespace baleen {

template <typename T>
void LayerNormCpu(int64_t rows, int64_t D, const T* __restrict x, const T* __restrict weight,
                  const T* __restrict bias, double eps, T* __restrict y, T* __restrict mean,
                  T* __restrict rstd) {
  const double inverse_D = 1 / static_cast<double>(D);
  for (int64_t row = 0; row < rows; ++row, x += D, y += D) {
    const double sum = SumInLanes(D, [&](int64_t d) { return static_cast<double>(x[d]); });
    const T center = static_cast<T>(sum * inverse_D);
    const double squares = SumInLanes(D, [&](int64_t d) {
      const double deviation = static_cast<double>(x[d]) - center;
      return deviation * deviation;
    });
    const T scale = static_cast<T>(1 / std::sqrt(squares * inverse_D + eps));
    mean[row] = center;
    rstd[row] = scale;
    for (int64_t d = 0; d < D; ++d) y[d] = (x[d] - center) * scale * weight[d] + bias[d];
  }
}

template <typename T>
void LayerNormBackwardInputCpu(int64_t rows, int64_t D, const T* __restrict dy,
                               const T* __restrict x, const T* __restrict weight,
                               const T* __restrict mean, const T* __restrict rstd,
                               T* __restrict dx) {
  const double inverse_D = 1 / static_cast<double>(D);
  for (int64_t row = 0; row < rows; ++row, dy += D, x += D, dx += D) {
    const T center = mean[row], scale = rstd[row];
    const double sum_g =
        SumInLanes(D, [&](int64_t d) { return static_cast<double>(dy[d]) * weight[d]; });
    const double sum_g_deviation = SumInLanes(D, [&](int64_t d) {
      return static_cast<double>(dy[d]) * weight[d] * (static_cast<double>(x[d]) - center);
    });
    const T mean_g = static_cast<T>(sum_g * inverse_D);
    const T mean_g_xhat = static_cast<T>(sum_g_deviation * scale * inverse_D);
    for (int64_t d = 0; d < D; ++d) {
      const T xhat = (x[d] - center) * scale;
      dx[d] = scale * (dy[d] * weight[d] - mean_g - xhat * mean_g_xhat);
    }
  }
}

template <typename T>
void LayerNormBackwardWeightCpu(int64_t rows, int64_t D, const T* __restrict dy,
                                const T* __restrict x, const T* __restrict mean,
                                const T* __restrict rstd, T* __restrict dweight,
                                T* __restrict dbias) {
  std::vector<double> sums(2 * D, 0.0);
  double* __restrict const weight_sum = sums.data();
  double* __restrict const bias_sum = sums.data() + D;
  for (int64_t row = 0; row < rows; ++row, dy += D, x += D) {
    const double center = mean[row], scale = rstd[row];
    for (int64_t d = 0; d < D; ++d) {
      weight_sum[d] += dy[d] * ((x[d] - center) * scale);
      bias_sum[d] += dy[d];
    }
  }
  for (int64_t d = 0; d < D; ++d) {
    dweight[d] += static_cast<T>(weight_sum[d]);
    dbias[d] += static_cast<T>(bias_sum[d]);
  }
}

template void LayerNormCpu(int64_t, int64_t, const float*, const float*, const float*, double,
                           float*, float*, float*);
template void LayerNormBackwardInputCpu(int64_t, int64_t, const float*, const float*, const float*,
                                        const float*, const float*, float*);
template void LayerNormBackwardWeightCpu(int64_t, int64_t, const float*, const float*, const float*,
                                         const float*, float*, float*);
template void LayerNormCpu(int64_t, int64_t, const double*, const double*, const double*, double,
                           double*, double*, double*);
template void LayerNormBackwardInputCpu(int64_t, int64_t, const double*, const double*,
                                        const double*, const double*, const double*, double*);
template void LayerNormBackwardWeightCpu(int64_t, int64_t, const double*, const double*,
                                         const double*, const double*, double*, double*);

}  // namespace baleen
