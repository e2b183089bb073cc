#include "kernels/ops/attention/attention_gpu.h"

#include <algorithm>
#include <mutex>
#include <set>

#include "absl/strings/str_cat.h"
#include "kernels/core/log.h"
#include "kernels/ops/attention/attention_cudnn.h"
#include "kernels/ops/attention/attention_general_cuda.h"
#include "kernels/ops/attention/attention_segments.h"
#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/elementwise.h"

namespace baleen {
namespace {

AttentionCudaArgs CudaArgs(const char* op, const Tensor& q_THQ, const Tensor& k_SHQ,
                           const Tensor& v_SHV, double scale) {
  return {.element = ElementOf(op, "q_THQ", q_THQ),
          .T = q_THQ.dim(0),
          .S = k_SHQ.dim(0),
          .H = q_THQ.dim(1),
          .Q = q_THQ.dim(2),
          .V = v_SHV.dim(2),
          .scale = static_cast<float>(scale),
          .q = q_THQ.raw(),
          .k = k_SHQ.raw(),
          .v = v_SHV.raw()};
}

AttentionResult EmptyResult(const Context& context, const Tensor& q_THQ, const Tensor& v_SHV) {
  return {context.Empty(q_THQ.dtype(), {q_THQ.dim(0), q_THQ.dim(1), v_SHV.dim(2)}),
          context.Empty(DType::kF32, {q_THQ.dim(0), q_THQ.dim(1)})};
}

// Rows of a backward call: what AttentionBackwardCuda reads and writes.
struct BackwardRows {
  Tensor d_out, o, lse, dq;

