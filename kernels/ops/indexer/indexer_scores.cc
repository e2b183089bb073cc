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

void CheckWindows(const Context& context, const char* op, const KeyWindows& windows,
                  int64_t num_rows) {
  CheckTensor(context, op, "windows.begin_T", windows.begin_T, DType::kI32, {num_rows});
  CheckTensor(context, op, "windows.end_T", windows.end_T, DType::kI32, {num_rows});
}

void CountScores(const Context& context, const char* op, int64_t I, int64_t J,
                 const KeyWindows& windows, double operand_bytes) {
  if (context.counter() == nullptr) return;
  const double pairs = CountPairs(windows);
  CountWork(context, op, 2 * static_cast<double>(I * (J + 1)) * pairs, operand_bytes + 4 * pairs);
}

Tensor Fp8ScoresOnCuda(const Context& context, const char* op, const Fp8Codes& q_TIJ,
                       const Fp8Codes& k_SJ, const Tensor& w_TI, const KeyWindows& windows) {
  const int64_t T = q_TIJ.codes.dim(0), S = k_SJ.codes.dim(0), I = q_TIJ.codes.dim(1);
  const Tensor scores_TS = context.Empty(DType::kF32, {T, S});
  const IndexerScoresFp8CudaArgs args = {.T = T,
                                         .S = S,
                                         .I = I,
                                         .q_TIJ = q_TIJ.codes.raw(),
                                         .q_scale_TI = q_TIJ.scales.data<float>(),
                                         .k_SJ = k_SJ.codes.raw(),
                                         .k_scale_S = k_SJ.scales.data<float>(),
                                         .w_TI = w_TI.data<float>(),
                                         .begin_T = windows.begin_T.data<int32_t>(),
                                         .end_T = windows.end_T.data<int32_t>(),
                                         .scores_TS = scores_TS.data<float>()};
  CheckTunedAlignment(op, {&q_TIJ.codes, &q_TIJ.scales, &k_SJ.codes, &w_TI});
  if constexpr (kHaveCuda) IndexerScoresFp8Cuda(args, context.stream());
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
  CheckWindows(context, kOp, windows, num_rows);
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return ScoresOnCuda(context, kOp, q_TIJ, k_SJ, w_TI, windows);
    NoCudaKernel(kOp);
  }
  CountScores(context, kOp, q_TIJ.dim(1), q_TIJ.dim(2), windows,
              static_cast<double>(q_TIJ.bytes() + k_SJ.bytes()));
  return ForFloatOrDouble(context, kOp, dtype, [&](auto zero) {
    return IndexerScoresCpu<decltype(zero)>(context, q_TIJ, k_SJ, w_TI, windows);
  });
}

Tensor IndexerScoresFp8(const Context& context, const Fp8Codes& q_TIJ, const Fp8Codes& k_SJ,
                        const Tensor& w_TI, const KeyWindows& windows) {
  constexpr const char* kOp = "IndexerScoresFp8";
  CheckRank(kOp, "q_TIJ.codes", q_TIJ.codes, 3);
  CheckRank(kOp, "k_SJ.codes", k_SJ.codes, 2);
  const int64_t T = q_TIJ.codes.dim(0), I = q_TIJ.codes.dim(1), J = q_TIJ.codes.dim(2);
  const int64_t S = k_SJ.codes.dim(0);
  const DType sums = StatisticsOf(w_TI.dtype());
  CheckTensor(context, kOp, "q_TIJ.codes", q_TIJ.codes, DType::kF8E4M3, {T, I, J});
  CheckTensor(context, kOp, "q_TIJ.scales", q_TIJ.scales, sums, {T, I, 1});
  CheckTensor(context, kOp, "k_SJ.codes", k_SJ.codes, DType::kF8E4M3, {S, J});
  CheckTensor(context, kOp, "k_SJ.scales", k_SJ.scales, sums, {S, 1});
  CheckTensor(context, kOp, "w_TI", w_TI, sums, {T, I});
  CheckWindows(context, kOp, windows, T);
  if (OnCuda(context)) {
    CHECK(ChooseIndexerScoresFp8(I, J) == IndexerKernel::kTuned)
        << kOp << ": the CUDA kernel takes 64 or 32 heads of width 128, not "
        << q_TIJ.codes.DebugString();
    if constexpr (kHaveCuda) return Fp8ScoresOnCuda(context, kOp, q_TIJ, k_SJ, w_TI, windows);
    NoCudaKernel(kOp);
  }
  CountScores(context, kOp, I, J, windows,
              static_cast<double>(q_TIJ.codes.bytes() + q_TIJ.scales.bytes() + k_SJ.codes.bytes() +
                                  k_SJ.scales.bytes() + w_TI.bytes()));
  // A plan's: what the kernel takes, which is nothing beside its result.
  if (context.dry() && ChooseIndexerScoresFp8(I, J) == IndexerKernel::kTuned)
    return context.Empty(sums, {T, S});
  return ForFloatOrDouble(context, kOp, sums, [&](auto zero) {
    return IndexerScoresFp8Cpu<decltype(zero)>(context, q_TIJ, k_SJ, w_TI, windows);
  });
}

bool HasFp8IndexerScores(DType dtype, int64_t num_heads, int64_t width) {
  return dtype == DType::kBF16 && ChooseIndexerScoresFp8(num_heads, width) == IndexerKernel::kTuned;
}

std::string IndexerScoresKernelName(DType dtype, int64_t num_heads, int64_t width) {
  return NameOf(ChooseIndexerScores(dtype, num_heads, width));
}

std::string IndexerScoresFp8KernelName() { return "FP8 tensor cores"; }

}  // namespace baleen
