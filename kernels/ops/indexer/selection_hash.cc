// Small integer sums over selections: checks, then the device's loop.
#include "kernels/ops/indexer/selection_hash.h"

#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer/selection_hash_cpu.h"
#include "kernels/ops/indexer/selection_hash_cuda.h"

namespace baleen {

void AddSelectionHash(const Context& context, const Tensor& row_R, const Tensor& ids_RK,
                      const Tensor& result_1) {
  constexpr char kOp[] = "selection hash";
  CheckRank(kOp, "ids", ids_RK, 2);
  CheckTensor(context, kOp, "ids", ids_RK, DType::kI32, ids_RK.shape());
  CheckTensor(context, kOp, "row", row_R, DType::kI32, {ids_RK.dim(0)});
  CheckTensor(context, kOp, "result", result_1, DType::kI64, {1});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return AddSelectionHashCuda({.rows = ids_RK.dim(0),
                                   .K = ids_RK.dim(1),
                                   .row_R = row_R.data<int32_t>(),
                                   .ids_RK = ids_RK.data<int32_t>(),
                                   .result_1 = result_1.data<int64_t>()},
                                  context.stream());
    }
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, ids_RK.bytes());
  if (context.dry()) return;
  result_1.data<int64_t>()[0] +=
      SelectionHashCpu(ids_RK.dim(0), ids_RK.dim(1), row_R.data<int32_t>(), ids_RK.data<int32_t>());
}

void KeepFirstNanRow(const Context& context, const Tensor& nan_row_1, int64_t offset,
                     const Tensor& first_1) {
  constexpr char kOp[] = "first NaN row";
  CheckTensor(context, kOp, "nan_row", nan_row_1, DType::kI32, {1});
  CheckTensor(context, kOp, "first", first_1, DType::kI32, {1});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return KeepFirstNanRowCuda(nan_row_1.data<int32_t>(), offset, first_1.data<int32_t>(),
                                 context.stream());
    }
    NoCudaKernel(kOp);
  }
  if (context.dry()) return;
  const int32_t nan_row = nan_row_1.data<int32_t>()[0];
  int32_t& first = first_1.data<int32_t>()[0];
  if (nan_row >= 0 && first < 0) first = static_cast<int32_t>(offset) + nan_row;
}

void CountNanRow(const Context& context, const Tensor& nan_row_1, const Tensor& count_1) {
  constexpr char kOp[] = "count NaN row";
  CheckTensor(context, kOp, "nan_row", nan_row_1, DType::kI32, {1});
  CheckTensor(context, kOp, "count", count_1, DType::kI64, {1});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return CountNanRowCuda(nan_row_1.data<int32_t>(), count_1.data<int64_t>(), context.stream());
    }
    NoCudaKernel(kOp);
  }
  if (context.dry()) return;
  count_1.data<int64_t>()[0] += nan_row_1.data<int32_t>()[0] >= 0 ? 1 : 0;
}

}  // namespace baleen
