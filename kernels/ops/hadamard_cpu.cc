// Fast Walsh-Hadamard transform: H_2D = [[H_D, H_D], [H_D, -H_D]], so log2(D) rounds of sums and
// differences of elements 1, 2, 4, .. apart; the factor 1 / sqrt(D) at the end makes it orthogonal.
#include "kernels/ops/hadamard_cpu.h"

#include <algorithm>
#include <cmath>

namespace baleen {

template <typename T>
Tensor HadamardTransformCpu(const Context& context, const Tensor& x) {
  const int64_t dim = x.dim(-1);
  Tensor y = context.Empty(x.dtype(), x.shape());
  if (context.dry()) return y;
  std::copy_n(x.data<T>(), x.num_elements(), y.data<T>());
  const T factor = static_cast<T>(1 / std::sqrt(static_cast<double>(dim)));
  for (T* row = y.data<T>(); row < y.data<T>() + y.num_elements(); row += dim) {
    for (int64_t half = 1; half < dim; half *= 2) {
      for (int64_t begin = 0; begin < dim; begin += 2 * half) {
        for (int64_t i = begin; i < begin + half; ++i) {
          const T a = row[i], b = row[i + half];
          row[i] = a + b;
          row[i + half] = a - b;
        }
      }
    }
    for (int64_t i = 0; i < dim; ++i) row[i] *= factor;
  }
  return y;
}

template Tensor HadamardTransformCpu<float>(const Context&, const Tensor&);
template Tensor HadamardTransformCpu<double>(const Context&, const Tensor&);

}  // namespace baleen
