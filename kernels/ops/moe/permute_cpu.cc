// Moving rows to experts and back on the CPU. Sums run in T in the order of a, so that a GPU kernel
// with one thread an element can give the same bits.
#include "kernels/ops/moe/permute_cpu.h"

#include <algorithm>

#include "kernels/ops/row_sums_cpu.h"

namespace baleen {

std::vector<int32_t> SortSlotsCpu(int64_t slots, const int32_t* expert_ids, int64_t first_expert,
                                  int64_t num_experts, int32_t* row_of_slot, int32_t* offsets) {
  const auto local = [&](int64_t slot) { return expert_ids[slot] - first_expert; };
  const auto in_range = [&](int64_t slot) { return local(slot) >= 0 && local(slot) < num_experts; };
  // Counting sort: rows per expert, where each expert begins, then slots in their order.
  std::fill_n(offsets, num_experts + 1, 0);
  for (int64_t slot = 0; slot < slots; ++slot) {
    if (in_range(slot)) ++offsets[local(slot) + 1];
  }
  for (int64_t l = 0; l < num_experts; ++l) offsets[l + 1] += offsets[l];
  std::vector<int32_t> next(offsets, offsets + num_experts);
  std::vector<int32_t> sorted(offsets[num_experts]);
  for (int64_t slot = 0; slot < slots; ++slot) {
    row_of_slot[slot] = in_range(slot) ? next[local(slot)]++ : -1;
    if (row_of_slot[slot] >= 0) sorted[row_of_slot[slot]] = static_cast<int32_t>(slot);
  }
  return sorted;
}

void GroupsOfTokensCpu(int64_t tokens, int64_t A, int64_t num_groups, int64_t group_size,
                       const int32_t* ids, int32_t* groups) {
  std::fill_n(groups, tokens * num_groups, -1);
  for (int64_t slot = 0; slot < tokens * A; ++slot) {
    if (ids[slot] < 0 || ids[slot] >= num_groups * group_size) continue;
    const int64_t group = ids[slot] / group_size;
    groups[slot / A * num_groups + group] = static_cast<int32_t>(group);
  }
}

template <typename T>
void GatherRowsBackwardCpu(int64_t tokens, int64_t A, int64_t D, const T* dy,
                           const int32_t* row_of_slot, T* dx) {
  for (int64_t t = 0; t < tokens; ++t) {
    T* __restrict const sum = dx + t * D;
    std::fill_n(sum, D, T{0});
    for (int64_t a = 0; a < A; ++a) {
      const int64_t row = row_of_slot[t * A + a];
      if (row < 0) continue;
      const T* __restrict const term = dy + row * D;
      for (int64_t d = 0; d < D; ++d) sum[d] += term[d];
    }
  }
}

template void GatherRowsBackwardCpu(int64_t, int64_t, int64_t, const float*, const int32_t*,
                                    float*);
template void GatherRowsBackwardCpu(int64_t, int64_t, int64_t, const double*, const int32_t*,
                                    double*);

}  // namespace baleen
