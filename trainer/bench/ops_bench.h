// baleen bench ops: each op's call, timed alone.
//
// A figure is the median of several calls, on GPUs by CUDA events with every launch and gap of the
// call in it, the L2 emptied before each; on the CPU by the wall clock, of the definitions. The
// ceilings (products of 8192^3, a copy of 1 GiB) are measured by the same process, ops and method;
// a product's ceiling once more beside it, a call of one after each call of the other, since clocks
// follow the power that was drawn before.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "trainer/bench/op_case.h"
#include "trainer/bench/op_goals.h"
#include "trainer/bench/timeline.h"

namespace baleen {

struct OpCeilings {
  double matmul_flops = 0;      // in the dtype of activations
  double fp8_flops = 0;         // block FP8 of ready operands; 0: not for this dtype
  double bytes_per_second = 0;  // read and written, of a copy
};

struct OpsOptions {
  int64_t steps = 10;        // calls that are timed; fewer of those that take long
  bool trace = true;         // on GPUs: which kernels a call launches
  int64_t memory_bytes = 0;  // that a call may hold with its tensors
};

struct OpResult {
  OpCase op;  // without `make`
  std::optional<OpGoal> goal;
  int64_t needed_bytes = 0;  // tensors and what the call holds meanwhile
  bool fits = true;          // else nothing below is measured
  std::vector<double> seconds;
  double median = 0, low = 0, high = 0;
  double flops = 0, bytes = 0;
  double product_flops = 0;       // a second, of the product of 8192^3 that took turns with it
  std::vector<WorkTime> kernels;  // of one call, the longest first

  double FlopsPerSecond() const { return median > 0 ? flops / median : 0; }
  double BytesPerSecond() const { return median > 0 ? bytes / median : 0; }
  double MicrosecondsRow() const { return median * 1e6 / static_cast<double>(op.rows); }
  // Of the ceiling that bounds the op; of a product, of the one that took turns with it.
  double Share(const OpCeilings& ceilings) const;
  // In the goal's unit.
  double Figure(const OpCeilings& ceilings) const;
};

OpCeilings MeasureCeilings(OpInputs& inputs);

// What a call of this process may hold: the GPU's or the host's memory, less what others hold.
int64_t UsableMemory(const Context& context);

// The bytes that the call and its operands take, by a dry run of them.
int64_t NeededBytes(const OpCase& op, DType dtype);

// One after the other; the tensors of one are gone before the next. `on_result` sees each as it is
// measured; `no_trace` says why there are no kernels.
std::vector<OpResult> BenchOps(OpInputs& inputs, const OpSizes& sizes,
                               const std::vector<OpCase>& cases, const OpsOptions& options,
                               const std::function<void(const OpResult&)>& on_result,
                               std::string& no_trace);

}  // namespace baleen
