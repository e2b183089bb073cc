// The indexer's loss and the selection quality: checks, then the definition for the device and the
// dtype.
#include "kernels/ops/indexer_loss.h"

#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer_loss_cpu.h"
#include "kernels/ops/key_sets_cpu.h"

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

}  // namespace

IndexerLossResult SparseIndexerLoss(const Context& context, const Tensor& q_TIJ, const Tensor& k_SJ,
                                    const Tensor& w_TI, const Tensor& ids_TK,
                                    const Tensor& target_TK, double target_scale, double grad_scale,
                                    const Tensor& dk_SJ) {
  constexpr const char* kOp = "SparseIndexerLoss";
  CheckIndexer(context, kOp, q_TIJ, k_SJ, w_TI, dk_SJ);
  CheckRank(kOp, "ids_TK", ids_TK, 2);
  CheckTensor(context, kOp, "ids_TK", ids_TK, DType::kI32, {q_TIJ.dim(0), ids_TK.dim(1)});
  CheckStatistics(context, kOp, "target_TK", target_TK, q_TIJ.dtype(), ids_TK.shape());
  if (context.device().kind == DeviceKind::kCuda) NoCudaKernel(kOp);
  // Scores, dq and dk of the listed keys.
  CountWork(context, kOp,
            6 * static_cast<double>(ids_TK.num_elements()) *
                static_cast<double>(q_TIJ.dim(1) * q_TIJ.dim(2)),
            static_cast<double>(ids_TK.num_elements()) *
                    static_cast<double>(k_SJ.dim(1) * DTypeBytes(k_SJ.dtype())) +
                2 * static_cast<double>(q_TIJ.bytes()));
  return ForFloatOrDouble(context, kOp, q_TIJ.dtype(), [&](auto zero) {
    return SparseIndexerLossCpu<decltype(zero)>(context, q_TIJ, k_SJ, w_TI, ids_TK, target_TK,
                                                target_scale, grad_scale, dk_SJ);
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
  if (context.device().kind == DeviceKind::kCuda) NoCudaKernel(kOp);
  if (context.counter() != nullptr) {
    // Scores twice, dq and dk; and the main attention's logits once more.
    const int64_t products =
        4 * q_TIJ.dim(1) * q_TIJ.dim(2) + target.q_THQ.dim(1) * target.q_THQ.dim(2);
    CountWork(context, kOp, 2 * CountPairs(windows) * static_cast<double>(products),
              static_cast<double>(2 * q_TIJ.bytes() + target.q_THQ.bytes()));
  }
  return ForFloatOrDouble(context, kOp, q_TIJ.dtype(), [&](auto zero) {
    return DenseIndexerLossCpu<decltype(zero)>(context, q_TIJ, k_SJ, w_TI, target, windows,
                                               grad_scale, key_tile, dk_SJ);
  });
}

Tensor DenseTargetProbabilities(const Context& context, const DenseTarget& target,
                                const KeyWindows& windows) {
  constexpr const char* kOp = "DenseTargetProbabilities";
  CheckDenseTarget(context, kOp, target, windows);
  if (context.device().kind == DeviceKind::kCuda) NoCudaKernel(kOp);
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
  if (context.device().kind == DeviceKind::kCuda) NoCudaKernel(kOp);
  return ForFloatOrDouble(context, kOp, p_TS.dtype(), [&](auto zero) {
    return SelectionQualityCpu<decltype(zero)>(context, p_TS, ids_TK, windows);
  });
}

}  // namespace baleen
