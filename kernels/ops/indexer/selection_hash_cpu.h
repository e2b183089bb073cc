// Internal: the CPU definition behind selection_hash.h.
#pragma once

#include <cstdint>

namespace baleen {

// The sum over rows of h(r).
int64_t SelectionHashCpu(int64_t rows, int64_t K, const int32_t* row, const int32_t* ids);

}  // namespace baleen
