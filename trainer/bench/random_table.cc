#include "trainer/bench/random_table.h"

#include <algorithm>

#include "kernels/core/random.h"
#include "kernels/core/transfer.h"
#include "kernels/ops/elementwise.h"

namespace baleen {

RandomTable::RandomTable(const Context& context, DType dtype,
                         const std::function<double(int64_t)>& value, int64_t elements) {
  const Tensor host = Context::Cpu().Empty(DType::kF32, {elements});
  for (int64_t i = 0; i < elements; ++i) host.data<float>()[i] = static_cast<float>(value(i));
  statistics_ = InDtype(context, CopyToDevice(context, host), StatisticsOf(dtype));
  working_ = InDtype(context, statistics_, dtype);
}

void RandomTable::Lay(const Context& context, int64_t first, const Tensor& to) const {
  const Tensor& from = to.dtype() == working_.dtype() ? working_ : statistics_;
  const int64_t count = to.num_elements(), period = from.num_elements();
  for (int64_t done = 0; done < count;) {
    const int64_t begin = (first + done) % period;
    const int64_t size = std::min(count - done, period - begin);
    Copy(context, from.Flat(begin, size), to.Flat(done, size));
    done += size;
  }
}

std::function<double(int64_t)> NormalValues(int64_t seed, double scale) {
  const RandomStream random(static_cast<uint64_t>(seed), NameStream("bench weights"));
  return [random, scale](int64_t i) { return scale * random.Normal(static_cast<uint64_t>(i)); };
}

}  // namespace baleen
