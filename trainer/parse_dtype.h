// "fp8" and "bf16" of the command line.
#pragma once

#include <string>

#include "checkpoints/hf_export.h"

namespace baleen {

inline absl::StatusOr<ExportDType> ParseExportDType(const std::string& command,
                                                    const std::string& word) {
  if (word == "fp8") return ExportDType::kFp8;
  if (word == "bf16") return ExportDType::kBF16;
  return ConfigError("baleen ", command, ": --dtype = '", word, "': expected fp8 or bf16");
}

}  // namespace baleen
