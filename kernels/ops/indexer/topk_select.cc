// TopkSelect: checks, then the definition for the device and the dtype.
#include "kernels/ops/indexer/topk_select.h"

#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer/indexer_ops_cuda.h"
#include "kernels/ops/indexer/topk_select_cpu.h"

namespace baleen {
namespace {

TopkResult SelectOnCuda(const Context& context, const char* op, const Tensor& scores_TS,
                        const KeyWindows& windows, int64_t k, ChosenScores chosen) {
  const int64_t num_rows = scores_TS.dim(0), num_keys = scores_TS.dim(1);
  CHECK(scores_TS.dtype() == DType::kF32 && k <= kTopkSelectCudaMostChosen &&
        num_keys <= kTopkSelectCudaMostKeys)
      << op << ": the best " << k << " of " << scores_TS.DebugString() << "; on CUDA at most "
      << kTopkSelectCudaMostChosen << " of " << kTopkSelectCudaMostKeys << " fp32 scores";
  TopkResult result = {context.Empty(DType::kI32, {num_rows, k}),
                       context.Empty(DType::kI32, {num_rows}), context.Empty(DType::kI32, {1}),
                       Tensor()};
  if (chosen == ChosenScores::kKeep) result.scores_TK = context.Empty(DType::kF32, {num_rows, k});
  if constexpr (kHaveCuda) {
    TopkSelectCuda(
        {.T = num_rows,
         .S = num_keys,
         .K = k,
         .scores_TS = scores_TS.data<float>(),
         .begin_T = windows.begin_T.data<int32_t>(),
         .end_T = windows.end_T.data<int32_t>(),
         .ids_TK = result.ids_TK.data<int32_t>(),
         .ties_T = result.ties_T.data<int32_t>(),
         .chosen_scores_TK = result.scores_TK.empty() ? nullptr : result.scores_TK.data<float>(),
         .nan_row_1 = result.nan_row_1.data<int32_t>()},
        context.stream());
  }
  return result;
}

}  // namespace

TopkResult TopkSelect(const Context& context, const Tensor& scores_TS, const KeyWindows& windows,
                      int64_t k, ChosenScores chosen) {
  constexpr const char* kOp = "TopkSelect";
  CheckRank(kOp, "scores_TS", scores_TS, 2);
  CheckTensor(context, kOp, "scores_TS", scores_TS, scores_TS.dtype(), scores_TS.shape());
  CheckTensor(context, kOp, "windows.begin_T", windows.begin_T, DType::kI32, {scores_TS.dim(0)});
  CheckTensor(context, kOp, "windows.end_T", windows.end_T, DType::kI32, {scores_TS.dim(0)});
  CHECK_GE(k, 1) << kOp << ": of " << scores_TS.DebugString();
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return SelectOnCuda(context, kOp, scores_TS, windows, k, chosen);
    NoCudaKernel(kOp);
  }
  CountBytes(context, kOp, scores_TS.bytes());
  return ForFloatOrDouble(context, kOp, scores_TS.dtype(), [&](auto zero) {
    return TopkSelectCpu<decltype(zero)>(context, scores_TS, windows, k, chosen);
  });
}

std::string TopkSelectKernelName() { return "radix selection, one read of the scores"; }

}  // namespace baleen
