// SparseAttention: checks, then the definition for the device and the dtype.
#include "kernels/ops/attention/sparse_attention.h"

#include "kernels/ops/attention/sparse_attention_cpu.h"
#include "kernels/ops/attention/sparse_attention_gpu.h"
#include "kernels/ops/dispatch.h"

namespace baleen {
namespace {

// q gives T, H, C and the dtype; kv gives S.
void CheckOperands(const Context& context, const char* op, const Tensor& q_THC, const Tensor& kv_SC,
                   const Tensor& ids_TK, int64_t value_dim) {
  CheckRank(op, "q_THC", q_THC, 3);
  CheckRank(op, "kv_SC", kv_SC, 2);
  CheckRank(op, "ids_TK", ids_TK, 2);
  CheckTensor(context, op, "q_THC", q_THC, q_THC.dtype(), q_THC.shape());
  CheckTensor(context, op, "kv_SC", kv_SC, q_THC.dtype(), {kv_SC.dim(0), q_THC.dim(2)});
  CheckTensor(context, op, "ids_TK", ids_TK, DType::kI32, {q_THC.dim(0), ids_TK.dim(1)});
  CHECK(value_dim >= 1 && value_dim <= q_THC.dim(2))
      << op << ": value_dim " << value_dim << " of key rows " << kv_SC.DebugString();
}

// A row's full list counts, also where the sequence is shorter: the work of a kernel that pads.
void CountSparse(const Context& context, const char* op, const Tensor& q_THC, const Tensor& ids_TK,
                 int64_t products) {
  const double pairs = static_cast<double>(ids_TK.num_elements());
  // Each row gathers its own keys.
  const double gathered = pairs * static_cast<double>(q_THC.dim(2) * DTypeBytes(q_THC.dtype()));
  CountWork(context, op, 2 * pairs * static_cast<double>(q_THC.dim(1) * products),
            gathered + 2 * static_cast<double>(q_THC.bytes()));
}

}  // namespace

SparseAttentionResult SparseAttention(const Context& context, const Tensor& q_THC,
                                      const Tensor& kv_SC, const Tensor& ids_TK, int64_t value_dim,
                                      double scale) {
  constexpr const char* kOp = "SparseAttention";
  CheckOperands(context, kOp, q_THC, kv_SC, ids_TK, value_dim);
  if (OnCuda(context)) {
    return SparseAttentionOnCuda(context, q_THC, kv_SC, ids_TK, value_dim, scale);
  }
  CountSparse(context, kOp, q_THC, ids_TK, q_THC.dim(2) + value_dim);
  const SparseAttentionScratch planned =
      MakeSparseAttentionScratch(context, q_THC, ids_TK, value_dim);
  return ForFloatOrDouble(context, kOp, q_THC.dtype(), [&](auto zero) {
    return SparseAttentionCpu<decltype(zero)>::Forward(context, q_THC, kv_SC, ids_TK, value_dim,
                                                       scale);
  });
}

Tensor SparseAttentionBackward(const Context& context, const Tensor& do_THV, const Tensor& q_THC,
                               const Tensor& kv_SC, const SparseAttentionResult& forward,
                               const Tensor& ids_TK, double scale, const Tensor& dkv_SC,
                               const Tensor& target_TK) {
  constexpr const char* kOp = "SparseAttentionBackward";
  CheckRank(kOp, "do_THV", do_THV, 3);
  CheckOperands(context, kOp, q_THC, kv_SC, ids_TK, do_THV.dim(2));
  const DType dtype = q_THC.dtype();
  const int64_t num_rows = q_THC.dim(0), num_heads = q_THC.dim(1), value_dim = do_THV.dim(2);
  CheckTensor(context, kOp, "do_THV", do_THV, dtype, {num_rows, num_heads, value_dim});
  CheckTensor(context, kOp, "forward.o_THV", forward.o_THV, dtype,
              {num_rows, num_heads, value_dim});
  CheckStatistics(context, kOp, "forward.lse_TH", forward.lse_TH, dtype, {num_rows, num_heads});
  CheckStatistics(context, kOp, "dkv_SC", dkv_SC, dtype, kv_SC.shape());
  CheckStatistics(context, kOp, "target_TK", target_TK, dtype, ids_TK.shape());
  if (OnCuda(context)) {
    return SparseAttentionBackwardOnCuda(context, do_THV, q_THC, kv_SC, forward, ids_TK, scale,
                                         dkv_SC, target_TK);
  }
  CountSparse(context, kOp, q_THC, ids_TK, 3 * q_THC.dim(2) + 2 * value_dim);
  const SparseAttentionScratch planned =
      MakeSparseAttentionBackwardScratch(context, q_THC, kv_SC, ids_TK, value_dim);
  return ForFloatOrDouble(context, kOp, dtype, [&](auto zero) {
    return SparseAttentionCpu<decltype(zero)>::Backward(context, do_THV, q_THC, kv_SC, forward,
                                                        ids_TK, scale, dkv_SC, target_TK);
  });
}

}  // namespace baleen
