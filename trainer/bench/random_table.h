// Random numbers made once on the host and laid over tensors of any size on the device, so that two
// billion take no time. What a kernel costs depends on its operands being random, not on their
// being independent from one another.
#pragma once

#include <functional>

#include "kernels/core/context.h"

namespace baleen {

class RandomTable {
 public:
  // A prime, so that rows of matrices fall on different places of the table.
  static constexpr int64_t kElements = 4194301;

  RandomTable() = default;
  // Element i is value(i), in `dtype` and in the dtype of its statistics.
  RandomTable(const Context& context, DType dtype, const std::function<double(int64_t)>& value,
              int64_t elements = kElements);

  // Element i of the flat tensor `to`, of either dtype, becomes element (first + i) mod n of the
  // table.
  void Lay(const Context& context, int64_t first, const Tensor& to) const;

 private:
  Tensor working_, statistics_;
};

// Element i of a table: normal(0, scale) from the seed.
std::function<double(int64_t)> NormalValues(int64_t seed, double scale);

}  // namespace baleen
