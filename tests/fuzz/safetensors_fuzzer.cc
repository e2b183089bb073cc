// libFuzzer target for safetensors files: any bytes are refused as a DataError, or every byte of
// the data belongs to exactly one tensor.
//
// An odd first byte: the rest is the file. An even one: two bytes say how long the data is, the
// rest is the JSON of the header, so that the fuzzer need not learn the length word.
#include <cstdint>
#include <set>
#include <string>

#include "checkpoints/safetensors.h"
#include "kernels/core/check.h"

namespace {

std::string MakeFile(const uint8_t* data, size_t size) {
  if (data[0] % 2 == 1 || size < 3) {
    return std::string(reinterpret_cast<const char*>(data) + 1, size - 1);
  }
  const size_t data_bytes = data[1] | size_t{data[2]} << 8;
  const uint64_t json_bytes = size - 3;
  std::string file;
  for (int i = 0; i < 8; ++i) file.push_back(static_cast<char>(json_bytes >> (8 * i) & 0xff));
  file.append(reinterpret_cast<const char*>(data) + 3, size - 3);
  file.append(data_bytes, '\x3f');
  return file;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size == 0) return 0;
  const std::string file = MakeFile(data, size);
  const auto header = baleen::ParseSafetensors(
      absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(file.data()), file.size()), "fuzz");
  if (!header.ok()) {
    CHECK(header.status().code() == absl::StatusCode::kDataLoss) << header.status();
    return 0;
  }
  int64_t end = 0;
  std::set<std::string> names;
  std::vector<baleen::PlannedTensor> tensors;
  for (const baleen::SafetensorsEntry& entry : header->entries) {
    CHECK_EQ(entry.begin, end) << entry.name;
    tensors.push_back({entry.name, entry.shape, entry.dtype});
    CHECK_EQ(entry.end - entry.begin, baleen::PlannedBytes(tensors.back())) << entry.name;
    CHECK(names.insert(entry.name).second) << entry.name;
    end = entry.end;
  }
  CHECK_EQ(header->header_bytes + end, static_cast<int64_t>(file.size()));
  // Our own header for the same tensors says the same.
  std::string ours = baleen::SafetensorsHeaderText(tensors);
  ours.append(static_cast<size_t>(end), '\0');
  const auto again = baleen::ParseSafetensors(
      absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(ours.data()), ours.size()), "ours");
  CHECK_OK(again.status());
  CHECK_EQ(again->entries.size(), header->entries.size());
  return 0;
}
