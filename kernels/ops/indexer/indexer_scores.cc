// IndexerScores: checks, then the definition for the device and the dtype.
#include "kernels/ops/indexer/indexer_scores.h"

#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer/indexer_kernels.h"
#include "kernels/ops/indexer/indexer_ops_cuda.h"
#include "kernels/ops/indexer/indexer_scores_cpu.h"
#include "kernels/ops/indexer/key_sets_cpu.h"

namespace baleen {
namespace {

Tensor ScoresOnCuda(const Context& context, const char* op, const Tensor& q_TIJ, const Tensor& k_SJ,
                    const Tensor& w_TI, const KeyWindows& windows) {
  const Tensor scores_TS = context.Empty(DType::kF32, {q_TIJ.dim(0), k_SJ.dim(0)});
  const IndexerScoresCudaArgs args = {.element = ElementOf(op, "q_TIJ", q_TIJ),
                                      .T = q_TIJ.dim(0),
                                      .S = k_SJ.dim(0),
                                      .I = q_TIJ.dim(1),
                                      .J = q_TIJ.dim(2),
                                      .q_TIJ = q_TIJ.raw(),
                                      .k_SJ = k_SJ.raw(),
                                      .w_TI = w_TI.data<float>(),
                                      .begin_T = windows.begin_T.data<int32_t>(),
                                      .end_T = windows.end_T.data<int32_t>(),
                                      .scores_TS = scores_TS.data<float>()};
  const bool tuned = ChooseIndexerScores(q_TIJ.dtype(), args.I, args.J) == IndexerKernel::kTuned;
  if (tuned) CheckTunedAlignment(op, {&q_TIJ, &k_SJ, &w_TI});
  if constexpr (kHaveCuda) {
    tuned ? IndexerScoresTunedCuda(args, context.stream())
          : IndexerScoresCuda(args, context.stream());
  }
  return scores_TS;
}

}  // namespace

Tensor IndexerScores(const Context& context, const Tensor& q_TIJ, const Tensor& k_SJ,
                     const Tensor& w_TI, const KeyWindows& windows) {
  constexpr const char* kOp = "IndexerScores";
  CheckRank(kOp, "q_TIJ", q_TIJ, 3);
  CheckRank(kOp, "k_SJ", k_SJ, 2);
  const DType dtype = q_TIJ.dtype();
  const int64_t num_rows = q_TIJ.dim(0);
  CheckTensor(context, kOp, "q_TIJ", q_TIJ, dtype, q_TIJ.shape());
  CheckTensor(context, kOp, "k_SJ", k_SJ, dtype, {k_SJ.dim(0), q_TIJ.dim(2)});
  // The weights carry the softmax temperature: fp32 also where q and k are narrower.
  CheckStatistics(context, kOp, "w_TI", w_TI, dtype, {num_rows, q_TIJ.dim(1)});
  CheckTensor(context, kOp, "windows.begin_T", windows.begin_T, DType::kI32, {num_rows});
  CheckTensor(context, kOp, "windows.end_T", windows.end_T, DType::kI32, {num_rows});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return ScoresOnCuda(context, kOp, q_TIJ, k_SJ, w_TI, windows);
    NoCudaKernel(kOp);
  }
  if (context.counter() != nullptr) {
    const double products = static_cast<double>(q_TIJ.dim(1) * (q_TIJ.dim(2) + 1));
    CountWork(context, kOp, 2 * products * CountPairs(windows),
              static_cast<double>(q_TIJ.bytes() + k_SJ.bytes()) + 4 * CountPairs(windows));
  }
  return ForFloatOrDouble(context, kOp, dtype, [&](auto zero) {
    return IndexerScoresCpu<decltype(zero)>(context, q_TIJ, k_SJ, w_TI, windows);
  });
}

std::string IndexerScoresKernelName(DType dtype, int64_t num_heads, int64_t width) {
  return NameOf(ChooseIndexerScores(dtype, num_heads, width));
}

}  // namespace baleen
