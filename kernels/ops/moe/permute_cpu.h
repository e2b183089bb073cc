// Internal: the CPU definition behind permute.h; sums for float and double.
#pragma once

#include <cstdint>
#include <vector>

namespace baleen {

// Sorts the slots whose expert is in range by expert, then by slot: offsets [num_experts + 1],
// row_of_slot [slots]; returns the sorted slots.
std::vector<int32_t> SortSlotsCpu(int64_t slots, const int32_t* expert_ids, int64_t first_expert,
                                  int64_t num_experts, int32_t* row_of_slot, int32_t* offsets);

// groups [tokens, num_groups] of permute.h.
void GroupsOfTokensCpu(int64_t tokens, int64_t A, int64_t num_groups, int64_t group_size,
                       const int32_t* ids, int32_t* groups);

// A slots a token, rows of D; row_of_slot [tokens, A].
template <typename T>
void GatherRowsBackwardCpu(int64_t tokens, int64_t A, int64_t D, const T* dy,
                           const int32_t* row_of_slot, T* dx);

}  // namespace baleen
