#include "tests/support/gradient_check.h"

#include <algorithm>
#include <cmath>

namespace baleen::testing {

double GradientError(const std::function<double()>& loss, const Tensor& input,
                     const Tensor& analytic, GradientCheckOptions options) {
  CHECK_EQ(input.num_elements(), analytic.num_elements());
  double* x = input.data<double>();
  const double* gradient = analytic.data<double>();
  const int64_t stride = std::max<int64_t>(1, input.num_elements() / options.max_elements);
  double worst = 0, largest = 1;
  for (int64_t i = 0; i < input.num_elements(); i += stride) {
    const double saved = x[i];
    x[i] = saved + options.step;
    const double above = loss();
    x[i] = saved - options.step;
    const double below = loss();
    x[i] = saved;
    const double numeric = (above - below) / (2 * options.step);
    largest = std::max(largest, std::fabs(numeric));
    const double difference = std::fabs(gradient[i] - numeric);
    worst = std::isnan(difference) ? INFINITY : std::max(worst, difference);
  }
  return worst / largest;
}

}  // namespace baleen::testing
