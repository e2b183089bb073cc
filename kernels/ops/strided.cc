#include "kernels/ops/strided.h"

#include <algorithm>

#include "kernels/ops/dispatch.h"

namespace baleen {
namespace {

template <typename T>
T* RowPointer(const MatrixView& view, int64_t batch, int64_t row) {
  return view.tensor.data<T>() + view.offset + batch * view.batch_stride + row * view.row_stride;
}

template <typename T>
void CopyViewCpu(const MatrixView& from, const MatrixView& to) {
  for (int64_t b = 0; b < to.batch; ++b) {
    for (int64_t r = 0; r < to.rows; ++r) {
      std::copy_n(RowPointer<T>(from, from.batch == 1 ? 0 : b, r), to.cols,
                  RowPointer<T>(to, b, r));
    }
  }
}

template <typename T>
void AddBatchSumCpu(const MatrixView& from, const MatrixView& to) {
  for (int64_t b = 0; b < from.batch; ++b) {
    for (int64_t r = 0; r < to.rows; ++r) {
      const T* source = RowPointer<T>(from, b, r);
      T* target = RowPointer<T>(to, 0, r);
      for (int64_t c = 0; c < to.cols; ++c) target[c] += source[c];
    }
  }
}

void CheckSame(const Context& context, const MatrixView& from, const MatrixView& to,
               const char* op) {
  CHECK(from.rows == to.rows && from.cols == to.cols &&
        DTypesFit(context, from.dtype(), to.dtype()))
      << op << ": [" << from.rows << ", " << from.cols << "] " << from.dtype() << " to [" << to.rows
      << ", " << to.cols << "] " << to.dtype();
  CHECK(to.tensor.device().kind == DeviceKind::kCpu) << op << " has no CUDA kernel in this build";
  CHECK(context.dry() || to.dtype() == DType::kF32 || to.dtype() == DType::kF64)
      << op << " of " << to.dtype();
}

}  // namespace

void CopyView(const Context& context, const MatrixView& from, const MatrixView& to) {
  CheckSame(context, from, to, "CopyView");
  CHECK(from.batch == to.batch || from.batch == 1) << from.batch << " to " << to.batch;
  CountBytes(context, "copy view", 2 * to.batch * to.rows * to.cols * DTypeBytes(to.dtype()));
  if (context.dry()) return;
  to.dtype() == DType::kF64 ? CopyViewCpu<double>(from, to) : CopyViewCpu<float>(from, to);
}

void AddBatchSum(const Context& context, const MatrixView& from, const MatrixView& to) {
  CheckSame(context, from, to, "AddBatchSum");
  CHECK_EQ(to.batch, 1);
  CountBytes(context, "add batch sum",
             (from.batch + 2) * to.rows * to.cols * DTypeBytes(from.dtype()));
  if (context.dry()) return;
  to.dtype() == DType::kF64 ? AddBatchSumCpu<double>(from, to) : AddBatchSumCpu<float>(from, to);
}

}  // namespace baleen
