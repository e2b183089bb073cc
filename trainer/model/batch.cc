#include "trainer/model/batch.h"

#include <cstring>

#include "kernels/core/check.h"
#include "kernels/core/transfer.h"

namespace baleen {

Tensor IntTensor(const Context& context, const std::vector<int32_t>& values) {
  const Context host = context.Host();
  const Tensor tensor = host.Empty(DType::kI32, {static_cast<int64_t>(values.size())});
  std::memcpy(tensor.raw(), values.data(), values.size() * sizeof(int32_t));
  return CopyToDevice(context, tensor);
}

KeyWindows MakeKeyWindows(const Context& context, const std::vector<int32_t>& begins,
                          const std::vector<int32_t>& ends) {
  KeyWindows windows{IntTensor(context, begins), IntTensor(context, ends), {}, {}};
  if (context.device().kind == DeviceKind::kCpu) return windows;
  const Context host = Context::Cpu();
  windows.host_begin_T = IntTensor(host, begins);
  windows.host_end_T = IntTensor(host, ends);
  return windows;
}

std::vector<int32_t> ZigzagRows(int64_t num_sequences, int64_t seq_length, int rank, int size) {
  const int64_t chunk = size == 1 ? seq_length : seq_length / (2 * size);
  CHECK(size == 1 || seq_length % (2 * size) == 0) << seq_length << " over " << size;
  std::vector<int32_t> rows;
  for (int64_t sequence = 0; sequence < num_sequences; ++sequence) {
    std::vector<int64_t> chunks = {rank};
    if (size > 1) chunks.push_back(2 * size - 1 - rank);
    for (const int64_t index : chunks) {
      const int64_t begin = sequence * seq_length + index * chunk;
      for (int64_t row = begin; row < begin + chunk; ++row)
        rows.push_back(static_cast<int32_t>(row));
    }
  }
  return rows;
}

}  // namespace baleen
