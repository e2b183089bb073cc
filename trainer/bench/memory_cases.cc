// What only moves bytes in baleen bench ops: norms, rotation, SwiGLU, router, rows to experts and
// back, head's loss, AdamW, casts, quantisation. Bytes: operands read and results written, each
// once.
#include <algorithm>
#include <functional>

#include "absl/strings/str_format.h"
#include "kernels/ops/adamw.h"
#include "kernels/ops/cross_entropy.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/layer_norm.h"
#include "kernels/ops/linear/fp8_quantise.h"
#include "kernels/ops/moe/permute.h"
#include "kernels/ops/moe/router.h"
#include "kernels/ops/moe/weighted_swiglu.h"
#include "kernels/ops/reduce.h"
#include "kernels/ops/rms_norm.h"
#include "kernels/ops/rope.h"
#include "kernels/ops/strided.h"
#include "trainer/bench/op_case.h"
#include "trainer/training_stage.h"

namespace baleen {
namespace {

constexpr double kEps = 1e-6;
constexpr int64_t kHeadRows = 4096;

using Make = std::function<OpCall(OpInputs&)>;

class CaseList {
 public:
  CaseList(const OpSizes& sizes, std::vector<OpCase>& cases) : sizes_(sizes), cases_(cases) {}
  void Add(const std::string& op, const Shape& shape, Make make) {
    cases_.push_back({.op = op,
                      .shape = ShapeString(shape),
                      .kernel = KernelWords(sizes_, ""),
                      .bound = OpBound::kCopy,
                      .rows = shape.front(),
                      .ids = {},
                      .make = std::move(make)});
  }

