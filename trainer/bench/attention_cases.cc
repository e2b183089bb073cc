// Attention of baleen bench ops.
//
// FLOP are those of the formula's products: sparse 2 T H K (C + V) forward and 2 T H K (3 C + 2 V)
// backward for lists of K keys, dense 2 P H (Q + V) and 2 P H (3 Q + 2 V) for P pairs of the causal
// windows, whatever of them a selection leaves. A backward's call zeroes the gradients of keys that
// it adds to.
#include <algorithm>

#include "absl/strings/str_format.h"
#include "kernels/ops/attention/attention.h"
#include "kernels/ops/attention/sparse_attention.h"
#include "kernels/ops/elementwise.h"
#include "trainer/bench/op_case.h"

namespace baleen {
namespace {

// The main attention at T rows, S keys and H heads.
struct Problem {
  int64_t T = 0, S = 0, H = 0, K = 0;
  std::optional<BenchIds> ids;
};

std::string ShapeText(const Problem& p) {
  std::string text = absl::StrFormat("%d x %d, %d heads", p.T, p.S, p.H);
  if (p.ids) absl::StrAppendFormat(&text, ", %d %s", p.K, Name(*p.ids));
  return text;
}

OpCase CaseOf(const std::string& op, const Problem& p, const std::string& kernel) {
  return {.op = op,
          .shape = ShapeText(p),
          .kernel = kernel,
          .bound = OpBound::kMatmul,
          .rows = p.T,
          .heads = p.H,
          .keys = p.S,
          .ids = p.ids,
          .make = nullptr};
}

// Pairs of the last T rows of S and the keys up to each.
double CausalPairs(int64_t T, int64_t S) {
  const auto rows = static_cast<double>(T), keys = static_cast<double>(S);
  return rows * (keys - rows) + rows * (rows + 1) / 2;
}

// --- Sparse.

struct SparseOperands {
  Tensor q_THC, kv_SC, ids_TK;
  double flops = 0;  // of a product of width 1
};

SparseOperands MakeSparseOperands(OpInputs& in, const ModelConfig& model, const Problem& p) {
  return {in.Normal({p.T, p.H, model.latent_dim()}), in.Normal({p.S, model.latent_dim()}),
          in.Ids(*p.ids, p.T, p.S, p.K, /*causal=*/false),
          2.0 * static_cast<double>(p.T * p.H) * static_cast<double>(std::min(p.K, p.S))};
}

OpCall SparseForward(OpInputs& in, const ModelConfig& model, const Problem& p) {
  const SparseOperands x = MakeSparseOperands(in, model, p);
  const int64_t V = model.kv_lora_rank;
  const double scale = model.softmax_scale();
  const Context& context = in.context();
  const double result =
      static_cast<double>(p.T * p.H) * static_cast<double>(V * DTypeBytes(in.dtype()) + 4);
  return {[=, &context] { SparseAttention(context, x.q_THC, x.kv_SC, x.ids_TK, V, scale); },
          x.flops * static_cast<double>(model.latent_dim() + V),
          BytesOf({x.q_THC, x.kv_SC, x.ids_TK}) + result};
}

OpCall SparseBackward(OpInputs& in, const ModelConfig& model, const Problem& p) {
  const SparseOperands x = MakeSparseOperands(in, model, p);
  const int64_t V = model.kv_lora_rank;
  const double scale = model.softmax_scale();
  const Context& context = in.context();
  const SparseAttentionResult forward =
      SparseAttention(context, x.q_THC, x.kv_SC, x.ids_TK, V, scale);
  const Tensor do_THV = in.Normal({p.T, p.H, V});
  const Tensor dkv_SC = in.ZeroStatistics(x.kv_SC.shape());
  const Tensor target_TK = in.ZeroStatistics({p.T, p.K});
  return {[=, &context] {
            FillZero(context, dkv_SC);
            SparseAttentionBackward(context, do_THV, x.q_THC, x.kv_SC, forward, x.ids_TK, scale,
                                    dkv_SC, target_TK);
          },
          x.flops * static_cast<double>(3 * model.latent_dim() + 2 * V),
          BytesOf({do_THV, x.q_THC, x.q_THC, x.kv_SC, forward.o_THV, forward.lse_TH, x.ids_TK,
                   dkv_SC, target_TK})};
}

// --- Dense 192/128, over windows, or over lists of keys as a mask.

struct DenseOperands {
  Tensor q_THQ, k_SHQ, v_SHV, ids_TK;
  KeyWindows windows;
  double flops = 0;  // of a product of width 1
};

DenseOperands MakeDenseOperands(OpInputs& in, const ModelConfig& model, const Problem& p) {
  return {in.Normal({p.T, p.H, model.qk_head_dim()}),
          in.Normal({p.S, p.H, model.qk_head_dim()}),
          in.Normal({p.S, p.H, model.v_head_dim}),
          p.ids ? in.Ids(*p.ids, p.T, p.S, p.K, /*causal=*/true) : Tensor(),
          in.Windows(p.T, p.S, /*causal=*/true),
          2.0 * static_cast<double>(p.H) * CausalPairs(p.T, p.S)};
}

AttentionResult Forward(const Context& context, const DenseOperands& x, double scale) {
  return x.ids_TK.empty() ? Attention(context, x.q_THQ, x.k_SHQ, x.v_SHV, x.windows, scale)
                          : MaskedAttention(context, x.q_THQ, x.k_SHQ, x.v_SHV, x.ids_TK, scale);
}

std::string Words(OpInputs& in, const ModelConfig& model, const DenseOperands& x) {
  if (!x.ids_TK.empty()) return "";
  return AttentionKernelName(in.context(), in.dtype(), model.qk_head_dim(), model.v_head_dim,
                             x.windows);
}

OpCall DenseForward(OpInputs& in, const ModelConfig& model, const Problem& p) {
  const DenseOperands x = MakeDenseOperands(in, model, p);
  const double scale = model.softmax_scale();
  const Context& context = in.context();
  const double result = static_cast<double>(p.T * p.H) *
                        static_cast<double>(model.v_head_dim * DTypeBytes(in.dtype()) + 4);
  return {[=, &context] { Forward(context, x, scale); },
          x.flops * static_cast<double>(model.qk_head_dim() + model.v_head_dim),
          BytesOf({x.q_THQ, x.k_SHQ, x.v_SHV, x.ids_TK}) + result, Words(in, model, x)};
}

OpCall DenseBackward(OpInputs& in, const ModelConfig& model, const Problem& p) {
  const DenseOperands x = MakeDenseOperands(in, model, p);
  const double scale = model.softmax_scale();
  const Context& context = in.context();
  const AttentionResult forward = Forward(context, x, scale);
  const Tensor do_THV = in.Normal({p.T, p.H, model.v_head_dim});
  // As in the model: gradients of keys are fp32 sums, unless one call has all rows.
  const bool whole = p.T == p.S && in.dtype() == DType::kBF16;
  const auto gradient = [&](const Shape& shape) {
    return whole ? in.Normal(shape) : in.ZeroStatistics(shape);
  };
  const Tensor dk = gradient(x.k_SHQ.shape()), dv = gradient(x.v_SHV.shape());
  const Tensor target_TK = p.ids ? in.ZeroStatistics({p.T, p.K}) : Tensor();
  return {[=, &context] {
            if (!whole) {
              FillZero(context, dk);
              FillZero(context, dv);
            }
            if (x.ids_TK.empty()) {
              AttentionBackward(context, do_THV, x.q_THQ, x.k_SHQ, x.v_SHV, forward, x.windows,
                                scale, dk, dv);
            } else {
              MaskedAttentionBackward(context, do_THV, x.q_THQ, x.k_SHQ, x.v_SHV, forward, x.ids_TK,
                                      scale, dk, dv, target_TK);
            }
          },
          x.flops * static_cast<double>(3 * model.qk_head_dim() + 2 * model.v_head_dim),
          BytesOf({do_THV, x.q_THQ, x.q_THQ, x.k_SHQ, x.v_SHV, forward.o_THV, forward.lse_TH,
                   x.ids_TK, dk, dv, target_TK}),
          Words(in, model, x)};
}

using Make = OpCall (*)(OpInputs&, const ModelConfig&, const Problem&);

void Add(const std::string& op, const Problem& p, const std::string& kernel,
         const ModelConfig& model, Make make, std::vector<OpCase>& cases) {
  OpCase added = CaseOf(op, p, kernel);
  added.make = [=](OpInputs& in) { return make(in, model, p); };
  cases.push_back(std::move(added));
}

}  // namespace

void AddSparseAttentionCases(const OpSizes& sizes, const OpRequest& request,
                             std::vector<OpCase>& cases) {
  const ModelConfig& model = sizes.model;
  const auto add = [&](const std::string& op, Make make) {
    for (const int64_t H : request.heads) {
      const std::string kernel =
          KernelWords(sizes, SparseAttentionKernelName(sizes.dtype, H, model.latent_dim(),
                                                       model.kv_lora_rank, model.index_topk));
      for (const int64_t S : request.tokens) {
        for (const BenchIds ids : request.ids) {
          const int64_t T = std::min(request.query_rows, S);
          Add(op, {T, S, H, model.index_topk, ids}, kernel, model, make, cases);
        }
      }
    }
  };
  add("sparse_attention.forward", &SparseForward);
  add("sparse_attention.backward", &SparseBackward);
}

void AddDenseAttentionCases(const OpSizes& sizes, const OpRequest& request,
                            std::vector<OpCase>& cases) {
  const ModelConfig& model = sizes.model;
  const std::string masked = KernelWords(
      sizes, MaskedAttentionKernelName(sizes.dtype, model.qk_head_dim(), model.v_head_dim));
  const auto add = [&](const std::string& op, bool selected, Make make) {
    for (const int64_t H : request.heads) {
      for (const int64_t S : request.tokens) {
        Problem p{S <= kMostWholeRows ? S : std::min(request.query_rows, S), S, H, 0, {}};
        if (!selected) {
          Add(op, p, "", model, make, cases);
          continue;
        }
        p.K = model.index_topk;
        for (const BenchIds ids : request.ids) {
          p.ids = ids;
          Add(op, p, masked, model, make, cases);
        }
      }
    }
  };
  add("attention.forward", false, &DenseForward);
  add("attention.backward", false, &DenseBackward);
  add("masked_attention.forward", true, &DenseForward);
  add("masked_attention.backward", true, &DenseBackward);
}

}  // namespace baleen
