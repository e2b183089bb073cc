#include "kernels/ops/moe/slot_values.h"

#include "kernels/ops/dispatch.h"
#include "kernels/ops/moe/slot_values_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "slot values";

void CheckSlots(const Context& context, const char* name, const Tensor& values,
                const Tensor& row_of_slot_TA) {
  CheckRank(kOp, "row of slot", row_of_slot_TA, 2);
  CheckTensor(context, kOp, "row of slot", row_of_slot_TA, DType::kI32, row_of_slot_TA.shape());
  CHECK(values.dtype() == StatisticsOf(values.dtype()))
      << kOp << ": " << name << " is " << values.DebugString() << ", expected F32 or F64";
}

// The contents of -1 stand for no row; anything else is a row.
void CheckRowOf(int32_t row, int64_t num_rows) {
  CHECK(row >= -1 && row < num_rows) << kOp << ": row " << row << " of " << num_rows;
}

}  // namespace

Tensor RowsOfSlots(const Context& context, const Tensor& values_TA, const Tensor& row_of_slot_TA,
                   int64_t num_rows) {
  CheckSlots(context, "values", values_TA, row_of_slot_TA);
  CheckTensor(context, kOp, "values", values_TA, values_TA.dtype(), row_of_slot_TA.shape());
  const Tensor values_N = context.Empty(values_TA.dtype(), {num_rows});
  const int64_t slots = row_of_slot_TA.num_elements();
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      RowsOfSlotsCuda(slots, values_TA.data<float>(), row_of_slot_TA.data<int32_t>(),
                      values_N.data<float>(), context.stream());
      return values_N;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, values_TA.bytes() + row_of_slot_TA.bytes() + values_N.bytes());
  ForFloatOrDouble(context, kOp, values_TA.dtype(), [&](auto element) {
    using T = decltype(element);
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int32_t row = row_of_slot_TA.data<int32_t>()[slot];
      CheckRowOf(row, num_rows);
      if (row >= 0) values_N.data<T>()[row] = values_TA.data<T>()[slot];
    }
  });
  return values_N;
}

Tensor SlotsOfRows(const Context& context, const Tensor& values_N, const Tensor& row_of_slot_TA) {
  CheckSlots(context, "values", values_N, row_of_slot_TA);
  CheckRank(kOp, "values", values_N, 1);
  CheckTensor(context, kOp, "values", values_N, values_N.dtype(), values_N.shape());
  const Tensor values_TA = context.Empty(values_N.dtype(), row_of_slot_TA.shape());
  const int64_t slots = row_of_slot_TA.num_elements();
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      SlotsOfRowsCuda(slots, values_N.data<float>(), row_of_slot_TA.data<int32_t>(),
                      values_TA.data<float>(), context.stream());
      return values_TA;
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, values_N.bytes() + row_of_slot_TA.bytes() + values_TA.bytes());
  ForFloatOrDouble(context, kOp, values_N.dtype(), [&](auto element) {
    using T = decltype(element);
    for (int64_t slot = 0; slot < slots; ++slot) {
      const int32_t row = row_of_slot_TA.data<int32_t>()[slot];
      CheckRowOf(row, values_N.dim(0));
      values_TA.data<T>()[slot] = row < 0 ? T{0} : values_N.data<T>()[row];
    }
  });
  return values_TA;
}

}  // namespace baleen