 private:
  const OpSizes& sizes_;
  std::vector<OpCase>& cases_;
};

OpCall Moves(double bytes, std::function<void()> run) { return {std::move(run), 0, bytes}; }

// --- Norms.

void AddRmsNorm(const std::string& name, int64_t rows, int64_t width, CaseList& list) {
  list.Add(absl::StrCat(name, ".forward"), {rows, width}, [=](OpInputs& in) {
    const Tensor x = in.Normal({rows, width}), weight = in.Normal({width});
    return Moves(2 * BytesOf({x}),
                 [=, &context = in.context()] { RmsNorm(context, x, weight, kEps); });
  });
  list.Add(absl::StrCat(name, ".dgrad"), {rows, width}, [=](OpInputs& in) {
    const Tensor x = in.Normal({rows, width}), dy = in.Normal({rows, width});
    const Tensor weight = in.Normal({width}), rstd = in.Positive({rows}, 1);
    return Moves(3 * BytesOf({x}), [=, &context = in.context()] {
      RmsNormBackwardInput(context, dy, x, weight, rstd);
    });
  });
  list.Add(absl::StrCat(name, ".wgrad"), {rows, width}, [=](OpInputs& in) {
    const Tensor x = in.Normal({rows, width}), dy = in.Normal({rows, width});
    const Tensor rstd = in.Positive({rows}, 1), dw = in.ZeroStatistics({width});
    return Moves(2 * BytesOf({x}),
                 [=, &context = in.context()] { RmsNormBackwardWeight(context, dy, x, rstd, dw); });
  });
}

void AddLayerNorm(const OpSizes& z, CaseList& list) {
  const int64_t rows = z.rows, width = z.model.index_head_dim;
  list.Add("layer_norm.forward", {rows, width}, [=](OpInputs& in) {
    const Tensor x = in.Normal({rows, width}), w = in.Normal({width}), b = in.Normal({width});
    return Moves(2 * BytesOf({x}),
                 [=, &context = in.context()] { LayerNorm(context, x, w, b, kEps); });
  });
  list.Add("layer_norm.dgrad", {rows, width}, [=](OpInputs& in) {
    const Tensor x = in.Normal({rows, width}), dy = in.Normal({rows, width});
    const Tensor w = in.Normal({width});
    const Tensor mean = in.ZeroStatistics({rows}), rstd = in.Positive({rows}, 1);
    return Moves(3 * BytesOf({x}), [=, &context = in.context()] {
      LayerNormBackwardInput(context, dy, x, w, mean, rstd);
    });
  });
}

// --- Between the products of a block.

void AddRope(const OpSizes& z, CaseList& list) {
  const int64_t rows = z.group_rows, heads = z.heads, width = z.model.qk_head_dim();
  const int64_t nope = z.model.qk_nope_head_dim, rope = z.model.qk_rope_head_dim;
  const Make make = [=](OpInputs& in) {
    const Tensor q = in.Normal({rows, heads, width});
    const RopeTable table = MakeModelRope(in.context(), z.model, in.dtype(), rows);
    std::vector<int32_t> numbers(rows);
    for (int64_t t = 0; t < rows; ++t) numbers[t] = static_cast<int32_t>(t);
    const Tensor positions = in.Integers(numbers);
    const double rotated = static_cast<double>(rows * heads * rope * DTypeBytes(in.dtype()));
    return Moves(2 * rotated + BytesOf({table.cos, table.sin}), [=, &context = in.context()] {
      ApplyRope(context, PerHead(q).Columns(nope, rope), positions, table, RopeLayout::kInterleaved,
                RopeDirection::kForward);
    });
  };
  list.Add("rope.query", {rows, heads, rope}, make);
}

// Of the experts' rows, with their routing weights.
void AddSwiglu(const OpSizes& z, CaseList& list) {
  const int64_t rows = z.expert_rows, width = z.model.moe_intermediate_size;
  list.Add("swiglu.forward", {rows, width}, [=](OpInputs& in) {
    const Tensor gate = in.Normal({rows, width}), up = in.Normal({rows, width});
    const Tensor weights = in.Positive({rows}, 0.1);
    return Moves(3 * BytesOf({gate}),
                 [=, &context = in.context()] { WeightedSwiglu(context, gate, up, weights); });
  });
  list.Add("swiglu.backward", {rows, width}, [=](OpInputs& in) {
    const Tensor gate = in.Normal({rows, width}), up = in.Normal({rows, width});
    const Tensor dy = in.Normal({rows, width}), weights = in.Positive({rows}, 0.1);
    return Moves(5 * BytesOf({gate}), [=, &context = in.context()] {
      WeightedSwigluBackward(context, dy, gate, up, weights);
    });
  });
}

void AddMoves(const OpSizes& z, CaseList& list) {
  const int64_t rows = z.group_rows, D = z.model.hidden_size, heads = z.heads;
  // What a copy reaches that is no larger than the ops here.
  for (const auto& [name, width] :
       {std::pair("copy.hidden", D), std::pair("copy.latents", z.model.q_lora_rank)}) {
    list.Add(name, {rows, width}, [=, width = width](OpInputs& in) {
      const Tensor from = in.Normal({rows, width}), to = in.Normal({rows, width});
      return Moves(2 * BytesOf({to}), [=, &context = in.context()] { Copy(context, from, to); });
    });
  }
  list.Add("add_in_place", {rows, D}, [=](OpInputs& in) {
    const Tensor a = in.Normal({rows, D}), b = in.Normal({rows, D});
    return Moves(3 * BytesOf({a}), [=, &context = in.context()] { AddInPlace(context, a, b); });
  });
  const int64_t nope = z.model.qk_nope_head_dim, value = z.model.v_head_dim;
  list.Add("copy_view.value", {rows, heads, value}, [=](OpInputs& in) {
    const Tensor kv = in.Normal({rows, heads, nope + value});
    const Tensor v = in.Normal({rows, heads, value});
    return Moves(2 * BytesOf({v}), [=, &context = in.context()] {
      CopyView(context, PerHead(kv).Columns(nope, value), PerHead(v));
    });
  });
  const int64_t width = z.model.qk_head_dim();
  list.Add("cast.sums_to_activations", {rows, heads, width}, [=](OpInputs& in) {
    const Tensor sums = in.NormalStatistics({rows, heads, width});
    const DType to = in.dtype() == DType::kF32 ? DType::kBF16 : in.dtype();
    return Moves(static_cast<double>(sums.bytes() + sums.num_elements() * DTypeBytes(to)),
                 [=, &context = in.context()] { Cast(context, sums, to); });
  });
}

void AddQuantise(const OpSizes& z, CaseList& list) {
  const int64_t rows = z.rows, D = z.model.hidden_size, inner = z.model.moe_intermediate_size;
  const auto codes = [](const Tensor& x) {
    const auto count = static_cast<double>(x.num_elements());
    return BytesOf({x}) + count + count / kFp8Depth * 4;
  };
  list.Add("fp8_quantise.rows", {rows, D}, [=](OpInputs& in) {
    const Tensor x = in.Normal({rows, D});
    return Moves(codes(x), [=, &context = in.context()] { QuantiseRows(context, x); });
  });
  list.Add("fp8_quantise.columns", {rows, D}, [=](OpInputs& in) {
    const Tensor x = in.Normal({rows, D});
    return Moves(codes(x), [=, &context = in.context()] { QuantiseColumns(context, x); });
  });
  const Shape experts = {z.experts, inner, D};
  list.Add("fp8_quantise.experts", experts, [=](OpInputs& in) {
    const Tensor w = in.Weight(experts, D);
    return Moves(BytesOf({w}) + static_cast<double>(w.num_elements()),
                 [=, &context = in.context()] { QuantiseWeight(context, w, Fp8Side::kColumns); });
  });
}

// --- Router and rows to experts.

void AddRouter(const OpSizes& z, CaseList& list) {
  const int64_t rows = z.rows, E = z.model.n_routed_experts, A = z.model.num_experts_per_tok;
  const RouterParams params{.n_group = z.model.n_group,
                            .topk_group = z.model.topk_group,
                            .num_experts_per_tok = A,
                            .routed_scaling_factor = z.model.routed_scaling_factor,
                            .norm_topk_prob = z.model.norm_topk_prob};
  list.Add("router.forward", {rows, E}, [=](OpInputs& in) {
    const Tensor logits = in.NormalStatistics({rows, E}), bias = in.ZeroStatistics({E});
    return Moves(2 * BytesOf({logits}) + 8.0 * static_cast<double>(rows * A),
                 [=, &context = in.context()] { Route(context, logits, bias, params); });
  });
  list.Add("router.backward", {rows, E}, [=](OpInputs& in) {
    const Tensor logits = in.NormalStatistics({rows, E}), bias = in.ZeroStatistics({E});
    const RouterResult forward = Route(in.context(), logits, bias, params);
    const Tensor dweights = in.NormalStatistics({rows, A});
    return Moves(2 * BytesOf({logits}) + 12.0 * static_cast<double>(rows * A),
                 [=, &context = in.context()] {
                   RouteBackward(context, dweights, Tensor(), forward, params);
                 });
  });
}

// Every token goes to A of the local experts in turn.
Tensor BalancedIds(OpInputs& in, int64_t rows, int64_t slots, int64_t experts) {
  std::vector<int32_t> ids(rows * slots);
  for (int64_t t = 0; t < rows; ++t) {
    for (int64_t a = 0; a < slots; ++a)
      ids[t * slots + a] = static_cast<int32_t>((t + a) % experts);
  }
  return in.Integers(ids).Reshaped({rows, slots});
}

void AddPermute(const OpSizes& z, CaseList& list) {
  const int64_t rows = z.rows, A = z.model.num_experts_per_tok, L = z.experts;
  const int64_t D = z.model.hidden_size, N = rows * A;
  const auto build = [=](OpInputs& in) {
    return BuildPermutation(in.context(), BalancedIds(in, rows, A, L), 0, L, N);
  };
  list.Add("permute.build", {rows, A}, [=](OpInputs& in) {
    const Tensor ids = BalancedIds(in, rows, A, L);
    return Moves(3 * BytesOf({ids}),
                 [=, &context = in.context()] { BuildPermutation(context, ids, 0, L, N); });
  });
  list.Add("permute.dispatch", {N, D}, [=](OpInputs& in) {
    const Permutation p = build(in);
    const Tensor x = in.Normal({rows, D});
    return Moves(static_cast<double>(A + 1) * BytesOf({x}),
                 [=, &context = in.context()] { GatherRows(context, x, p); });
  });
  list.Add("permute.combine", {N, D}, [=](OpInputs& in) {
    const Permutation p = build(in);
    const Tensor dy = in.Normal({N, D});
    return Moves(BytesOf({dy}) * (1 + 1.0 / static_cast<double>(A)), [=, &context = in.context()] {
      GatherRowsBackward(context, dy, p.row_of_slot_TA);
    });
  });
}

// --- The ends of the model, and the optimizer.

void AddEnds(const OpSizes& z, CaseList& list) {
  const int64_t D = z.model.hidden_size, W = z.vocab, rows = z.group_rows;
  const int64_t head_rows = std::min(rows, kHeadRows);
  const auto tokens = [=](OpInputs& in, int64_t count) {
    std::vector<int32_t> ids(count);
    for (int64_t t = 0; t < count; ++t) ids[t] = static_cast<int32_t>(t * 7919 % W);
    return in.Integers(ids);
  };
  list.Add("cross_entropy.statistics", {head_rows, W}, [=](OpInputs& in) {
    const Tensor logits = in.Normal({head_rows, W}), targets = tokens(in, head_rows);
    return Moves(BytesOf({logits}), [=, &context = in.context()] {
      CrossEntropyLocalStats(context, logits, targets, 0);
    });
  });
  list.Add("cross_entropy.gradient", {head_rows, W}, [=](OpInputs& in) {
    const Tensor logits = in.Normal({head_rows, W}), targets = tokens(in, head_rows);
    const CrossEntropyStats stats = CrossEntropyLocalStats(in.context(), logits, targets, 0);
    return Moves(2 * BytesOf({logits}), [=, &context = in.context()] {
      CrossEntropyBackwardInPlace(context, logits, targets, stats, 0, 1e-4);
    });
  });
  list.Add("embedding.forward", {rows, D}, [=](OpInputs& in) {
    const Tensor ids = tokens(in, rows), table = in.Weight({W, D}, D);
    return Moves(2.0 * static_cast<double>(rows * D * DTypeBytes(in.dtype())),
                 [=, &context = in.context()] { EmbeddingLookup(context, ids, table, 0); });
  });
  list.Add("embedding.wgrad", {rows, D}, [=](OpInputs& in) {
    const Tensor ids = tokens(in, rows), dy = in.Normal({rows, D});
    const Tensor dtable = in.ZeroStatistics({W, D});
    const double touched = static_cast<double>(std::min(rows, W) * D * 4);
    return Moves(BytesOf({dy}) + 2 * touched,
                 [=, &context = in.context()] { EmbeddingBackward(context, ids, dy, dtable, 0); });
  });
}

void AddOptimizer(const OpSizes& z, CaseList& list) {
  const int64_t count = z.cuda ? int64_t{128} << 20 : int64_t{1} << 18;
  list.Add("sum_of_squares", {count}, [=](OpInputs& in) {
    const Tensor x = in.NormalStatistics({count});
    const Tensor sum = in.context().Zeros(DType::kF64, {1});
    return Moves(BytesOf({x}), [=, &context = in.context()] { AddSumOfSquares(context, x, sum); });
  });
  list.Add("adamw", {count}, [=](OpInputs& in) {
    const Context& context = in.context();
    const DType statistics = StatisticsOf(in.dtype());
    const DType moments = z.bf16_moments ? DType::kBF16 : statistics;
    const auto zeros = [&] { return context.Zeros(moments, {count}); };
    AdamwTensors x{.param = in.NormalStatistics({count}),
                   .grad = in.NormalStatistics({count}),
                   .m = zeros(),
                   .v = zeros()};
    if (in.dtype() == DType::kBF16) x.working = in.Normal({count});
    Tensor control = in.Positive({2}, 1);
    FillZero(context, control.Rows(1, 2));  // no skip
    const AdamwParams params{.lr = 1e-5, .weight_decay = 0.1};
    return Moves(BytesOf({x.param, x.param, x.grad, x.m, x.m, x.v, x.v, x.working}),
                 [=, &context] { AdamwUpdate(context, params, x, control); });
  });
}

}  // namespace

void AddMemoryCases(const OpSizes& sizes, std::vector<OpCase>& cases) {
  CaseList list(sizes, cases);
  AddRmsNorm("rms_norm", sizes.rows, sizes.model.hidden_size, list);
  AddRmsNorm("rms_norm_q", sizes.rows, sizes.model.q_lora_rank, list);
  AddLayerNorm(sizes, list);
  AddRope(sizes, list);
  AddSwiglu(sizes, list);
  AddMoves(sizes, list);
  AddRouter(sizes, list);
  AddPermute(sizes, list);
  if (Fp8Operands(sizes.dtype, sizes.cuda)) AddQuantise(sizes, list);
  AddEnds(sizes, list);
  AddOptimizer(sizes, list);
}

}  // namespace baleen
