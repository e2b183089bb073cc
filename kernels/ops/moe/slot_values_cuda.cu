// A number a slot, moved to or from its row: 12 bytes a slot, a megabyte for 8K tokens.
#include "kernels/ops/flat.cuh"
#include "kernels/ops/moe/slot_values_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

struct ToRows {
  const float* from;
  const int32_t* row_of_slot;
  float* to;
  struct Value {
    float value;
    int32_t row;
  };
  __device__ Value Load(int64_t i) const { return {from[i], row_of_slot[i]}; }
  __device__ void Store(int64_t, const Value& v) const {
    if (v.row >= 0) to[v.row] = v.value;
  }
};

struct ToSlots {
  const float* from;
  const int32_t* row_of_slot;
  float* to;
  using Value = int32_t;  // the row
  __device__ Value Load(int64_t i) const { return row_of_slot[i]; }
  __device__ void Store(int64_t i, Value row) const { to[i] = row >= 0 ? from[row] : 0.0f; }
};

template <typename Op>
void Launch(const char* name, int64_t slots, const Op& op, void* stream) {
  LaunchFlat<1, 2>(name, slots, /*aligned=*/false, op, op, stream);
}

}  // namespace

void RowsOfSlotsCuda(int64_t slots, const float* values_of_slots, const int32_t* row_of_slot,
                     float* values_of_rows, void* stream) {
  Launch("rows of slots", slots, ToRows{values_of_slots, row_of_slot, values_of_rows}, stream);
}

void SlotsOfRowsCuda(int64_t slots, const float* values_of_rows, const int32_t* row_of_slot,
                     float* values_of_slots, void* stream) {
  Launch("slots of rows", slots, ToSlots{values_of_rows, row_of_slot, values_of_slots}, stream);
}

}  // namespace baleen
