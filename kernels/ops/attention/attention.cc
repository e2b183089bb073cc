// Attention: checks, then the definition for the device and the dtype.
#include "kernels/ops/attention/attention.h"

#include "kernels/ops/attention/attention_cpu.h"
#include "kernels/ops/attention/attention_gpu.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/indexer/key_sets_cpu.h"

namespace baleen {
namespace {

// q gives T, H, Q and the dtype; k gives S; v gives V.
void CheckQkv(const Context& context, const char* op, const Tensor& q_THQ, const Tensor& k_SHQ,
              const Tensor& v_SHV) {
  CheckRank(op, "q_THQ", q_THQ, 3);
  CheckRank(op, "k_SHQ", k_SHQ, 3);
  CheckRank(op, "v_SHV", v_SHV, 3);
  const int64_t num_keys = k_SHQ.dim(0), heads = q_THQ.dim(1);
  CheckTensor(context, op, "q_THQ", q_THQ, q_THQ.dtype(), q_THQ.shape());
  CheckTensor(context, op, "k_SHQ", k_SHQ, q_THQ.dtype(), {num_keys, heads, q_THQ.dim(2)});
  CheckTensor(context, op, "v_SHV", v_SHV, q_THQ.dtype(), {num_keys, heads, v_SHV.dim(2)});
}

void CheckWindows(const Context& context, const char* op, const KeyWindows& windows,
                  int64_t num_rows, int64_t num_keys) {
  CheckTensor(context, op, "windows.begin_T", windows.begin_T, DType::kI32, {num_rows});
  CheckTensor(context, op, "windows.end_T", windows.end_T, DType::kI32, {num_rows});
  if (windows.host_begin_T.empty()) return;
  const Context host = Context::Cpu();
  CheckTensor(host, op, "windows.host_begin_T", windows.host_begin_T, DType::kI32, {num_rows});
  CheckTensor(host, op, "windows.host_end_T", windows.host_end_T, DType::kI32, {num_rows});
  CheckKeyWindows(op, {windows.host_begin_T, windows.host_end_T, {}, {}}, num_keys);
}

void CheckIds(const Context& context, const char* op, const Tensor& ids_TK, int64_t num_rows) {
  CheckRank(op, "ids_TK", ids_TK, 2);
  CheckTensor(context, op, "ids_TK", ids_TK, DType::kI32, {num_rows, ids_TK.dim(1)});
}

void CheckBackward(const Context& context, const char* op, const Tensor& do_THV,
                   const Tensor& q_THQ, const Tensor& k_SHQ, const Tensor& v_SHV,
                   const AttentionResult& forward, const Tensor& dk_SHQ, const Tensor& dv_SHV) {
  const DType dtype = q_THQ.dtype();
  const Shape output = {q_THQ.dim(0), q_THQ.dim(1), v_SHV.dim(2)};
  CheckTensor(context, op, "do_THV", do_THV, dtype, output);
  CheckTensor(context, op, "forward.o_THV", forward.o_THV, dtype, output);
  CheckStatistics(context, op, "forward.lse_TH", forward.lse_TH, dtype,
                  {q_THQ.dim(0), q_THQ.dim(1)});
  const DType of_keys =
      dtype == DType::kBF16 && KeyGradientsAreWritten(dk_SHQ) ? dtype : StatisticsOf(dtype);
  CheckTensor(context, op, "dk_SHQ", dk_SHQ, of_keys, k_SHQ.shape());
  CheckTensor(context, op, "dv_SHV", dv_SHV, of_keys, v_SHV.shape());
}

// The products of the forward are 2 (Q + V) a pair of query and key and head, those of the backward
// 2 (3 Q + 2 V): S and dP again, then dq, dk and dv. `pairs`: of rows and keys.
enum class Pass : uint8_t { kForward, kBackward };

void CountAttention(const Context& context, const char* op, const Tensor& q_THQ,
                    const Tensor& k_SHQ, const Tensor& v_SHV, double pairs, Pass pass) {
  const double Q = static_cast<double>(q_THQ.dim(2)), V = static_cast<double>(v_SHV.dim(2));
  const double products = pass == Pass::kForward ? Q + V : 3 * Q + 2 * V;
  const double bytes = static_cast<double>(2 * q_THQ.bytes() + k_SHQ.bytes() + v_SHV.bytes());
  CountWork(context, op, 2 * products * pairs * static_cast<double>(q_THQ.dim(1)),
            pass == Pass::kForward ? bytes : 2 * bytes);
}

}  // namespace

KeyWindows KeyWindows::Rows(int64_t begin, int64_t end) const {
  const auto rows = [&](const Tensor& of_all) {
    return of_all.empty() ? Tensor() : of_all.Rows(begin, end);
  };
  return {rows(begin_T), rows(end_T), rows(host_begin_T), rows(host_end_T)};
}

std::string AttentionKernelName(const Context& context, DType dtype, int64_t q_dim, int64_t v_dim,
                                const KeyWindows& windows) {
  return OnCuda(context) ? AttentionCudaKernelName(context, dtype, q_dim, v_dim, windows)
                         : "CPU definition";
}

std::string MaskedAttentionKernelName(DType dtype, int64_t q_dim, int64_t v_dim) {
  return MaskedAttentionOnTensorCores(dtype, q_dim, v_dim) ? "tensor cores"
                                                           : "general (fp32 arithmetic)";
}

AttentionResult Attention(const Context& context, const Tensor& q_THQ, const Tensor& k_SHQ,
                          const Tensor& v_SHV, const KeyWindows& windows, double scale) {
  constexpr const char* kOp = "Attention";
  CheckQkv(context, kOp, q_THQ, k_SHQ, v_SHV);
  CheckWindows(context, kOp, windows, q_THQ.dim(0), k_SHQ.dim(0));
  if (OnCuda(context)) return AttentionOnCuda(context, q_THQ, k_SHQ, v_SHV, windows, scale);
  if (context.counter() != nullptr) {
    CountAttention(context, kOp, q_THQ, k_SHQ, v_SHV, CountPairs(windows), Pass::kForward);
  }
  const Tensor planned = MakeMaskedAttentionWorkspace(context, q_THQ, v_SHV, {windows, {}},
                                                      MaskedAttentionPass::kForward);
  return ForFloatOrDouble(context, kOp, q_THQ.dtype(), [&](auto zero) {
    return AttentionCpu<decltype(zero)>::Forward(context, q_THQ, k_SHQ, v_SHV, windows, scale);
  });
}

Tensor AttentionBackward(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                         const Tensor& k_SHQ, const Tensor& v_SHV, const AttentionResult& forward,
                         const KeyWindows& windows, double scale, const Tensor& dk_SHQ,
                         const Tensor& dv_SHV) {
  constexpr const char* kOp = "AttentionBackward";
  CheckQkv(context, kOp, q_THQ, k_SHQ, v_SHV);
  CheckWindows(context, kOp, windows, q_THQ.dim(0), k_SHQ.dim(0));
  CheckBackward(context, kOp, do_THV, q_THQ, k_SHQ, v_SHV, forward, dk_SHQ, dv_SHV);
  if (OnCuda(context)) {
    return AttentionBackwardOnCuda(context, do_THV, q_THQ, k_SHQ, v_SHV, forward, windows, scale,
                                   dk_SHQ, dv_SHV);
  }
  if (context.counter() != nullptr) {
    CountAttention(context, kOp, q_THQ, k_SHQ, v_SHV, CountPairs(windows), Pass::kBackward);
  }
  const std::vector<Tensor> planned =
      PlanAttentionBackward(context, q_THQ, k_SHQ, v_SHV, windows, dk_SHQ);
  return ForFloatOrDouble(context, kOp, q_THQ.dtype(), [&](auto zero) {
    return AttentionCpu<decltype(zero)>::Backward(context, do_THV, q_THQ, k_SHQ, v_SHV, forward,
                                                  windows, scale, dk_SHQ, dv_SHV);
  });
}

AttentionResult MaskedAttention(const Context& context, const Tensor& q_THQ, const Tensor& k_SHQ,
                                const Tensor& v_SHV, const Tensor& ids_TK, double scale) {
  constexpr const char* kOp = "MaskedAttention";
  CheckQkv(context, kOp, q_THQ, k_SHQ, v_SHV);
  CheckIds(context, kOp, ids_TK, q_THQ.dim(0));
  if (OnCuda(context)) return MaskedAttentionOnCuda(context, q_THQ, k_SHQ, v_SHV, ids_TK, scale);
  if (context.counter() != nullptr) {
    CountAttention(context, kOp, q_THQ, k_SHQ, v_SHV, static_cast<double>(ids_TK.num_elements()),
                   Pass::kForward);
  }
  const Tensor planned = MakeMaskedAttentionWorkspace(context, q_THQ, v_SHV, {{}, ids_TK},
                                                      MaskedAttentionPass::kForward);
  return ForFloatOrDouble(context, kOp, q_THQ.dtype(), [&](auto zero) {
    return MaskedAttentionCpu<decltype(zero)>::Forward(context, q_THQ, k_SHQ, v_SHV, ids_TK, scale);
  });
}

Tensor MaskedAttentionBackward(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                               const Tensor& k_SHQ, const Tensor& v_SHV,
                               const AttentionResult& forward, const Tensor& ids_TK, double scale,
                               const Tensor& dk_SHQ, const Tensor& dv_SHV,
                               const Tensor& target_TK) {
  constexpr const char* kOp = "MaskedAttentionBackward";
  CheckQkv(context, kOp, q_THQ, k_SHQ, v_SHV);
  CheckIds(context, kOp, ids_TK, q_THQ.dim(0));
  CheckBackward(context, kOp, do_THV, q_THQ, k_SHQ, v_SHV, forward, dk_SHQ, dv_SHV);
  CheckStatistics(context, kOp, "target_TK", target_TK, q_THQ.dtype(), ids_TK.shape());
  if (OnCuda(context)) {
    return MaskedAttentionBackwardOnCuda(context, do_THV, q_THQ, k_SHQ, v_SHV, forward, ids_TK,
                                         scale, dk_SHQ, dv_SHV, target_TK);
  }
  if (context.counter() != nullptr) {
    CountAttention(context, kOp, q_THQ, k_SHQ, v_SHV, static_cast<double>(ids_TK.num_elements()),
                   Pass::kBackward);
  }
  const Tensor planned = MakeMaskedAttentionWorkspace(context, q_THQ, v_SHV, {{}, ids_TK},
                                                      MaskedAttentionPass::kBackward);
  return ForFloatOrDouble(context, kOp, q_THQ.dtype(), [&](auto zero) {
    return MaskedAttentionCpu<decltype(zero)>::Backward(
        context, do_THV, q_THQ, k_SHQ, v_SHV, forward, ids_TK, scale, dk_SHQ, dv_SHV, target_TK);
  });
}

}  // namespace baleen
