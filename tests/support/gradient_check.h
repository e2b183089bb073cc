// Gradients against central differences in double: (f(x + h) - f(x - h)) / 2h for every (or every
// n-th) element.
#pragma once

#include <functional>

#include "kernels/core/tensor.h"

namespace baleen::testing {

struct GradientCheckOptions {
  double step = 1e-6;
  int64_t max_elements = 200;  // spread evenly over the tensor when it has more
};

// `loss` recomputes the scalar from the current contents of `input` (kF64, changed in place and
// restored). Returns the largest |analytic - numeric| / max(1, largest |numeric|).
double GradientError(const std::function<double()>& loss, const Tensor& input,
                     const Tensor& analytic, GradientCheckOptions options = {});

}  // namespace baleen::testing