  BackwardRows Rows(int64_t begin, int64_t end) const {
    return {d_out.Rows(begin, end), o.Rows(begin, end), lse.Rows(begin, end), dq.Rows(begin, end)};
  }
};

void GeneralBackward(const Context& context, const AttentionCudaArgs& args,
                     const BackwardRows& rows, const Tensor& dk_SHQ, const Tensor& dv_SHV) {
  const Tensor delta_TH = CudaScratch(context, args.T * args.H);
  AttentionBackwardCuda(args,
                        {.d_out = rows.d_out.raw(),
                         .o = rows.o.raw(),
                         .lse = rows.lse.data<float>(),
                         .delta = delta_TH.data<float>(),
                         .dq = rows.dq.raw(),
                         .dk = dk_SHQ.data<float>(),
                         .dv = dv_SHV.data<float>()},
                        context.stream());
}

// Says once what makes attention slow.
void WarnOnce(const absl::Status& status) {
  static auto* const said = new std::set<std::string>;
  static auto* const mutex = new std::mutex;
  const std::lock_guard<std::mutex> lock(*mutex);
  const std::string message(status.message());
  if (!said->insert(message).second) return;
  WriteLog(
      Severity::kWarning, "",
      absl::StrCat("attention runs on Baleen's general kernels, many times slower: ", message));
}

// What runs which rows.
struct CudaPlan {
  CudnnAttention* cudnn = nullptr;  // of the causal segments
  std::vector<AttentionSegment> segments;
};

CudaPlan PlanOnCuda(const Context& context, DType dtype, int64_t Q, int64_t V,
                    const KeyWindows& windows) {
  const int64_t num_rows = windows.begin_T.dim(0);
  CudaPlan plan;
  plan.segments = {{AttentionSegment::Kind::kGeneral, 0, num_rows, 0, 0}};
  if (!CudnnTakesHeads(dtype, Q, V) || windows.host_begin_T.empty()) return plan;
  std::vector<AttentionSegment> segments = SplitIntoSegments(
      windows.host_begin_T.data<int32_t>(), windows.host_end_T.data<int32_t>(), num_rows);
  const bool any_causal =
      std::any_of(segments.begin(), segments.end(), [](const AttentionSegment& segment) {
        return segment.kind == AttentionSegment::Kind::kCausal;
      });
  if (!any_causal) return plan;
  const absl::StatusOr<CudnnAttention*> cudnn = CudnnAttention::Of(context);
  if (!cudnn.ok()) {
    WarnOnce(cudnn.status());
    return plan;
  }
  return {*cudnn, std::move(segments)};
}

// Calls fused(segment) for the causal segments and general(begin, end) for the other rows, and for
// segments of which fused says that the library has no kernel.
template <typename Fused, typename General>
void RunSegments(const CudaPlan& plan, Fused fused, General general) {
  for (const AttentionSegment& segment : plan.segments) {
    if (segment.kind == AttentionSegment::Kind::kCausal) {
      const absl::Status status = fused(segment);
      if (status.ok()) continue;
      WarnOnce(status);
    }
    general(segment.row_begin, segment.row_end);
  }
}

AttentionCudaArgs WindowArgs(const char* op, const Tensor& q_THQ, const Tensor& k_SHQ,
                             const Tensor& v_SHV, const KeyWindows& windows, double scale) {
  AttentionCudaArgs args = CudaArgs(op, q_THQ, k_SHQ, v_SHV, scale);
  args.begin = windows.begin_T.data<int32_t>();
  args.end = windows.end_T.data<int32_t>();
  return args;
}

AttentionResult Forward(const Context& context, const Tensor& q_THQ, const Tensor& k_SHQ,
                        const Tensor& v_SHV, const KeyWindows& windows, double scale) {
  const AttentionResult result = EmptyResult(context, q_THQ, v_SHV);
  const CudaPlan plan = PlanOnCuda(context, q_THQ.dtype(), q_THQ.dim(2), v_SHV.dim(2), windows);
  RunSegments(
      plan,
      [&](const AttentionSegment& segment) {
        return plan.cudnn->Forward(context, segment, q_THQ, k_SHQ, v_SHV, scale, result.o_THV,
                                   result.lse_TH);
      },
      [&](int64_t begin, int64_t end) {
        AttentionForwardCuda(WindowArgs("Attention", q_THQ.Rows(begin, end), k_SHQ, v_SHV,
                                        windows.Rows(begin, end), scale),
                             result.o_THV.Rows(begin, end).raw(),
                             result.lse_TH.Rows(begin, end).data<float>(), context.stream());
      });
  return result;
}

Tensor Backward(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                const Tensor& k_SHQ, const Tensor& v_SHV, const AttentionResult& forward,
                const KeyWindows& windows, double scale, const Tensor& dk_SHQ,
                const Tensor& dv_SHV) {
  const Tensor dq_THQ = context.Empty(q_THQ.dtype(), q_THQ.shape());
  const BackwardRows all{do_THV, forward.o_THV, forward.lse_TH, dq_THQ};
  const CudaPlan plan = PlanOnCuda(context, q_THQ.dtype(), q_THQ.dim(2), v_SHV.dim(2), windows);
  RunSegments(
      plan,
      [&](const AttentionSegment& segment) {
        return plan.cudnn->Backward(context, segment, do_THV, q_THQ, k_SHQ, v_SHV, forward.o_THV,
                                    forward.lse_TH, scale, {dq_THQ, dk_SHQ, dv_SHV});
      },
      [&](int64_t begin, int64_t end) {
        GeneralBackward(context,
                        WindowArgs("AttentionBackward", q_THQ.Rows(begin, end), k_SHQ, v_SHV,
                                   windows.Rows(begin, end), scale),
                        all.Rows(begin, end), dk_SHQ, dv_SHV);
      });
  return dq_THQ;
}

// Gradients of keys that are to be written in bf16, by kernels that add to fp32 sums: run(dk, dv)
// gives dq.
template <typename Run>
Tensor WithKeySums(const Context& context, const Tensor& dk_SHQ, const Tensor& dv_SHV, Run run) {
  if (!KeyGradientsAreWritten(dk_SHQ)) return run(dk_SHQ, dv_SHV);
  const Tensor dk_sums = context.Zeros(DType::kF32, dk_SHQ.shape());
  const Tensor dv_sums = context.Zeros(DType::kF32, dv_SHV.shape());
  const Tensor dq_THQ = run(dk_sums, dv_sums);
  Copy(context, Cast(context, dk_sums, dk_SHQ.dtype()), dk_SHQ);
  Copy(context, Cast(context, dv_sums, dv_SHV.dtype()), dv_SHV);
  return dq_THQ;
}

std::string KernelName(const Context& context, DType dtype, int64_t q_dim, int64_t v_dim,
                       const KeyWindows& windows) {
  const CudaPlan plan = PlanOnCuda(context, dtype, q_dim, v_dim, windows);
  if (plan.cudnn == nullptr) {
    return absl::StrCat("general kernels: ", DTypeName(dtype), " heads ", q_dim, "/", v_dim);
  }
  int64_t causal = 0, general_rows = 0;
  for (const AttentionSegment& segment : plan.segments) {
    const bool is_causal = segment.kind == AttentionSegment::Kind::kCausal;
    causal += is_causal ? 1 : 0;
    general_rows += is_causal ? 0 : segment.num_rows();
  }
  std::string name = absl::StrCat("cuDNN ", plan.cudnn->version(), " SDPA, ", causal,
                                  causal == 1 ? " segment" : " segments");
  if (general_rows > 0) absl::StrAppend(&name, ", ", general_rows, " rows on general kernels");
  return name;
}

// Lists of keys become a bit a key and row, and their target passes through the sums of all keys:
// so many rows at a time that both fit in this.
constexpr int64_t kListScratchBytes = int64_t{64} << 20;

// Calls body(begin, end, the rows' marks) for chunks of rows.
template <typename Body>
void ForEachMarkedChunk(const Context& context, const Tensor& ids_TK, int64_t num_keys, Body body) {
  const int64_t num_rows = ids_TK.dim(0), words = (num_keys + kKeysPerWord - 1) / kKeysPerWord;
  const int64_t row_bytes = std::max<int64_t>(1, 4 * num_keys + 8 * words);
  const int64_t fitting = kListScratchBytes / row_bytes / kKeysPerWord * kKeysPerWord;
  const int64_t rows_per_chunk = std::min(num_rows, std::max(kKeysPerWord, fitting));
  const Tensor marks = context.Empty(DType::kU8, {rows_per_chunk * words * 8});
  uint64_t* const seen = static_cast<uint64_t*>(marks.raw());
  for (int64_t begin = 0; begin < num_rows; begin += rows_per_chunk) {
    const int64_t end = std::min(num_rows, begin + rows_per_chunk);
    const Tensor ids = ids_TK.Rows(begin, end);
    MarkSeenKeysCuda(end - begin, num_keys, ids.dim(1), ids.data<int32_t>(), seen,
                     context.stream());
    body(begin, end, seen);
  }
}

AttentionResult MaskedForward(const Context& context, const Tensor& q_THQ, const Tensor& k_SHQ,
                              const Tensor& v_SHV, const Tensor& ids_TK, double scale) {
  const AttentionResult result = EmptyResult(context, q_THQ, v_SHV);
  ForEachMarkedChunk(
      context, ids_TK, k_SHQ.dim(0), [&](int64_t begin, int64_t end, uint64_t* seen) {
        AttentionCudaArgs args =
            CudaArgs("MaskedAttention", q_THQ.Rows(begin, end), k_SHQ, v_SHV, scale);
        args.seen = seen;
        AttentionForwardCuda(args, result.o_THV.Rows(begin, end).raw(),
                             result.lse_TH.Rows(begin, end).data<float>(), context.stream());
      });
  return result;
}

Tensor MaskedBackward(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                      const Tensor& k_SHQ, const Tensor& v_SHV, const AttentionResult& forward,
                      const Tensor& ids_TK, double scale, const Tensor& dk_SHQ,
                      const Tensor& dv_SHV, const Tensor& target_TK) {
  const Tensor dq_THQ = context.Empty(q_THQ.dtype(), q_THQ.shape());
  const BackwardRows all{do_THV, forward.o_THV, forward.lse_TH, dq_THQ};
  const int64_t num_keys = k_SHQ.dim(0);
  Tensor sums;
  ForEachMarkedChunk(context, ids_TK, num_keys, [&](int64_t begin, int64_t end, uint64_t* seen) {
    AttentionCudaArgs args =
        CudaArgs("MaskedAttentionBackward", q_THQ.Rows(begin, end), k_SHQ, v_SHV, scale);
    args.seen = seen;
    const BackwardRows rows = all.Rows(begin, end);
    GeneralBackward(context, args, rows, dk_SHQ, dv_SHV);
    if (sums.empty()) sums = CudaScratch(context, (end - begin) * num_keys);
    AttentionTargetCuda(args, rows.lse.data<float>(), ids_TK.dim(1),
                        ids_TK.Rows(begin, end).data<int32_t>(), sums.data<float>(),
                        target_TK.Rows(begin, end).data<float>(), context.stream());
  });
  return dq_THQ;
}

// What cuDNN's backward takes meanwhile, in a dry call of what it would run on a GPU.
void TakeCudnnScratch(const Context& context, const Tensor& q_THQ, const Tensor& v_SHV,
                      const KeyWindows& windows) {
  if (!CudnnTakesHeads(q_THQ.dtype(), q_THQ.dim(2), v_SHV.dim(2))) return;
  for (const AttentionSegment& segment :
       SplitIntoSegments(windows.begin_T.data<int32_t>(), windows.end_T.data<int32_t>(),
                         windows.begin_T.dim(0))) {
    if (segment.kind != AttentionSegment::Kind::kCausal) continue;
    const BackwardScratch scratch = ScratchOf(
        BackwardCalls(segment, q_THQ.dim(1), kCudnnBackwardBytes), q_THQ.dim(2), v_SHV.dim(2));
    const Tensor gradients = context.Empty(
        DType::kBF16, {scratch.dk_elements + scratch.dv_elements + scratch.dq_elements});
    const Tensor lse = context.Empty(DType::kF32, {scratch.lse_elements});
    const Tensor library = context.Empty(DType::kU8, {scratch.library_bytes});
  }
}

}  // namespace

bool KeyGradientsAreWritten(const Tensor& dk_SHQ) { return dk_SHQ.dtype() == DType::kBF16; }

std::vector<Tensor> PlanAttentionBackward(const Context& context, const Tensor& q_THQ,
                                          const Tensor& k_SHQ, const Tensor& v_SHV,
                                          const KeyWindows& windows, const Tensor& dk_SHQ) {
  if (!context.dry()) return {};
  const SeenKeys seen = {windows, {}};
  const Tensor workspace =
      MakeMaskedAttentionWorkspace(context, q_THQ, v_SHV, seen, MaskedAttentionPass::kBackward);
  if (!workspace.empty()) return {workspace};
  std::vector<Tensor> sums;
  if (KeyGradientsAreWritten(dk_SHQ)) {
    sums = {context.Empty(DType::kF32, k_SHQ.shape()), context.Empty(DType::kF32, v_SHV.shape())};
  }
  TakeCudnnScratch(context, q_THQ, v_SHV, windows);
  return sums;
}

AttentionResult AttentionOnCuda(const Context& context, const Tensor& q_THQ, const Tensor& k_SHQ,
                                const Tensor& v_SHV, const KeyWindows& windows, double scale) {
  if constexpr (kHaveCuda) {
    if (AttentionOnTensorCores(q_THQ, v_SHV)) {
      return AttentionForwardOnTensorCores(context, q_THQ, k_SHQ, v_SHV, {windows, {}}, scale);
    }
    return Forward(context, q_THQ, k_SHQ, v_SHV, windows, scale);
  }
  NoCudaKernel("Attention");
}

Tensor AttentionBackwardOnCuda(const Context& context, const Tensor& do_THV, const Tensor& q_THQ,
                               const Tensor& k_SHQ, const Tensor& v_SHV,
                               const AttentionResult& forward, const KeyWindows& windows,
                               double scale, const Tensor& dk_SHQ, const Tensor& dv_SHV) {
  if constexpr (kHaveCuda) {
    if (AttentionOnTensorCores(q_THQ, v_SHV)) {
      return AttentionBackwardOnTensorCores(context, do_THV, q_THQ, k_SHQ, v_SHV, forward,
                                            {windows, {}}, scale, dk_SHQ, dv_SHV, {});
    }
    return WithKeySums(context, dk_SHQ, dv_SHV, [&](const Tensor& dk, const Tensor& dv) {
      return Backward(context, do_THV, q_THQ, k_SHQ, v_SHV, forward, windows, scale, dk, dv);
    });
  }
  NoCudaKernel("AttentionBackward");
}

AttentionResult MaskedAttentionOnCuda(const Context& context, const Tensor& q_THQ,
                                      const Tensor& k_SHQ, const Tensor& v_SHV,
                                      const Tensor& ids_TK, double scale) {
  if constexpr (kHaveCuda) {
    if (AttentionOnTensorCores(q_THQ, v_SHV)) {
      return AttentionForwardOnTensorCores(context, q_THQ, k_SHQ, v_SHV, {{}, ids_TK}, scale);
    }
    return MaskedForward(context, q_THQ, k_SHQ, v_SHV, ids_TK, scale);
  }
  NoCudaKernel("MaskedAttention");
}

Tensor MaskedAttentionBackwardOnCuda(const Context& context, const Tensor& do_THV,
                                     const Tensor& q_THQ, const Tensor& k_SHQ, const Tensor& v_SHV,
                                     const AttentionResult& forward, const Tensor& ids_TK,
                                     double scale, const Tensor& dk_SHQ, const Tensor& dv_SHV,
                                     const Tensor& target_TK) {
  if constexpr (kHaveCuda) {
    if (AttentionOnTensorCores(q_THQ, v_SHV)) {
      return AttentionBackwardOnTensorCores(context, do_THV, q_THQ, k_SHQ, v_SHV, forward,
                                            {{}, ids_TK}, scale, dk_SHQ, dv_SHV, target_TK);
    }
    return WithKeySums(context, dk_SHQ, dv_SHV, [&](const Tensor& dk, const Tensor& dv) {
      return MaskedBackward(context, do_THV, q_THQ, k_SHQ, v_SHV, forward, ids_TK, scale, dk, dv,
                            target_TK);
    });
  }
  NoCudaKernel("MaskedAttentionBackward");
}

std::string AttentionCudaKernelName(const Context& context, DType dtype, int64_t q_dim,
                                    int64_t v_dim, const KeyWindows& windows) {
  if (MaskedAttentionOnTensorCores(dtype, q_dim, v_dim)) return "tensor cores";
  if constexpr (kHaveCuda) return KernelName(context, dtype, q_dim, v_dim, windows);
  NoCudaKernel("Attention");
}

}  // namespace baleen
