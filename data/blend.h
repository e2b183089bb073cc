// Weighted blend: which source the n-th sample of a run comes from, and which sample of that source
// it is.
//
// Rule: sample n goes to the source with the greatest sampling error w_i (n + 1) - c_i(n), where
// w_i are the weights divided by their sum and c_i(n) counts the samples of source i before n; ties
// go to the first source. With w_i = W_i / W in whole numbers the errors are all zero again after W
// samples (each error stays above -1, and they add up to 0), so one period in a table answers every
// n at once: no state but n itself.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/core/status.h"

namespace baleen {

class Blend {
 public:
  // Weights are made whole by the smallest W <= 2^20 that represents them to 1e-9, else rounded to
  // 2^20 parts (at least one each). ConfigError when there is no weight, or one is not a positive
  // finite number.
  static absl::StatusOr<Blend> Create(absl::Span<const double> weights);

  struct Pick {
    int64_t source_idx = 0;
    int64_t sample = 0;  // how many samples of that source came before
  };
  Pick At(int64_t sample) const;

  int64_t num_sources() const { return static_cast<int64_t>(parts_.size()); }
  int64_t period() const { return static_cast<int64_t>(source_of_slot_.size()); }  // W
  int64_t parts(int64_t source_idx) const { return parts_[source_idx]; }           // W_i

 private:
  std::vector<int64_t> parts_;
  std::vector<uint32_t> source_of_slot_;
  std::vector<uint32_t> earlier_in_period_;  // samples of the same source earlier in the period
};

}  // namespace baleen
