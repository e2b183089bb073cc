// Router replay: the discrete choices of one run, kept and given to another, so that only rounding
// differs between the two.
//
// Two layouts round differently, and a score that lies near another's may fall on its other side:
// then a row goes to another expert, or sees another key, and its gradients are another function's.
// A comparison of layouts in bf16 therefore gives one rank's choices to all: expert ids of each row
// and MoE layer, selected keys of each row and block. What would have been chosen is counted beside
// them. Rows are named by (microbatch of the step, row of the microbatch): the same row on every
// layout.
#pragma once

#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "kernels/core/context.h"
#include "trainer/model/batch.h"

namespace baleen {

class ChoiceReplay {
 public:
  enum class Mode : uint8_t {
    kRecord,   // keeps the pass's own choices
    kCompare,  // counts how many differ from the kept ones
    kReplay,   // counts too, and the pass goes on with the kept ones
  };
  enum class Kind : uint8_t { kExperts, kKeys };

  void set_mode(Mode mode) { mode_ = mode; }

  // The ids that the pass goes on with, [R, N] like `own_ids`: ascending, -1 for none. `layer`
  // names the layer. Waits for the device: this is for tests, a run has none.
  Tensor Choose(const Context& context, Kind kind, absl::string_view layer, const Batch& batch,
                const Tensor& own_ids);

  // How many choices were compared, and how many of the pass's own were not among the row's kept
  // ones. A recomputed forward counts again.
  struct Count {
    int64_t choices = 0, flipped = 0;
  };
  const Count& count(Kind kind) const { return counts_[static_cast<int>(kind)]; }
  void ResetCounts() { counts_[0] = counts_[1] = {}; }

 private:
  // Of all rows of one microbatch, [T, N]; the rows a rank does not hold are empty.
  using Rows = std::vector<std::vector<int32_t>>;

  Mode mode_ = Mode::kRecord;
  std::map<std::pair<std::string, int64_t>, Rows> kept_;  // by (kind and layer, microbatch)
  Count counts_[2];
};

}  // namespace baleen
