#include "trainer/bench/op_inputs.h"

#include <cmath>
#include <numeric>

#include "kernels/core/random.h"
#include "kernels/ops/elementwise.h"
#include "trainer/model/batch.h"

namespace baleen {

OpInputs::OpInputs(Context& context, DType dtype, int64_t seed)
    : context_(context), dtype_(dtype), seed_(seed) {
  if (context.dry()) return;
  normal_ = RandomTable(context, dtype, NormalValues(seed, 1));
  const RandomStream random(static_cast<uint64_t>(seed), NameStream("bench op inputs"));
  uniform_ = RandomTable(context, dtype, [random](int64_t i) {
    return 0.5 + random.Uniform(static_cast<uint64_t>(i));
  });
}

Tensor OpInputs::Laid(const RandomTable& table, DType dtype, const Shape& shape) {
  const Tensor tensor = context_.Empty(dtype, shape);
  if (context_.dry()) return tensor;
  // Odd, so that tensors of a call begin at different places.
  next_ = (next_ + 1000003) % RandomTable::kElements;
  table.Lay(context_, next_, tensor.Reshaped({tensor.num_elements()}));
  return tensor;
}

Tensor OpInputs::Normal(const Shape& shape) { return Laid(normal_, dtype_, shape); }

Tensor OpInputs::NormalStatistics(const Shape& shape) {
  return Laid(normal_, StatisticsOf(dtype_), shape);
}

Tensor OpInputs::Weight(const Shape& shape, int64_t fan_in) {
  const Tensor weight = Normal(shape);
  ScaleInPlace(context_, weight, 1 / std::sqrt(static_cast<double>(fan_in)));
  return weight;
}

Tensor OpInputs::Positive(const Shape& shape, double mean) {
  const Tensor values = Laid(uniform_, StatisticsOf(dtype_), shape);
  ScaleInPlace(context_, values, mean);
  return values;
}

Tensor OpInputs::ZeroStatistics(const Shape& shape) {
  return context_.Zeros(StatisticsOf(dtype_), shape);
}

KeyWindows OpInputs::Windows(int64_t rows, int64_t keys, bool causal) const {
  const std::vector<int32_t> begin(rows, 0);
  std::vector<int32_t> end(rows, static_cast<int32_t>(keys));
  if (causal) std::iota(end.begin(), end.end(), static_cast<int32_t>(keys - rows + 1));
  return MakeKeyWindows(context_, begin, end);
}

Tensor OpInputs::Ids(BenchIds kind, int64_t rows, int64_t keys, int64_t topk, bool causal) const {
  if (context_.dry()) return context_.Empty(DType::kI32, {rows, topk});
  std::vector<int32_t> numbers(rows);
  std::iota(numbers.begin(), numbers.end(), static_cast<int32_t>(keys - rows));
  return IntTensor(context_, MakeBenchIds(kind, numbers, keys, topk, seed_, causal))
      .Reshaped({rows, topk});
}

Tensor OpInputs::Integers(const std::vector<int32_t>& values) const {
  return IntTensor(context_, values);
}

}  // namespace baleen
