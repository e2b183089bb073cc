// libFuzzer target for config.json: any bytes are refused as a DataError, or give a model whose
// catalog is affordable and that reads back the same from the config.json we write for it.
#include <cstdint>

#include "checkpoints/hf_config.h"
#include "checkpoints/tensor_catalog.h"
#include "kernels/core/check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto config =
      baleen::ParseHfConfig({reinterpret_cast<const char*>(data), size}, "fuzz/config.json");
  if (!config.ok()) {
    CHECK(config.status().code() == absl::StatusCode::kDataLoss) << config.status();
    return 0;
  }
  CHECK_OK(config->model.Validate("fuzz"));
  CHECK_OK(baleen::CheckModelSize(config->model, "fuzz"));
  const std::string written = baleen::HfConfigText(
      {.model = config->model,
       .architecture =
           config->model.has_indexer ? baleen::HfArchitecture::kV32 : baleen::HfArchitecture::kV31,
       .fp8 = config->fp8,
       .source = &config->source});
  const auto again = baleen::ParseHfConfig(written, "written");
  CHECK_OK(again.status()) << written;
  CHECK(again->model == config->model) << written;
  CHECK(again->fp8 == config->fp8) << written;
  return 0;
}
