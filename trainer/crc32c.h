// CRC-32C (Castagnoli), as TensorBoard's record files use it.
#pragma once

#include <cstdint>

#include "absl/strings/string_view.h"

namespace baleen {

uint32_t Crc32c(absl::string_view data);  // "123456789" -> 0xe3069283

}  // namespace baleen
