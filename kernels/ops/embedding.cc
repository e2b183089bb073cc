#include "kernels/ops/embedding.h"

#include "kernels/ops/dispatch.h"
#include "kernels/ops/embedding_cpu.h"

namespace baleen {
namespace {

constexpr char kOp[] = "embedding";

void CheckIdsAndTable(const Context& context, const Tensor& ids_T, const Tensor& table_WD) {
  CheckRank(kOp, "ids", ids_T, 1);
  CheckTensor(context, kOp, "ids", ids_T, DType::kI32, ids_T.shape());
  CheckRank(kOp, "table", table_WD, 2);
  CheckTensor(context, kOp, "table", table_WD, table_WD.dtype(), table_WD.shape());
}

}  // namespace

Tensor EmbeddingLookup(const Context& context, const Tensor& ids_T, const Tensor& table_WD,
                       int64_t vocab_begin) {
  CheckIdsAndTable(context, ids_T, table_WD);
  if (context.device().kind != DeviceKind::kCpu) NoCudaKernel(kOp);
  const int64_t W = table_WD.dim(0), D = table_WD.dim(1), tokens = ids_T.dim(0);
  const Tensor y = context.Empty(table_WD.dtype(), {tokens, D});
  CountBytes(context, kOp, 2 * y.bytes());
  ForFloatOrDouble(context, kOp, table_WD.dtype(), [&](auto element) {
    using T = decltype(element);
    EmbeddingLookupCpu(tokens, W, D, vocab_begin, ids_T.data<int32_t>(), table_WD.data<T>(),
                       y.data<T>());
  });
  return y;
}

void EmbeddingBackward(const Context& context, const Tensor& ids_T, const Tensor& dy_TD,
                       const Tensor& dtable_WD, int64_t vocab_begin) {
  CheckIdsAndTable(context, ids_T, dtable_WD);
  const int64_t W = dtable_WD.dim(0), D = dtable_WD.dim(1), tokens = ids_T.dim(0);
  CheckTensor(context, kOp, "dy", dy_TD, dtable_WD.dtype(), {tokens, D});
  if (context.device().kind != DeviceKind::kCpu) NoCudaKernel(kOp);
  CountBytes(context, kOp, 3 * dy_TD.bytes());
  ForFloatOrDouble(context, kOp, dtable_WD.dtype(), [&](auto element) {
    using T = decltype(element);
    EmbeddingBackwardCpu(tokens, W, D, vocab_begin, ids_T.data<int32_t>(), dy_TD.data<T>(),
                         dtable_WD.data<T>());
  });
}

}  // namespace baleen
