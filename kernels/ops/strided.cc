#include "kernels/ops/strided.h"

#include <algorithm>

#include "kernels/ops/bounds.h"
#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/strided_cuda.h"

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
  CHECK(from.rows == to.rows && from.cols == to.cols && from.dtype() == to.dtype())
      << op << ": [" << from.rows << ", " << from.cols << "] " << from.dtype() << " to [" << to.rows
      << ", " << to.cols << "] " << to.dtype();
  CHECK(from.tensor.device() == context.device() && to.tensor.device() == context.device())
      << op << ": from " << from.tensor.DebugString() << " to " << to.tensor.DebugString()
      << ", one of them on another device";
  CheckViewInside(op, "from", from);
  CheckViewInside(op, "to", to);
  if (OnCuda(context)) return CheckCudaActivation(op, "to", to.tensor);
  CHECK(context.dry() || to.dtype() == DType::kF32 || to.dtype() == DType::kF64)
      << op << " of " << to.dtype();
}

char* Begin(const MatrixView& view) {
  return static_cast<char*>(view.tensor.raw()) + view.offset * DTypeBytes(view.dtype());
}

void CopyViewOnCuda(const Context& context, const MatrixView& from, const MatrixView& to) {
  const int64_t element_bytes = DTypeBytes(to.dtype());
  CopyViewCuda({.from = Begin(from),
                .to = Begin(to),
                .batch = to.batch,
                .rows = to.rows,
                .row_bytes = to.cols * element_bytes,
                .from_batch_bytes = from.batch == 1 ? 0 : from.batch_stride * element_bytes,
                .from_row_bytes = from.row_stride * element_bytes,
                .to_batch_bytes = to.batch_stride * element_bytes,
                .to_row_bytes = to.row_stride * element_bytes},
               context.stream());
}

void AddBatchSumOnCuda(const Context& context, const MatrixView& from, const MatrixView& to) {
  AddBatchSumCuda({.element = ElementOf("AddBatchSum", "to", to.tensor),
                   .from = Begin(from),
                   .to = Begin(to),
                   .batch = from.batch,
                   .rows = to.rows,
                   .cols = to.cols,
                   .from_batch_stride = from.batch_stride,
                   .from_row_stride = from.row_stride,
                   .to_row_stride = to.row_stride},
                  context.stream());
}

}  // namespace

void CopyView(const Context& context, const MatrixView& from, const MatrixView& to) {
  CheckSame(context, from, to, "CopyView");
  CHECK(from.batch == to.batch || from.batch == 1) << from.batch << " to " << to.batch;
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return CopyViewOnCuda(context, from, to);
    NoCudaKernel("CopyView");
  }
  CountBytes(context, "copy view", 2 * to.batch * to.rows * to.cols * DTypeBytes(to.dtype()));
  if (context.dry()) return;
  to.dtype() == DType::kF64 ? CopyViewCpu<double>(from, to) : CopyViewCpu<float>(from, to);
}

void AddBatchSum(const Context& context, const MatrixView& from, const MatrixView& to) {
  CheckSame(context, from, to, "AddBatchSum");
  CHECK_EQ(to.batch, 1);
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return AddBatchSumOnCuda(context, from, to);
    NoCudaKernel("AddBatchSum");
  }
  CountBytes(context, "add batch sum",
             (from.batch + 2) * to.rows * to.cols * DTypeBytes(from.dtype()));
  if (context.dry()) return;
  to.dtype() == DType::kF64 ? AddBatchSumCpu<double>(from, to) : AddBatchSumCpu<float>(from, to);
}

}  // namespace baleen
