// Any bytes as a run file, as a model file and as an override: an error or a configuration, never a
// crash.
//
// What loads must print and read back to the same; what does not must say so as a ConfigError that
// ends as all do.
#include <cstdint>
#include <string>

#include "absl/strings/match.h"
#include "configs/schema/run_file.h"
#include "kernels/core/check.h"

namespace {

constexpr char kRun[] =
    "run: {name: a, dir: b}\n"
    "model: {config: c}\n"
    "data: {seq_length: 64, train: [{path: d}]}\n"
    "optimizer: {lr: 1e-3}\n"
    "stages: [{name: s, attention: dense, train: all, steps: 1, global_batch_size: 1}]\n";

void CheckRun(const absl::StatusOr<baleen::LoadedRun>& loaded) {
  if (!loaded.ok()) {
    CHECK(loaded.status().code() == absl::StatusCode::kInvalidArgument) << loaded.status();
    CHECK(absl::EndsWith(loaded.status().message(), "Nothing was started.")) << loaded.status();
    return;
  }
  CHECK_OK(baleen::ValidateRunConfig(*loaded));
  const std::string printed = baleen::PrintRunConfig(*loaded);
  const auto again = baleen::ParseRunConfig("printed.yaml", printed);
  CHECK_OK(again.status()) << printed;
  CHECK(again->config == loaded->config) << printed;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string text(reinterpret_cast<const char*>(data), size);
  CheckRun(baleen::ParseRunConfig("run.yaml", text));
  CheckRun(baleen::ParseRunConfig("run.yaml", kRun, {text}));
  const auto model = baleen::ParseModelYaml("model.yaml", text);
  CHECK(model.ok() || model.status().code() == absl::StatusCode::kInvalidArgument);
  return 0;
}
