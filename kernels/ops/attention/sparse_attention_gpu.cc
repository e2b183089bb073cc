// Two sets of kernels: on tensor cores for the shapes of DeepSeek-V3 in bf16, general ones for all
// else. Which one runs depends on dtype and shapes alone, so the same run takes the same path; only
// whether the backward of few heads packs queries depends on their lists.
#include "kernels/ops/attention/sparse_attention_gpu.h"

#include <limits>

#include "absl/strings/str_cat.h"
#include "kernels/ops/attention/sparse_attention_backward_cuda.h"
#include "kernels/ops/attention/sparse_attention_forward_cuda.h"
#include "kernels/ops/attention/sparse_attention_general_cuda.h"
#include "kernels/ops/attention/sparse_attention_packs_cuda.h"
#include "kernels/ops/attention/sparse_attention_padding_cuda.h"
#include "kernels/ops/cuda_element.h"
#include "kernels/ops/dispatch.h"
#include "kernels/ops/stable_sort_cuda.h"

namespace baleen {
namespace {

constexpr char kOp[] = "SparseAttention";
constexpr int64_t kListStep = 64;  // K of the kernels on tensor cores is a multiple of it

// Of the backward on tensor cores. At K = 2048 it holds chunks of 288 queries (2.0 GB of rows and
// up to 0.2 GB of index), which is all that 128 heads gain from up to 32K keys, and of 384 up to 64
// heads, whose rows are shorter. Twice as much gains nothing at 8K keys
// (RESULTS_sparse_attention.md) and is a thirtieth of an 80 GB card.
constexpr size_t kBackwardBudget = size_t{5} << 29;  // 2.5 GiB

bool OnTensorCores(const Tensor& q_THC, const Tensor& ids_TK, int64_t value_dim) {
  return SparseAttentionOnTensorCores(q_THC.dtype(), q_THC.dim(1), q_THC.dim(2), value_dim,
                                      ids_TK.dim(1));
}

// Whether the call, if dry, stands for one on a GPU: bf16 is no dtype of the CPU.
bool PlansCuda(const Context& context, const Tensor& q_THC) {
  return context.dry() && q_THC.dtype() == DType::kBF16;
}

Tensor Scratch(const Context& context, DType dtype, Shape shape) {
  Context named = context;
  const ScopedUse use(named, "kernel workspaces");
  return named.Empty(dtype, std::move(shape));
}

int64_t PaddedSlots(const Tensor& ids_TK) {
  return (ids_TK.dim(1) + kListStep - 1) / kListStep * kListStep;
}

// Empty where the lists are as the kernels take them.
Tensor PaddedIdsScratch(const Context& context, const Tensor& ids_TK) {
  const int64_t padded = PaddedSlots(ids_TK);
  if (padded == ids_TK.dim(1)) return {};
  return Scratch(context, DType::kI32, {ids_TK.dim(0), padded});
}

int ToInt(const char* name, int64_t value) {
  CHECK_LE(value, std::numeric_limits<int>::max()) << kOp << ": " << name;
  return static_cast<int>(value);
}

SparseAttentionBackwardShape ShapeOf(const Tensor& q_THC, const Tensor& kv_SC,
                                     const Tensor& ids_TK) {
  return {ToInt("rows", q_THC.dim(0)), ToInt("keys", kv_SC.dim(0)), ToInt("heads", q_THC.dim(1)),
          ToInt("slots", PaddedSlots(ids_TK))};
}

// Wide loads, and copies of 16 bytes, begin at each row.
void CheckAligned(const char* name, const Tensor& tensor) {
  CHECK(reinterpret_cast<uintptr_t>(tensor.raw()) % 16 == 0)
      << kOp << ": " << name << " " << tensor.DebugString() << " begins at " << tensor.raw()
      << ", expected a multiple of 16";
}

// The lists as the kernels on tensor cores take them.
const int32_t* PaddedIds(const Context& context, const Tensor& ids_TK,
                         const SparseAttentionScratch& scratch) {
  if (scratch.ids_TP.empty()) return ids_TK.data<int32_t>();
  if constexpr (kHaveCuda) {
    ResizeListsCuda({.rows = ids_TK.dim(0),
                     .from_width = ids_TK.dim(1),
                     .to_width = scratch.ids_TP.dim(1),
                     .from = ids_TK.raw(),
                     .to = scratch.ids_TP.raw()},
                    context.stream());
  }
  return scratch.ids_TP.data<int32_t>();
}

// The unions of the lists of neighbouring queries.
SparseAttentionPacks PacksOf(const Tensor& q_THC, const Tensor& ids_TK) {
  SparseAttentionPacks packs;
  packs.num_tokens = ToInt("rows", q_THC.dim(0));
  packs.num_selected = ToInt("slots", ids_TK.dim(1));
  packs.queries = SparseAttentionQueriesAPack(q_THC.dim(0), q_THC.dim(1));
  return packs;
}
// Those of the backward: of whole tiles of rows, with lists padded.
SparseAttentionPacks BackwardPacksOf(const Tensor& q_THC, const Tensor& ids_TK) {
  SparseAttentionPacks packs = PacksOf(q_THC, ids_TK);
  packs.num_selected = ToInt("slots", PaddedSlots(ids_TK));
  if (packs.queries * q_THC.dim(1) != kPackedRows) packs.queries = 1;
  return packs;
}
// Sets what is missing and starts filling the unions.
void FillPacks(const Context& context, const Tensor& kv_SC, const int32_t* ids,
               const SparseAttentionScratch& scratch, SparseAttentionPacks& packs) {
  CHECK_LE(kv_SC.dim(0), int64_t{1} << kPackedKeyBits) << kOp << ": keys";
  packs.num_keys = static_cast<int>(kv_SC.dim(0));
  packs.ids_TK = ids;
  packs.entries_IU = reinterpret_cast<uint32_t*>(scratch.entries_IU.data<int32_t>());
  packs.counts_I = scratch.counts_I.data<int32_t>();
  if constexpr (kHaveCuda) LaunchPackSelectedKeys(packs, context.stream());
}

// How the backward runs: single queries, and packs where the device finds that they pay.
struct BackwardPlans {
  SparseAttentionBackwardShape shape;
  SparseAttentionBackwardPlan single;
  SparseAttentionBackwardPacksPlan packs;
};
BackwardPlans PlanBackward(const Tensor& q_THC, const Tensor& kv_SC, const Tensor& ids_TK) {
  BackwardPlans plans;
  plans.shape = ShapeOf(q_THC, kv_SC, ids_TK);
  plans.single = PlanSparseAttentionBackward(plans.shape, kBackwardBudget);
  plans.packs = PlanSparseAttentionBackwardPacks(
      plans.shape, plans.single, BackwardPacksOf(q_THC, ids_TK).queries, kBackwardBudget);
  return plans;
}

void RunForwardOnTensorCores(const Context& context, const Tensor& q_THC, const Tensor& kv_SC,
                             const Tensor& ids_TK, double scale,
                             const SparseAttentionResult& result) {
  if constexpr (kHaveCuda) {
    CheckAligned("q_THC", q_THC);
    CheckAligned("kv_SC", kv_SC);
    const SparseAttentionScratch scratch =
        MakeSparseAttentionScratch(context, q_THC, ids_TK, result.o_THV.dim(2));
    const SparseAttentionBackwardShape shape = ShapeOf(q_THC, kv_SC, ids_TK);
    SparseAttentionForwardArgs args;
    args.q_THC = q_THC.raw();
    args.kv_SC = kv_SC.raw();
    args.o_THV = result.o_THV.raw();
    args.lse_TH = result.lse_TH.data<float>();
    args.num_tokens = shape.num_tokens;
    args.num_heads = shape.num_heads;
    args.scale = static_cast<float>(scale);
    if (scratch.entries_IU.empty()) {
      args.ids_TK = PaddedIds(context, ids_TK, scratch);
      args.num_selected = shape.num_selected;
    } else {
      SparseAttentionPacks packs = PacksOf(q_THC, ids_TK);
      FillPacks(context, kv_SC, ids_TK.data<int32_t>(), scratch, packs);
      args.ids_TK = scratch.entries_IU.data<int32_t>();
      args.num_selected = packs.Width();
      args.queries_a_pack = packs.queries;
      args.counts_I = packs.counts_I;
    }
    if (!scratch.parts.empty()) args.parts = scratch.parts.data<float>();
    LaunchSparseAttentionForward(args, context.stream());
  }
}

void RunBackwardOnTensorCores(const Context& context, const Tensor& do_THV, const Tensor& q_THC,
                              const Tensor& kv_SC, const SparseAttentionResult& forward,
                              const Tensor& ids_TK, double scale, const Tensor& dq_THC,
                              const Tensor& dkv_SC, const Tensor& target_TK) {
  if constexpr (kHaveCuda) {
    CheckAligned("do_THV", do_THV);
    CheckAligned("q_THC", q_THC);
    CheckAligned("kv_SC", kv_SC);
    CheckAligned("forward.o_THV", forward.o_THV);
    CheckAligned("dkv_SC", dkv_SC);
    const SparseAttentionScratch scratch =
        MakeSparseAttentionBackwardScratch(context, q_THC, kv_SC, ids_TK, do_THV.dim(2));
    const bool padded = !scratch.target_TP.empty();
    const BackwardPlans plans = PlanBackward(q_THC, kv_SC, ids_TK);
    SparseAttentionBackwardArgs args;
    static_cast<SparseAttentionBackwardShape&>(args) = plans.shape;
    args.q_THC = q_THC.raw();
    args.kv_SC = kv_SC.raw();
    args.o_THV = forward.o_THV.raw();
    args.do_THV = do_THV.raw();
    args.lse_TH = forward.lse_TH.data<float>();
    args.ids_TK = PaddedIds(context, ids_TK, scratch);
    args.dq_THC = dq_THC.raw();
    args.dkv_SC = dkv_SC.data<float>();
    args.target_TK = (padded ? scratch.target_TP : target_TK).data<float>();
    args.scale = static_cast<float>(scale);
    if (plans.packs.queries > 1) {
      CheckAligned("ids_TK", ids_TK);
      SparseAttentionPacks packs = BackwardPacksOf(q_THC, ids_TK);
      FillPacks(context, kv_SC, args.ids_TK, scratch, packs);
      args.packs = plans.packs;
      args.entries_IU = scratch.entries_IU.data<int32_t>();
      args.counts_I = packs.counts_I;
      args.choice = scratch.choice.data<int32_t>();
    }
    LaunchSparseAttentionBackward(args, plans.single, scratch.workspace.raw(), context.stream());
    if (!padded) return;
    ResizeListsCuda({.rows = ids_TK.dim(0),
                     .from_width = args.num_selected,
                     .to_width = ids_TK.dim(1),
                     .from = scratch.target_TP.raw(),
                     .to = target_TK.raw()},
                    context.stream());
  }
}

SparseAttentionGeneralArgs GeneralArgs(const Tensor& q_THC, const Tensor& kv_SC,
                                       const Tensor& ids_TK, double scale,
                                       const SparseAttentionResult& result) {
  CHECK_LE(q_THC.dim(2), kSparseAttentionGeneralMaxWidth) << kOp << ": columns of q_THC";
  return {.element = ElementOf(kOp, "q_THC", q_THC),
          .num_rows = q_THC.dim(0),
          .num_keys = kv_SC.dim(0),
          .num_heads = q_THC.dim(1),
          .width = q_THC.dim(2),
          .value_dim = result.o_THV.dim(2),
          .num_slots = ids_TK.dim(1),
          .scale = static_cast<float>(scale),
          .q_THC = q_THC.raw(),
          .kv_SC = kv_SC.raw(),
          .ids_TK = ids_TK.data<int32_t>(),
          .o_THV = result.o_THV.raw(),
          .lse_TH = result.lse_TH.data<float>()};
}

void RunGeneralBackward(const Context& context, const Tensor& do_THV, const Tensor& q_THC,
                        const Tensor& kv_SC, const SparseAttentionResult& forward,
                        const Tensor& ids_TK, double scale, const Tensor& dq_THC,
                        const Tensor& dkv_SC, const Tensor& target_TK) {
  if constexpr (kHaveCuda) {
    const SparseAttentionScratch scratch =
        MakeSparseAttentionBackwardScratch(context, q_THC, kv_SC, ids_TK, do_THV.dim(2));
    SparseAttentionGeneralBackwardCuda(
        {.forward = GeneralArgs(q_THC, kv_SC, ids_TK, scale, forward),
         .do_THV = do_THV.raw(),
         .dq_THC = dq_THC.raw(),
         .dkv_SC = dkv_SC.data<float>(),
         .target_TK = target_TK.data<float>(),
         .contributions = scratch.contributions.data<float>(),
         .sorted_keys = scratch.sorted_keys.data<int32_t>(),
         .sorted_slots = scratch.sorted_slots.data<int32_t>(),
         .offsets = scratch.offsets.data<int32_t>(),
         .sort_workspace = scratch.sort_workspace.data<int32_t>()},
        ChunkSparseAttentionGeneral(q_THC.dim(0), q_THC.dim(2), ids_TK.dim(1)), context.stream());
  }
}

}  // namespace

bool SparseAttentionOnTensorCores(DType dtype, int64_t num_heads, int64_t width, int64_t value_dim,
                                  int64_t num_selected) {
  return dtype == DType::kBF16 && width == 576 && value_dim == 512 && num_heads >= 1 &&
         num_heads <= 128 && num_selected >= 1 && num_selected <= 2048;
}

std::string SparseAttentionKernelName(DType dtype, int64_t num_heads, int64_t width,
                                      int64_t value_dim, int64_t num_selected) {
  if (!SparseAttentionOnTensorCores(dtype, num_heads, width, value_dim, num_selected)) {
    return "general, fp32 arithmetic";
  }
  const std::string text = "bf16 on tensor cores";
  const int packs = SparseAttentionQueriesAPack(std::numeric_limits<int>::max(), num_heads);
  if (packs == 1) return text;
  // What the lists of each call decide.
  const char* backward = packs * num_heads == kPackedRows ? ", backward where it pays" : "";
  return absl::StrCat(text, ", packs of ", packs, " queries", backward);
}

SparseAttentionScratch MakeSparseAttentionScratch(const Context& context, const Tensor& q_THC,
                                                  const Tensor& ids_TK, int64_t value_dim) {
  SparseAttentionScratch scratch;
  if (!OnCuda(context) && !PlansCuda(context, q_THC)) return scratch;
  if (!OnTensorCores(q_THC, ids_TK, value_dim)) return scratch;
  const SparseAttentionPacks packs = PacksOf(q_THC, ids_TK);
  const int64_t part_floats = SparseAttentionForwardPartFloats(PlanSparseAttentionForward(
      SparseAttentionForwardWorks(packs.num_tokens, ToInt("heads", q_THC.dim(1)), packs.queries),
      packs.Width()));
  if (part_floats > 0) scratch.parts = Scratch(context, DType::kF32, {part_floats});
  if (packs.queries == 1) {
    scratch.ids_TP = PaddedIdsScratch(context, ids_TK);
    return scratch;
  }
  scratch.entries_IU = Scratch(context, DType::kI32, {packs.NumPacks(), packs.Width()});
  scratch.counts_I = Scratch(context, DType::kI32, {packs.NumPacks()});
  return scratch;
}

SparseAttentionScratch MakeSparseAttentionBackwardScratch(const Context& context,
                                                          const Tensor& q_THC, const Tensor& kv_SC,
                                                          const Tensor& ids_TK, int64_t value_dim) {
  SparseAttentionScratch scratch;
  if (!OnCuda(context) && !PlansCuda(context, q_THC)) return scratch;
  if (OnTensorCores(q_THC, ids_TK, value_dim)) {
    scratch.ids_TP = PaddedIdsScratch(context, ids_TK);
    const BackwardPlans plans = PlanBackward(q_THC, kv_SC, ids_TK);
    const size_t bytes = SparseAttentionBackwardWorkspace(plans.shape, plans.single, plans.packs);
    if (plans.packs.queries > 1) {
      const SparseAttentionPacks packs = BackwardPacksOf(q_THC, ids_TK);
      scratch.entries_IU = Scratch(context, DType::kI32, {packs.NumPacks(), packs.Width()});
      scratch.counts_I = Scratch(context, DType::kI32, {packs.NumPacks()});
      scratch.choice =
          Scratch(context, DType::kI32, {SparseAttentionBackwardChoiceInts(plans.packs)});
    }
    scratch.workspace = Scratch(context, DType::kI32, {static_cast<int64_t>(bytes / 4)});
    if (!scratch.ids_TP.empty()) {
      scratch.target_TP = Scratch(context, DType::kF32, scratch.ids_TP.shape());
    }
    return scratch;
  }
  const SparseAttentionGeneralChunk chunk =
      ChunkSparseAttentionGeneral(q_THC.dim(0), q_THC.dim(2), ids_TK.dim(1));
  scratch.contributions = Scratch(context, DType::kF32, {chunk.floats});
  scratch.sorted_keys = Scratch(context, DType::kI32, {chunk.slots});
  scratch.sorted_slots = Scratch(context, DType::kI32, {chunk.slots});
  scratch.offsets = Scratch(context, DType::kI32, {kv_SC.dim(0) + 1});
  if (OnCuda(context)) {
    if constexpr (kHaveCuda) {
      scratch.sort_workspace =
          Scratch(context, DType::kI32, {StableSortWorkspaceInts(chunk.slots, kv_SC.dim(0))});
    }
  }
  return scratch;
}

SparseAttentionResult SparseAttentionOnCuda(const Context& context, const Tensor& q_THC,
                                            const Tensor& kv_SC, const Tensor& ids_TK,
                                            int64_t value_dim, double scale) {
  if constexpr (kHaveCuda) {
    const int64_t num_rows = q_THC.dim(0), num_heads = q_THC.dim(1);
    const SparseAttentionResult result = {
        context.Empty(q_THC.dtype(), {num_rows, num_heads, value_dim}),
        context.Empty(DType::kF32, {num_rows, num_heads})};
    if (OnTensorCores(q_THC, ids_TK, value_dim)) {
      RunForwardOnTensorCores(context, q_THC, kv_SC, ids_TK, scale, result);
    } else {
      SparseAttentionGeneralCuda(GeneralArgs(q_THC, kv_SC, ids_TK, scale, result),
                                 context.stream());
    }
    return result;
  }
  NoCudaKernel(kOp);
}

Tensor SparseAttentionBackwardOnCuda(const Context& context, const Tensor& do_THV,
                                     const Tensor& q_THC, const Tensor& kv_SC,
                                     const SparseAttentionResult& forward, const Tensor& ids_TK,
                                     double scale, const Tensor& dkv_SC, const Tensor& target_TK) {
  if constexpr (kHaveCuda) {
    const Tensor dq_THC = context.Empty(q_THC.dtype(), q_THC.shape());
    const auto run =
        OnTensorCores(q_THC, ids_TK, do_THV.dim(2)) ? RunBackwardOnTensorCores : RunGeneralBackward;
    run(context, do_THV, q_THC, kv_SC, forward, ids_TK, scale, dq_THC, dkv_SC, target_TK);
    return dq_THC;
  }
  NoCudaKernel(kOp);
}

}  // namespace baleen
