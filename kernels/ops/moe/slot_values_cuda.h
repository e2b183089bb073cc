// Internal: the kernels behind slot_values.h; one thread a slot.
#pragma once

#include <cstdint>

namespace baleen {

void RowsOfSlotsCuda(int64_t slots, const float* values_of_slots, const int32_t* row_of_slot,
                     float* values_of_rows, void* stream);
void SlotsOfRowsCuda(int64_t slots, const float* values_of_rows, const int32_t* row_of_slot,
                     float* values_of_slots, void* stream);

}  // namespace baleen
