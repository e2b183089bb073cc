// Internal: the kernels behind selection_hash.h.
#pragma once

#include <cstdint>

namespace baleen {

struct SelectionHashCudaArgs {
  int64_t rows = 0, K = 0;
  const int32_t* row_R = nullptr;
  const int32_t* ids_RK = nullptr;
  int64_t* result_1 = nullptr;  // added to
};
void AddSelectionHashCuda(const SelectionHashCudaArgs& args, void* stream);

void KeepFirstNanRowCuda(const int32_t* nan_row_1, int64_t offset, int32_t* first_1, void* stream);
void CountNanRowCuda(const int32_t* nan_row_1, int64_t* count_1, void* stream);

}  // namespace baleen
