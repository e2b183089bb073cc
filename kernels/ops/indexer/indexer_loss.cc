// The indexer's loss and the selection quality: checks, then the definition for the device and the
// dtype.
#include "kernels/ops/indexer/indexer_loss.h"

#include <algorithm>

#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer/indexer_kernels.h"
#include "kernels/ops/indexer/indexer_loss_cpu.h"
#include "kernels/ops/indexer/indexer_ops_cuda.h"
#include "kernels/ops/indexer/key_sets_cpu.h"
#include "kernels/ops/strided.h"

namespace baleen {
namespace {

// q gives T, I, J and the dtype; k gives S.
void CheckIndexer(const Context& context, const char* op, const Tensor& q_TIJ, const Tensor& k_SJ,
                  const Tensor& w_TI, const Tensor& dk_SJ) {
  CheckRank(op, "q_TIJ", q_TIJ, 3);
  CheckRank(op, "k_SJ", k_SJ, 2);
  const DType dtype = q_TIJ.dtype();
  CheckTensor(context, op, "q_TIJ", q_TIJ, dtype, q_TIJ.shape());
  CheckTensor(context, op, "k_SJ", k_SJ, dtype, {k_SJ.dim(0), q_TIJ.dim(2)});
  CheckStatistics(context, op, "w_TI", w_TI, dtype, {q_TIJ.dim(0), q_TIJ.dim(1)});
  CheckStatistics(context, op, "dk_SJ", dk_SJ, dtype, k_SJ.shape());
}

void CheckDenseTarget(const Context& context, const char* op, const DenseTarget& target,
                      const KeyWindows& windows) {
  CheckRank(op, "target.q_THQ", target.q_THQ, 3);
  CheckRank(op, "target.k_SHQ", target.k_SHQ, 3);
  const DType dtype = target.q_THQ.dtype();
  const int64_t num_rows = target.q_THQ.dim(0), num_heads = target.q_THQ.dim(1);
  CheckTensor(context, op, "target.q_THQ", target.q_THQ, dtype, target.q_THQ.shape());
  CheckTensor(context, op, "target.k_SHQ", target.k_SHQ, dtype,
              {target.k_SHQ.dim(0), num_heads, target.q_THQ.dim(2)});
  CheckStatistics(context, op, "target.lse_TH", target.lse_TH, dtype, {num_rows, num_heads});
  CheckTensor(context, op, "windows.begin_T", windows.begin_T, DType::kI32, {num_rows});
  CheckTensor(context, op, "windows.end_T", windows.end_T, DType::kI32, {num_rows});
}

// bf16 runs on CUDA alone: its dry call holds what the kernels there take.
IndexerWorkspace PlannedWorkspace(const Context& context, const IndexerChunks& chunks,
                                  DType dtype) {
  if (!context.dry() || dtype != DType::kBF16) return {};
  return MakeIndexerWorkspace(context, chunks.bytes);
}

// --- On CUDA: results, workspaces and the choice of kernels.

IndexerLossResult EmptyResult(const Context& context, const Tensor& q_TIJ) {
  return {context.Empty(DType::kF32, {q_TIJ.dim(0)}), context.Empty(q_TIJ.dtype(), q_TIJ.shape()),
          context.Empty(DType::kF32, {q_TIJ.dim(0), q_TIJ.dim(1)})};
}

IndexerLossCudaArgs LossArgs(const char* op, const Tensor& q_TIJ, const Tensor& k_SJ,
                             const Tensor& w_TI, double grad_scale, const Tensor& dk_SJ,
                             const IndexerLossResult& result, const IndexerChunks& chunks,
                             const IndexerWorkspace& workspace) {
  return {.element = ElementOf(op, "q_TIJ", q_TIJ),
          .T = q_TIJ.dim(0),
          .S = k_SJ.dim(0),
          .I = q_TIJ.dim(1),
          .J = q_TIJ.dim(2),
          .q_TIJ = q_TIJ.raw(),
          .k_SJ = k_SJ.raw(),
          .w_TI = w_TI.data<float>(),
          .grad_scale = static_cast<float>(grad_scale),
          .loss_T = result.loss_T.data<float>(),
          .dq_TIJ = result.dq_TIJ.raw(),
          .dw_TI = result.dw_TI.data<float>(),
          .dk_SJ = dk_SJ.data<float>(),
          .rows_per_chunk = chunks.rows,
          .workspace = workspace.begin,
          .workspace_bytes = chunks.bytes};
}

DenseTargetCudaArgs TargetArgs(const char* op, const DenseTarget& target,
                               const KeyWindows& windows) {
  return {.element = ElementOf(op, "target.q_THQ", target.q_THQ),
          .T = target.q_THQ.dim(0),
          .S = target.k_SHQ.dim(0),
          .H = target.q_THQ.dim(1),
          .Q = target.q_THQ.dim(2),
          .q_THQ = target.q_THQ.raw(),
          .k_SHQ = target.k_SHQ.raw(),
          .lse_TH = target.lse_TH.data<float>(),
          .softmax_scale = static_cast<float>(target.softmax_scale),
          .begin_T = windows.begin_T.data<int32_t>(),
          .end_T = windows.end_T.data<int32_t>()};
}

IndexerLossResult SparseIndexerLossOnCuda(const Context& context, const Tensor& q_TIJ,
                                          const Tensor& k_SJ, const Tensor& w_TI,
                                          const Tensor& ids_TK, const Tensor& target_TK,
                                          double target_scale, double grad_scale,
                                          const Tensor& dk_SJ, const Tensor& scores_TK) {
  const DType dtype = q_TIJ.dtype();
  const int64_t I = q_TIJ.dim(1), J = q_TIJ.dim(2), K = ids_TK.dim(1);
  const IndexerLossResult result = EmptyResult(context, q_TIJ);
  const IndexerChunks chunks = PlanSparseIndexerChunks(dtype, q_TIJ.dim(0), k_SJ.dim(0), I, J, K);
  const IndexerWorkspace workspace = MakeIndexerWorkspace(context, chunks.bytes);
  const SparseIndexerLossCudaArgs args = {
      .indexer = LossArgs("SparseIndexerLoss", q_TIJ, k_SJ, w_TI, grad_scale, dk_SJ, result, chunks,
                          workspace),
      .K = K,
      .ids_TK = ids_TK.data<int32_t>(),
      .target_TK = target_TK.data<float>(),
      .scores_TK = scores_TK.empty() ? nullptr : scores_TK.data<float>(),
      .target_scale = static_cast<float>(target_scale)};
  const bool tuned = ChooseSparseIndexerLoss(dtype, I, J, K) == IndexerKernel::kTuned;
  if (tuned) CheckTunedAlignment("SparseIndexerLoss", {&q_TIJ, &k_SJ, &w_TI, &dk_SJ});
  if constexpr (kHaveCuda) {
    tuned ? SparseIndexerLossTunedCuda(args, context.stream())
          : SparseIndexerLossCuda(args, context.stream());
  }
  return result;
}

// Operands and results of the tuned dense kernels where there are fewer heads than they work on:
// heads of zeros have products of zero, which add nothing to a score and get no gradient. All empty
// where nothing is to be added.
struct PaddedHeads {
  Tensor q_TIJ, w_TI;
  IndexerLossResult result;
};

Tensor FlatRows(const Tensor& tensor) {
  const int64_t rows = tensor.dim(0);
  return tensor.Reshaped({rows, rows == 0 ? 0 : tensor.num_elements() / rows});
}

void CopyColumns(const Context& context, const Tensor& from, const Tensor& to) {
  const MatrixView source = AsMatrix(FlatRows(from)), target = AsMatrix(FlatRows(to));
  const int64_t columns = std::min(source.cols, target.cols);
  CopyView(context, source.Columns(0, columns), target.Columns(0, columns));
}

PaddedHeads PadHeads(const Context& context, const Tensor& q_TIJ, const Tensor& w_TI,
                     const DenseTarget& target) {
  const int64_t T = q_TIJ.dim(0), I = q_TIJ.dim(1), J = q_TIJ.dim(2);
  const bool needed =
      I < kTunedDenseHeads &&
      ChooseDenseIndexerLoss(q_TIJ.dtype(), I, J, target.q_THQ.dim(2)) == IndexerKernel::kTuned;
  if (!needed || (!OnCuda(context) && !context.dry())) return {};
  PaddedHeads padded;
  padded.q_TIJ = context.Zeros(q_TIJ.dtype(), {T, kTunedDenseHeads, J});
  padded.w_TI = context.Zeros(DType::kF32, {T, kTunedDenseHeads});
  CopyColumns(context, q_TIJ, padded.q_TIJ);
  CopyColumns(context, w_TI, padded.w_TI);
  padded.result = EmptyResult(context, padded.q_TIJ);
  return padded;
}

IndexerLossResult DenseIndexerLossOnCuda(const Context& context, const Tensor& q_TIJ,
                                         const Tensor& k_SJ, const Tensor& w_TI,
                                         const DenseTarget& target, const KeyWindows& windows,
                                         double grad_scale, const Tensor& dk_SJ) {
  constexpr const char* kOp = "DenseIndexerLoss";
  const DType dtype = q_TIJ.dtype();
  const int64_t I = q_TIJ.dim(1), J = q_TIJ.dim(2), Q = target.q_THQ.dim(2);
  const IndexerLossResult result = EmptyResult(context, q_TIJ);
  const PaddedHeads padded = PadHeads(context, q_TIJ, w_TI, target);
  const bool pads = !padded.q_TIJ.empty();
  const Tensor& q = pads ? padded.q_TIJ : q_TIJ;
  const Tensor& w = pads ? padded.w_TI : w_TI;
  const IndexerChunks chunks = PlanDenseIndexerChunks(dtype, q_TIJ.dim(0), k_SJ.dim(0), I, J, Q);
  const IndexerWorkspace workspace = MakeIndexerWorkspace(context, chunks.bytes);
  const IndexerLossCudaArgs args = LossArgs(kOp, q, k_SJ, w, grad_scale, dk_SJ,
                                            pads ? padded.result : result, chunks, workspace);
  const DenseTargetCudaArgs of_target = TargetArgs(kOp, target, windows);
  const bool tuned = ChooseDenseIndexerLoss(dtype, I, J, Q) == IndexerKernel::kTuned;
  if (tuned) CheckTunedAlignment(kOp, {&q, &k_SJ, &w, &dk_SJ, &target.q_THQ, &target.k_SHQ});
  if constexpr (kHaveCuda) {
    tuned ? DenseIndexerLossTunedCuda(args, of_target, context.stream())
          : DenseIndexerLossCuda(args, of_target, context.stream());
  }
  if (!pads) return result;
  CopyColumns(context, padded.result.dq_TIJ, result.dq_TIJ);
  CopyColumns(context, padded.result.dw_TI, result.dw_TI);
  return {padded.result.loss_T, result.dq_TIJ, result.dw_TI};
}

Tensor DenseTargetProbabilitiesOnCuda(const Context& context, const DenseTarget& target,
                                      const KeyWindows& windows) {
  const Tensor p_TS = context.Empty(DType::kF32, {target.q_THQ.dim(0), target.k_SHQ.dim(0)});
  DenseTargetCudaArgs args = TargetArgs("DenseTargetProbabilities", target, windows);
  args.p_TS = p_TS.data<float>();
  if constexpr (kHaveCuda) DenseTargetProbabilitiesCuda(args, context.stream());
  return p_TS;
}

SelectionQualityResult SelectionQualityOnCuda(const Context& context, const Tensor& p_TS,
                                              const Tensor& ids_TK, const KeyWindows& windows) {
  const int64_t T = p_TS.dim(0);
  const SelectionQualityResult result = {context.Empty(DType::kF32, {T}),
                                         context.Empty(DType::kF32, {T}),
                                         context.Empty(DType::kF32, {T})};
  if constexpr (kHaveCuda) {
    SelectionQualityCuda({.T = T,
                          .S = p_TS.dim(1),
                          .K = ids_TK.dim(1),
                          .p_TS = p_TS.data<float>(),
                          .ids_TK = ids_TK.data<int32_t>(),
                          .begin_T = windows.begin_T.data<int32_t>(),
                          .end_T = windows.end_T.data<int32_t>(),
                          .mass_T = result.mass_T.data<float>(),
                          .best_mass_T = result.best_mass_T.data<float>(),
                          .recall_T = result.recall_T.data<float>()},
                         context.stream());
  }
  return result;
}

}  // namespace

IndexerLossResult SparseIndexerLoss(const Context& context, const Tensor& q_TIJ, const Tensor& k_SJ,
                                    const Tensor& w_TI, const Tensor& ids_TK,
                                    const Tensor& target_TK, double target_scale, double grad_scale,
                                    const Tensor& dk_SJ, const Tensor& scores_TK) {
  constexpr const char* kOp = "SparseIndexerLoss";
  CheckIndexer(context, kOp, q_TIJ, k_SJ, w_TI, dk_SJ);
  CheckRank(kOp, "ids_TK", ids_TK, 2);
  CheckTensor(context, kOp, "ids_TK", ids_TK, DType::kI32, {q_TIJ.dim(0), ids_TK.dim(1)});
  CheckStatistics(context, kOp, "target_TK", target_TK, q_TIJ.dtype(), ids_TK.shape());
  if (!scores_TK.empty())
    CheckStatistics(context, kOp, "scores_TK", scores_TK, q_TIJ.dtype(), ids_TK.shape());
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return SparseIndexerLossOnCuda(context, q_TIJ, k_SJ, w_TI, ids_TK, target_TK, target_scale,
                                     grad_scale, dk_SJ, scores_TK);
    }
    NoCudaKernel(kOp);
  }
  // Scores, dq and dk of the listed keys.
  CountWork(context, kOp,
            6 * static_cast<double>(ids_TK.num_elements()) *
                static_cast<double>(q_TIJ.dim(1) * q_TIJ.dim(2)),
            static_cast<double>(ids_TK.num_elements()) *
                    static_cast<double>(k_SJ.dim(1) * DTypeBytes(k_SJ.dtype())) +
                2 * static_cast<double>(q_TIJ.bytes()));
  const IndexerWorkspace planned =
      PlannedWorkspace(context,
                       PlanSparseIndexerChunks(q_TIJ.dtype(), q_TIJ.dim(0), k_SJ.dim(0),
                                               q_TIJ.dim(1), q_TIJ.dim(2), ids_TK.dim(1)),
                       q_TIJ.dtype());
  return ForFloatOrDouble(context, kOp, q_TIJ.dtype(), [&](auto zero) {
    return SparseIndexerLossCpu<decltype(zero)>(context, q_TIJ, k_SJ, w_TI, ids_TK, target_TK,
                                                target_scale, grad_scale, dk_SJ, scores_TK);
  });
}

