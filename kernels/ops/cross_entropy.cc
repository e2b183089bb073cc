#include "kernels/ops/cross_entropy.h"

#include <limits>
#include <type_traits>

#include "kernels/ops/bounds.h"
#include "kernels/ops/cross_entropy_cpu.h"
#include "kernels/ops/cross_entropy_cuda.h"
#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"

namespace baleen {
namespace {

constexpr char kOp[] = "cross_entropy";

// Of logits, or of statistics, of this dtype.
CrossEntropyStats EmptyStats(const Context& context, DType dtype, int64_t tokens) {
  const DType statistics = StatisticsOf(dtype);
  return {context.Empty(statistics, {tokens}), context.Empty(statistics, {tokens}),
          context.Empty(statistics, {tokens})};
}

void CheckStats(const Context& context, const CrossEntropyStats& stats, DType dtype,
                const Shape& shape) {
  CheckStatistics(context, kOp, "row_max", stats.row_max_T, dtype, shape);
  CheckStatistics(context, kOp, "row_sum", stats.row_sum_T, dtype, shape);
  CheckStatistics(context, kOp, "target_logit", stats.target_logit_T, dtype, shape);
}

// T is float or double, const for statistics that are only read.
template <typename T>
CrossEntropyRows<T> Rows(const CrossEntropyStats& stats) {
  using Element = std::remove_const_t<T>;
  return {stats.row_max_T.data<Element>(), stats.row_sum_T.data<Element>(),
          stats.target_logit_T.data<Element>()};
}

void CheckTargets(const Context& context, const Tensor& targets_T) {
  CheckIndices(context, kOp, "targets", targets_T, -1, std::numeric_limits<int32_t>::max());
}

CrossEntropyCudaRows CudaRows(const CrossEntropyStats& stats) {
  return {stats.row_max_T.data<float>(), stats.row_sum_T.data<float>(),
          stats.target_logit_T.data<float>()};
}

CrossEntropyCudaArgs CudaArgs(const Tensor& logits_TW, const Tensor& targets_T,
                              const CrossEntropyStats& stats, int64_t vocab_begin) {
  return {.element = ElementOf(kOp, "logits", logits_TW),
          .tokens = logits_TW.dim(0),
          .W = logits_TW.dim(1),
          .vocab_begin = vocab_begin,
          .logits = logits_TW.raw(),
          .targets_T = targets_T.data<int32_t>(),
          .stats = CudaRows(stats)};
}

}  // namespace

CrossEntropyStats CrossEntropyLocalStats(const Context& context, const Tensor& logits_TW,
                                         const Tensor& targets_T, int64_t vocab_begin) {
  CheckRank(kOp, "logits", logits_TW, 2);
  const int64_t tokens = logits_TW.dim(0);
  CheckTensor(context, kOp, "targets", targets_T, DType::kI32, {tokens});
  CheckTensor(context, kOp, "logits", logits_TW, logits_TW.dtype(), logits_TW.shape());
  const CrossEntropyStats stats = EmptyStats(context, logits_TW.dtype(), tokens);
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      CrossEntropyLocalStatsCuda(CudaArgs(logits_TW, targets_T, stats, vocab_begin),
                                 context.stream());
      return stats;
    }
    NoCudaKernel(kOp);
  }
  CheckTargets(context, targets_T);
  CountBytes(context, kOp, logits_TW.bytes());
  ForFloatOrDouble(context, kOp, logits_TW.dtype(), [&](auto element) {
    using T = decltype(element);
    CrossEntropyLocalStatsCpu(tokens, logits_TW.dim(1), vocab_begin, logits_TW.data<T>(),
                              targets_T.data<int32_t>(), Rows<T>(stats));
  });
  return stats;
}

CrossEntropyStats CombineCrossEntropyStats(const Context& context, const CrossEntropyStats& parts) {
  CheckRank(kOp, "row_max", parts.row_max_T, 2);
  const DType dtype = parts.row_max_T.dtype();
  CheckStats(context, parts, dtype, parts.row_max_T.shape());
  const int64_t num_parts = parts.row_max_T.dim(0), tokens = parts.row_max_T.dim(1);
  const CrossEntropyStats whole = EmptyStats(context, dtype, tokens);
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      CombineCrossEntropyStatsCuda(num_parts, tokens, CudaRows(parts), CudaRows(whole),
                                   context.stream());
      return whole;
    }
    NoCudaKernel(kOp);
  }
  ForFloatOrDouble(context, kOp, dtype, [&](auto element) {
    using T = decltype(element);
    CombineCrossEntropyStatsCpu(num_parts, tokens, Rows<const T>(parts), Rows<T>(whole));
  });
  return whole;
}

Tensor CrossEntropyLoss(const Context& context, const CrossEntropyStats& stats,
                        const Tensor& targets_T) {
  CheckRank(kOp, "targets", targets_T, 1);
  const int64_t tokens = targets_T.dim(0);
  const DType dtype = stats.row_max_T.dtype();
  CheckTensor(context, kOp, "targets", targets_T, DType::kI32, {tokens});
  CheckStats(context, stats, dtype, {tokens});
  const Tensor loss = context.Empty(dtype, {tokens});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      CrossEntropyLossCuda(tokens, CudaRows(stats), targets_T.data<int32_t>(), loss.data<float>(),
                           context.stream());
      return loss;
    }
    NoCudaKernel(kOp);
  }
  CheckTargets(context, targets_T);
  ForFloatOrDouble(context, kOp, dtype, [&](auto element) {
    using T = decltype(element);
    CrossEntropyLossCpu(tokens, Rows<const T>(stats), targets_T.data<int32_t>(), loss.data<T>());
  });
  return loss;
}

void CrossEntropyBackwardInPlace(const Context& context, const Tensor& logits_TW,
                                 const Tensor& targets_T, const CrossEntropyStats& stats,
                                 int64_t vocab_begin, double scale) {
  CheckRank(kOp, "logits", logits_TW, 2);
  const int64_t tokens = logits_TW.dim(0);
  CheckTensor(context, kOp, "targets", targets_T, DType::kI32, {tokens});
  CheckStats(context, stats, logits_TW.dtype(), {tokens});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return CrossEntropyBackwardCuda(CudaArgs(logits_TW, targets_T, stats, vocab_begin),
                                      static_cast<float>(scale), context.stream());
    }
    NoCudaKernel(kOp);
  }
  CheckTargets(context, targets_T);
  CountBytes(context, kOp, 2 * logits_TW.bytes());
  ForFloatOrDouble(context, kOp, logits_TW.dtype(), [&](auto element) {
    using T = decltype(element);
    CrossEntropyBackwardCpu(tokens, logits_TW.dim(1), vocab_begin, Rows<const T>(stats),
                            targets_T.data<int32_t>(), static_cast<T>(scale), logits_TW.data<T>());
  });
}

}  // namespace baleen
