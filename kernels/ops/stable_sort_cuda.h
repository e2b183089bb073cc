// Internal: a stable counting sort of small keys on the device, for ops that group rows by expert
// or by word.
#pragma once

#include <cstdint>

namespace baleen {

// Sorts item i = 0 .. count - 1 by key[i], equal keys by i. A key outside
// [first, first + num_keys) counts as num_keys: last. Radix passes of up to 10 bits, so one pass
// for up to 1023 keys. Deterministic.
struct StableSortCudaArgs {
  int64_t count = 0;
  const int32_t* keys = nullptr;
  int64_t first = 0;
  int64_t num_keys = 0;
  int32_t* workspace = nullptr;  // StableSortWorkspaceInts
  // Out, [count] each: keys less `first` in sorted order, and the items they belong to.
  int32_t* sorted_keys = nullptr;
  int32_t* sorted_items = nullptr;
};
int64_t StableSortWorkspaceInts(int64_t count, int64_t num_keys);
void StableSortCuda(const StableSortCudaArgs& args, void* stream);

// What permute.h makes of sorted slots: offsets [num_keys + 1], the sorted place of each slot (-1:
// out of range), and for the first num_rows places slot / slots_per_row.
struct SortedPlacesCudaArgs {
  int64_t count = 0;
  int64_t num_keys = 0;
  int64_t slots_per_row = 1;
  int64_t num_rows = 0;
  const int32_t* sorted_keys = nullptr;
  const int32_t* sorted_items = nullptr;
  int32_t* offsets = nullptr;
  int32_t* place_of_item = nullptr;  // may be null
  int32_t* row_of_place = nullptr;   // may be null
};
void SortedPlacesCuda(const SortedPlacesCudaArgs& args, void* stream);

}  // namespace baleen