IndexerLossResult DenseIndexerLoss(const Context& context, const Tensor& q_TIJ, const Tensor& k_SJ,
                                   const Tensor& w_TI, const DenseTarget& target,
                                   const KeyWindows& windows, double grad_scale, int64_t key_tile,
                                   const Tensor& dk_SJ) {
  constexpr const char* kOp = "DenseIndexerLoss";
  CheckIndexer(context, kOp, q_TIJ, k_SJ, w_TI, dk_SJ);
  CheckDenseTarget(context, kOp, target, windows);
  CHECK(target.q_THQ.dim(0) == q_TIJ.dim(0) && target.k_SHQ.dim(0) == k_SJ.dim(0) &&
        target.q_THQ.dtype() == q_TIJ.dtype())
      << kOp << ": q_TIJ " << q_TIJ.DebugString() << " and k_SJ " << k_SJ.DebugString()
      << " against target.q_THQ " << target.q_THQ.DebugString() << " and target.k_SHQ "
      << target.k_SHQ.DebugString();
  CHECK_GE(key_tile, 1) << kOp;
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      return DenseIndexerLossOnCuda(context, q_TIJ, k_SJ, w_TI, target, windows, grad_scale, dk_SJ);
    }
    NoCudaKernel(kOp);
  }
  if (context.counter() != nullptr) {
    // Scores twice, dq and dk; and the main attention's logits once more.
    const int64_t products =
        4 * q_TIJ.dim(1) * q_TIJ.dim(2) + target.q_THQ.dim(1) * target.q_THQ.dim(2);
    CountWork(context, kOp, 2 * CountPairs(windows) * static_cast<double>(products),
              static_cast<double>(2 * q_TIJ.bytes() + target.q_THQ.bytes()));
  }
  const PaddedHeads padded = PadHeads(context, q_TIJ, w_TI, target);
  const IndexerWorkspace planned =
      PlannedWorkspace(context,
                       PlanDenseIndexerChunks(q_TIJ.dtype(), q_TIJ.dim(0), k_SJ.dim(0),
                                              q_TIJ.dim(1), q_TIJ.dim(2), target.q_THQ.dim(2)),
                       q_TIJ.dtype());
  return ForFloatOrDouble(context, kOp, q_TIJ.dtype(), [&](auto zero) {
    return DenseIndexerLossCpu<decltype(zero)>(context, q_TIJ, k_SJ, w_TI, target, windows,
                                               grad_scale, key_tile, dk_SJ);
  });
}

