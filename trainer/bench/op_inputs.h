// Operands of the ops that baleen bench times: random, made on the device; in a dry context without
// contents.
#pragma once

#include <vector>

#include "kernels/core/context.h"
#include "kernels/ops/attention/attention.h"
#include "trainer/bench/bench_ids.h"
#include "trainer/bench/random_table.h"

namespace baleen {

class OpInputs {
 public:
  // `context` outlives what is made.
  OpInputs(Context& context, DType dtype, int64_t seed);

  Context& context() const { return context_; }
  DType dtype() const { return dtype_; }

  // Normal(0, 1) values of the dtype; the same in the dtype of its statistics.
  Tensor Normal(const Shape& shape);
  Tensor NormalStatistics(const Shape& shape);
  // Of weights with fan_in inputs: normal(0, 1 / sqrt(fan_in)).
  Tensor Weight(const Shape& shape, int64_t fan_in);
  // Statistics in [0.5, 1.5] x mean.
  Tensor Positive(const Shape& shape, double mean);
  Tensor ZeroStatistics(const Shape& shape);

  // The last `rows` of a sequence of `keys` tokens: causal, or each row sees all keys.
  KeyWindows Windows(int64_t rows, int64_t keys, bool causal) const;
  // [rows, topk] of the same rows.
  Tensor Ids(BenchIds kind, int64_t rows, int64_t keys, int64_t topk, bool causal) const;
  Tensor Integers(const std::vector<int32_t>& values) const;

 private:
  Tensor Laid(const RandomTable& table, DType dtype, const Shape& shape);

  Context& context_;
  DType dtype_;
  int64_t seed_;
  int64_t next_ = 0;              // where in the table the next tensor begins
  RandomTable normal_, uniform_;  // empty in a dry context
};

}  // namespace baleen
