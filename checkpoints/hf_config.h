// config.json <-> ModelConfig, for model_type deepseek_v3 (V3, V3.1) and deepseek_v32 (V3.2).
//
// Read: DeepSeek's spelling (rope_scaling + rope_theta) and that of transformers 5.x
// (rope_parameters). A value that Baleen does not implement is an error that names key, found and
// expected; all faults of a file come at once. Written: DeepSeek's spelling; keys Baleen does not
// know are carried through from the source.
#pragma once

#include <string>

#include "absl/strings/string_view.h"
#include "checkpoints/json_strict.h"
#include "configs/schema/model_config.h"
#include "kernels/core/status.h"

namespace baleen {

struct HfConfig {
  ModelConfig model;
  bool fp8 = false;  // a quantization_config is there: weights may be E4M3 blocks
  JsonValue source;  // the file, key by key; an empty object where there was none
};

// `where` names the text in errors (a path).
absl::StatusOr<HfConfig> ParseHfConfig(absl::string_view text, absl::string_view where);
absl::StatusOr<HfConfig> ReadHfConfig(const std::string& path);

enum class HfArchitecture { kV31, kV32 };

struct HfConfigRequest {
  ModelConfig model;
  HfArchitecture architecture = HfArchitecture::kV32;
  bool fp8 = false;
  const JsonValue* source = nullptr;  // unknown keys and an fp8 quantization_config come from here
};
std::string HfConfigText(const HfConfigRequest& request);

}  // namespace baleen