Tensor DenseTargetProbabilities(const Context& context, const DenseTarget& target,
                                const KeyWindows& windows) {
  constexpr const char* kOp = "DenseTargetProbabilities";
  CheckDenseTarget(context, kOp, target, windows);
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return DenseTargetProbabilitiesOnCuda(context, target, windows);
    NoCudaKernel(kOp);
  }
  return ForFloatOrDouble(context, kOp, target.q_THQ.dtype(), [&](auto zero) {
    return DenseTargetProbabilitiesCpu<decltype(zero)>(context, target, windows);
  });
}

SelectionQualityResult SelectionQuality(const Context& context, const Tensor& p_TS,
                                        const Tensor& ids_TK, const KeyWindows& windows) {
  constexpr const char* kOp = "SelectionQuality";
  CheckRank(kOp, "p_TS", p_TS, 2);
  CheckRank(kOp, "ids_TK", ids_TK, 2);
  const int64_t rows = p_TS.dim(0);
  CheckTensor(context, kOp, "p_TS", p_TS, p_TS.dtype(), p_TS.shape());
  CheckTensor(context, kOp, "ids_TK", ids_TK, DType::kI32, {rows, ids_TK.dim(1)});
  CheckTensor(context, kOp, "windows.begin_T", windows.begin_T, DType::kI32, {rows});
  CheckTensor(context, kOp, "windows.end_T", windows.end_T, DType::kI32, {rows});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) return SelectionQualityOnCuda(context, p_TS, ids_TK, windows);
    NoCudaKernel(kOp);
  }
  return ForFloatOrDouble(context, kOp, p_TS.dtype(), [&](auto zero) {
    return SelectionQualityCpu<decltype(zero)>(context, p_TS, ids_TK, windows);
  });
}

std::string SparseIndexerLossKernelName(DType dtype, int64_t num_heads, int64_t width, int64_t k) {
  return NameOf(ChooseSparseIndexerLoss(dtype, num_heads, width, k));
}

std::string DenseIndexerLossKernelName(DType dtype, int64_t num_heads, int64_t width,
                                       int64_t main_width) {
  return NameOf(ChooseDenseIndexerLoss(dtype, num_heads, width, main_width));
}

}  // namespace baleen
