#include "kernels/ops/embedding.h"

#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/embedding_cpu.h"
#include "kernels/ops/embedding_cuda.h"
#include "kernels/ops/stable_sort_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "embedding";

void CheckIdsAndTable(const Context& context, const Tensor& ids_T, const Tensor& table_WD) {
  CheckRank(kOp, "ids", ids_T, 1);
  CheckTensor(context, kOp, "ids", ids_T, DType::kI32, ids_T.shape());
  CheckRank(kOp, "table", table_WD, 2);
  CheckTensor(context, kOp, "table", table_WD, table_WD.dtype(), table_WD.shape());
}

// The tokens sorted by word, then each word's rows added up by one thread per column.
void BackwardOnCuda(const Context& context, const Tensor& ids_T, const Tensor& dy_TD,
                    const Tensor& dtable_WD, int64_t vocab_begin) {
  const int64_t W = dtable_WD.dim(0), tokens = ids_T.dim(0);
  const Tensor words_T = context.Empty(DType::kI32, {tokens});
  const Tensor sorted_T = context.Empty(DType::kI32, {tokens});
  if (RanksWordsCuda(tokens, W)) {
    RankWordsCuda({.tokens = tokens,
                   .W = W,
                   .vocab_begin = vocab_begin,
                   .ids_T = ids_T.data<int32_t>(),
                   .sorted_words_T = words_T.data<int32_t>(),
                   .sorted_tokens_T = sorted_T.data<int32_t>()},
                  context.stream());
  } else {
    const Tensor workspace = context.Empty(DType::kI32, {StableSortWorkspaceInts(tokens, W)});
    StableSortCuda({.count = tokens,
                    .keys = ids_T.data<int32_t>(),
                    .first = vocab_begin,
                    .num_keys = W,
                    .workspace = workspace.data<int32_t>(),
                    .sorted_keys = words_T.data<int32_t>(),
                    .sorted_items = sorted_T.data<int32_t>()},
                   context.stream());
  }
  EmbeddingBackwardCuda({.element = ElementOf(kOp, "dy", dy_TD),
                         .tokens = tokens,
                         .W = W,
                         .D = dtable_WD.dim(1),
                         .sorted_words_T = words_T.data<int32_t>(),
                         .sorted_tokens_T = sorted_T.data<int32_t>(),
                         .dy = dy_TD.raw(),
                         .dtable = dtable_WD.data<float>()},
                        context.stream());
}

}  // namespace

Tensor EmbeddingLookup(const Context& context, const Tensor& ids_T, const Tensor& table_WD,
                       int64_t vocab_begin) {
  CheckIdsAndTable(context, ids_T, table_WD);
  const int64_t W = table_WD.dim(0), D = table_WD.dim(1), tokens = ids_T.dim(0);
  const Tensor y = context.Empty(table_WD.dtype(), {tokens, D});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      CheckCudaActivation(kOp, "table", table_WD);
      EmbeddingLookupCuda({.tokens = tokens,
                           .W = W,
                           .row_bytes = D * DTypeBytes(table_WD.dtype()),
                           .vocab_begin = vocab_begin,
                           .ids_T = ids_T.data<int32_t>(),
                           .table = table_WD.raw(),
                           .y = y.raw()},
                          context.stream());
      return y;
    }
    NoCudaKernel(kOp);
  }
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
  CheckTensor(context, kOp, "dy", dy_TD, dy_TD.dtype(), {tokens, D});
  CheckStatistics(context, kOp, "dtable", dtable_WD, dy_TD.dtype(), {W, D});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return BackwardOnCuda(context, ids_T, dy_TD, dtable_WD, vocab_begin);
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, 3 * dy_TD.bytes());
  ForFloatOrDouble(context, kOp, dtable_WD.dtype(), [&](auto element) {
    using T = decltype(element);
    EmbeddingBackwardCpu(tokens, W, D, vocab_begin, ids_T.data<int32_t>(), dy_TD.data<T>(),
                         dtable_WD.data<T>());
  });
}

}  // namespace baleen
