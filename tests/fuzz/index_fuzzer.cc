// libFuzzer target for model.safetensors.index.json: any bytes are refused as a DataError, or every
// shard is a plain file name.
#include <cstdint>

#include "checkpoints/hf_checkpoint.h"
#include "kernels/core/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto index =
      baleen::ParseIndex({reinterpret_cast<const char*>(data), size}, "fuzz.index.json");
  if (!index.ok()) {
    CHECK(index.status().code() == absl::StatusCode::kDataLoss) << index.status();
    return 0;
  }
  CHECK_GE(index->total_size, -1);
  for (const auto& [tensor, shard] : index->weight_map) {
    CHECK(!tensor.empty());
    CHECK(shard.find('/') == std::string::npos && shard[0] != '.') << shard;
    CHECK(shard.find('\0') == std::string::npos) << shard;
  }
  return 0;
}
