// Tensors to the argument structs of the kernels for 192/128 heads, and their workspace.
#include "kernels/ops/attention/masked_attention_gpu.h"

#include <limits>

#include "kernels/ops/attention/masked_attention_backward_cuda.h"
#include "kernels/ops/attention/masked_attention_forward_cuda.h"
#include "kernels/ops/dispatch.h"

namespace baleen {
namespace {

constexpr char kOp[] = "Attention on tensor cores";
constexpr int64_t kQueryDim = 192, kValueDim = 128;

int ToInt(const char* name, int64_t value) {
  CHECK_LE(value, std::numeric_limits<int>::max() / 2) << kOp << ": " << name;
  return static_cast<int>(value);
}

// Copies of 16 bytes begin at each row.
void* Aligned(const char* name, const Tensor& tensor) {
  CHECK(reinterpret_cast<uintptr_t>(tensor.raw()) % 16 == 0)
      << kOp << ": " << name << " " << tensor.DebugString() << " begins at " << tensor.raw()
      << ", expected a multiple of 16";
  return tensor.raw();
}

// Sizes alone: a dry call's tensors have no contents.
MaskedAttentionKeys SizesOf(const Tensor& q_THQ, const Tensor& v_SHV, const SeenKeys& seen) {
  MaskedAttentionKeys keys;
  keys.num_rows = ToInt("rows", q_THQ.dim(0));
  keys.num_keys = ToInt("keys", v_SHV.dim(0));
  if (seen.ids_TK.rank() == 2) keys.num_selected = ToInt("ids of a row", seen.ids_TK.dim(1));
  keys.ds_bytes = MaskedScoreGradientBytes(keys, ToInt("heads", q_THQ.dim(1)));
  return keys;
}

MaskedAttentionKeys KeysOf(const Tensor& q_THQ, const Tensor& v_SHV, const SeenKeys& seen) {
  MaskedAttentionKeys keys = SizesOf(q_THQ, v_SHV, seen);
  if (keys.num_selected > 0) keys.ids_TK = seen.ids_TK.data<int32_t>();
  if (!seen.windows.begin_T.empty()) {
    keys.key_begin_T = seen.windows.begin_T.data<int32_t>();
    keys.key_end_T = seen.windows.end_T.data<int32_t>();
  }
  return keys;
}

void CheckScale(double scale) {
  CHECK(scale > 0) << kOp << ": the scale of the scores is " << scale
                   << ", expected a positive number";
}

}  // namespace

bool MaskedAttentionOnTensorCores(DType dtype, int64_t q_dim, int64_t v_dim) {
  return dtype == DType::kBF16 && q_dim == kQueryDim && v_dim == kValueDim;
}

bool AttentionOnTensorCores(const Tensor& q_THQ, const Tensor& v_SHV) {
  return MaskedAttentionOnTensorCores(q_THQ.dtype(), q_THQ.dim(2), v_SHV.dim(2)) &&
         v_SHV.dim(0) > 0;
}

Tensor MakeMaskedAttentionWorkspace(const Context& context, const Tensor& q_THQ,
                                    const Tensor& v_SHV, const SeenKeys& seen,
                                    MaskedAttentionPass pass) {
  // bf16 is no dtype of the CPU: a dry call with it stands for one on a GPU.
  if (!OnCuda(context) && !context.dry()) return Tensor();
  if (!AttentionOnTensorCores(q_THQ, v_SHV)) return Tensor();
  const MaskedAttentionLayout layout =
      LayOutMaskedAttention(SizesOf(q_THQ, v_SHV, seen), pass, ToInt("heads", q_THQ.dim(1)));
  Context named = context;
  const ScopedUse use(named, "kernel workspaces");
  return named.Empty(DType::kI32, {static_cast<int64_t>(layout.bytes / 4)});
}

AttentionResult AttentionForwardOnTensorCores(const Context& context, const Tensor& q_THQ,
                                              const Tensor& k_SHQ, const Tensor& v_SHV,
                                              const SeenKeys& seen, double scale) {
  CheckScale(scale);
  const AttentionResult result = {
      context.Empty(q_THQ.dtype(), {q_THQ.dim(0), q_THQ.dim(1), v_SHV.dim(2)}),
      context.Empty(DType::kF32, {q_THQ.dim(0), q_THQ.dim(1)})};
  if constexpr (kHaveCuda) {
    const Tensor workspace =
        MakeMaskedAttentionWorkspace(context, q_THQ, v_SHV, seen, MaskedAttentionPass::kForward);
    LaunchMaskedAttentionForward({.keys = KeysOf(q_THQ, v_SHV, seen),
                                  .q_THQ = Aligned("q_THQ", q_THQ),
                                  .k_SHQ = Aligned("k_SHQ", k_SHQ),
                                  .v_SHV = Aligned("v_SHV", v_SHV),
                                  .num_heads = ToInt("heads", q_THQ.dim(1)),
                                  .scale = static_cast<float>(scale),
                                  .o_THV = result.o_THV.raw(),
                                  .lse_TH = result.lse_TH.data<float>(),
                                  .workspace = workspace.raw()},
                                 context.stream());
    return result;
  }
  NoCudaKernel(kOp);
}

Tensor AttentionBackwardOnTensorCores(const Context& context, const Tensor& do_THV,
                                      const Tensor& q_THQ, const Tensor& k_SHQ, const Tensor& v_SHV,
                                      const AttentionResult& forward, const SeenKeys& seen,
                                      double scale, const Tensor& dk_SHQ, const Tensor& dv_SHV,
                                      const Tensor& target_TK) {
  CheckScale(scale);
  const Tensor dq_THQ = context.Empty(q_THQ.dtype(), q_THQ.shape());
  if constexpr (kHaveCuda) {
    const Tensor workspace =
        MakeMaskedAttentionWorkspace(context, q_THQ, v_SHV, seen, MaskedAttentionPass::kBackward);
    LaunchMaskedAttentionBackward(
        {.keys = KeysOf(q_THQ, v_SHV, seen),
         .q_THQ = Aligned("q_THQ", q_THQ),
         .k_SHQ = Aligned("k_SHQ", k_SHQ),
         .v_SHV = Aligned("v_SHV", v_SHV),
         .o_THV = Aligned("forward.o_THV", forward.o_THV),
         .lse_TH = forward.lse_TH.data<float>(),
         .do_THV = Aligned("do_THV", do_THV),
         .num_heads = ToInt("heads", q_THQ.dim(1)),
         .scale = static_cast<float>(scale),
         .dq_THQ = dq_THQ.raw(),
         .dk_SHQ = Aligned("dk_SHQ", dk_SHQ),
         .dv_SHV = Aligned("dv_SHV", dv_SHV),
         .writes_keys = dk_SHQ.dtype() == DType::kBF16,
         .target_TK = target_TK.empty() ? nullptr : target_TK.data<float>(),
         .workspace = workspace.raw()},
        context.stream());
    return dq_THQ;
  }
  NoCudaKernel(kOp);
}

}  // namespace baleen
