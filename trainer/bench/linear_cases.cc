// Products of baleen bench ops: the model's linear layers and its experts, forward, gradient of the
// input and gradient of the weight in fp32 (a step's first is written, the next ones are added to
// it); and the same in block FP8 where the model takes it (trainer/model/linear.h), quantisation
// included.
#include <algorithm>

#include "absl/strings/str_format.h"
#include "kernels/ops/linear/fp8_linear.h"
#include "kernels/ops/linear/grouped_matmul.h"
#include "kernels/ops/linear/matmul.h"
#include "trainer/bench/op_case.h"

namespace baleen {
namespace {

enum class Pass : uint8_t { kForward, kInput, kWeight, kFirstWeight };
constexpr Pass kPasses[] = {Pass::kForward, Pass::kInput, Pass::kWeight, Pass::kFirstWeight};
const char* Name(Pass pass) {
  switch (pass) {
    case Pass::kForward:
      return "forward";
    case Pass::kInput:
      return "dgrad";
    case Pass::kWeight:
      return "wgrad";
    case Pass::kFirstWeight:
      return "wgrad_first";
  }
  return "";
}
bool OfWeight(Pass pass) { return pass == Pass::kWeight || pass == Pass::kFirstWeight; }
Accumulate AccumulateOf(Pass pass) {
  return pass == Pass::kWeight ? Accumulate::kAdd : Accumulate::kOverwrite;
}

struct Layer {
  std::string name;
  int64_t rows = 0, in = 0, out = 0;
  bool statistics = false;  // y in fp32: what follows compares or exponentiates it
  bool fp8 = false;         // in block FP8 where precision.gemm asks for it
};

// Rows that the head takes at once, as trainer/recipe.cc has it.
constexpr int64_t kHeadRows = 4096;

std::vector<Layer> LayersOf(const OpSizes& z) {
  const ModelConfig& m = z.model;
  const int64_t D = m.hidden_size, R = z.rows, G = z.group_rows;
  return {
      {"q_a", R, D, m.q_lora_rank, false, true},
      {"kv_a", R, D, m.latent_dim(), false, true},
      {"q_b", G, m.q_lora_rank, z.heads * m.qk_head_dim(), false, true},
      {"kv_b", z.keys, m.kv_lora_rank, z.heads * (m.qk_nope_head_dim + m.v_head_dim), false, true},
      {"o", G, z.heads * m.v_head_dim, D, false, true},
      {"mlp_gate", G, D, z.intermediate, false, true},
      {"mlp_down", G, z.intermediate, D, false, true},
      {"shared_gate", G, D, z.shared_intermediate, false, true},
      {"shared_down", G, z.shared_intermediate, D, false, true},
      {"head", std::min(G, kHeadRows), D, z.vocab, false, false},
      {"router", R, D, m.n_routed_experts, true, false},
      {"index_q", R, m.q_lora_rank, m.index_n_heads * m.index_head_dim, false, false},
      {"index_k", R, D, m.index_head_dim, false, false},
      {"index_w", R, D, m.index_n_heads, true, false},
  };
}

double ProductFlops(const Layer& layer) {
  return 2.0 * static_cast<double>(layer.rows) * static_cast<double>(layer.in) *
         static_cast<double>(layer.out);
}

// y, dx or dW (read, if added to, and written) in fp32.
double SumBytes(const Layer& layer, Pass pass, int64_t element) {
  const auto rows = static_cast<double>(layer.rows), out = static_cast<double>(layer.out);
  const auto in = static_cast<double>(layer.in);
  if (pass == Pass::kForward) return rows * out * (layer.statistics ? 4.0 : element);
  if (pass == Pass::kInput) return rows * in * static_cast<double>(element);
  return (pass == Pass::kWeight ? 8 : 4) * in * out;
}

OpCall LinearCall(OpInputs& in, const Layer& layer, Pass pass) {
  const Context& context = in.context();
  const Tensor x = in.Normal({layer.rows, layer.in});
  const double flops = ProductFlops(layer);
  const double written = SumBytes(layer, pass, DTypeBytes(in.dtype()));
  if (pass == Pass::kForward) {
    const Tensor w = in.Weight({layer.out, layer.in}, layer.in);
    const bool statistics = layer.statistics;
    return {
        [=, &context] { statistics ? LinearToStatistics(context, x, w) : Linear(context, x, w); },
        flops, BytesOf({x, w}) + written};
  }
  const Tensor dy = in.Normal({layer.rows, layer.out});
  if (pass == Pass::kInput) {
    const Tensor w = in.Weight({layer.out, layer.in}, layer.in);
    return {[=, &context] { LinearBackwardInput(context, dy, w); }, flops,
            BytesOf({dy, w}) + written};
  }
  const Tensor dw = in.ZeroStatistics({layer.out, layer.in});
  return {[=, &context] { LinearBackwardWeight(context, dy, x, dw, AccumulateOf(pass)); }, flops,
          BytesOf({dy, x}) + written};
}

OpCall Fp8LinearCall(OpInputs& in, const Layer& layer, Pass pass) {
  const Context& context = in.context();
  const Tensor x = in.Normal({layer.rows, pass == Pass::kInput ? layer.out : layer.in});
  const double flops = ProductFlops(layer);
  const double written = SumBytes(layer, pass, DTypeBytes(in.dtype()));
  if (OfWeight(pass)) {
    const Tensor dy = in.Normal({layer.rows, layer.out});
    const Tensor dw = in.ZeroStatistics({layer.out, layer.in});
    return {[=, &context] { Fp8LinearBackwardWeight(context, dy, x, dw, AccumulateOf(pass)); },
            flops, BytesOf({dy, x}) + written};
  }
  const Tensor w = in.Weight({layer.out, layer.in}, layer.in);
  const bool forward = pass == Pass::kForward;
  return {
      [=, &context] { forward ? Fp8Linear(context, x, w) : Fp8LinearBackwardInput(context, x, w); },
      flops, BytesOf({x, w}) + written};
}

// --- Between a head's 128 columns and the latent's 512, a product a head over strided views.

OpCall AbsorbCall(OpInputs& in, const OpSizes& z, int64_t rows, bool query) {
  const Context& context = in.context();
  const int64_t nope = z.model.qk_nope_head_dim, value = z.model.v_head_dim;
  const int64_t latent = z.model.kv_lora_rank, width = query ? nope : value;
  const Tensor kv_b = in.Weight({z.heads, nope + value, latent}, latent);
  const MatrixView up =
      query ? AsBatch(kv_b).RowRange(0, nope) : AsBatch(kv_b).RowRange(nope, nope + value);
  const Tensor head = in.Normal({rows, z.heads, query ? z.model.qk_head_dim() : value});
  const Tensor absorbed = in.Normal({rows, z.heads, query ? z.model.latent_dim() : latent});
  const MatrixView narrow = PerHead(head).Columns(0, width);
  const MatrixView wide = PerHead(absorbed).Columns(0, latent);
  const auto entries = static_cast<double>(rows * z.heads);
  const auto columns = static_cast<double>(latent + width);
  return {[=, &context] {
            if (query) {
              Matmul(context, narrow, Transpose::kNo, up, Transpose::kNo, wide);
            } else {
              Matmul(context, wide, Transpose::kNo, up, Transpose::kYes, narrow);
            }
          },
          2 * entries * static_cast<double>(latent) * static_cast<double>(width),
          (entries * columns + static_cast<double>(z.heads * latent * width)) *
              static_cast<double>(DTypeBytes(in.dtype()))};
}

// --- Experts: rows sorted by expert, equally many each.

Tensor EqualOffsets(OpInputs& in, int64_t experts, int64_t rows) {
  std::vector<int32_t> offsets;
  for (int64_t expert = 0; expert <= experts; ++expert)
    offsets.push_back(static_cast<int32_t>(rows / experts * expert));
  return in.Integers(offsets);
}

OpCall GroupedCall(OpInputs& in, const Layer& layer, int64_t experts, Pass pass, bool fp8) {
  const Context& context = in.context();
  const Tensor offsets = EqualOffsets(in, experts, layer.rows);
  const double flops = ProductFlops(layer);
  const Shape weights = {experts, layer.out, layer.in};
  const bool forward = pass == Pass::kForward;
  const int64_t element = DTypeBytes(in.dtype());
  if (OfWeight(pass)) {
    const Tensor dy = in.Normal({layer.rows, layer.out}), x = in.Normal({layer.rows, layer.in});
    const Tensor dw = in.ZeroStatistics(weights);
    return {[=, &context] {
              GroupedLinearBackwardWeight(context, dy, x, offsets, dw, AccumulateOf(pass));
            },
            flops,
            BytesOf({dy, x}) + static_cast<double>(experts) * SumBytes(layer, pass, element)};
  }
  const Tensor x = in.Normal({layer.rows, forward ? layer.in : layer.out});
  const Tensor w = in.Weight(weights, layer.in);
  return {[=, &context] {
            if (fp8) {
              forward ? Fp8GroupedLinear(context, x, w, offsets)
                      : Fp8GroupedLinearBackwardInput(context, x, w, offsets);
            } else {
              forward ? GroupedLinear(context, x, w, offsets)
                      : GroupedLinearBackwardInput(context, x, w, offsets);
            }
          },
          flops, BytesOf({x, w}) + SumBytes(layer, pass, element)};
}

// dx of the rows that gate and up share.
OpCall SharedInputCall(OpInputs& in, const Layer& layer, int64_t experts) {
  const Context& context = in.context();
  const Tensor offsets = EqualOffsets(in, experts, layer.rows);
  const Shape weights = {experts, layer.out, layer.in};
  const Tensor dgate = in.Normal({layer.rows, layer.out}), dup = in.Normal({layer.rows, layer.out});
  const Tensor gate = in.Weight(weights, layer.in), up = in.Weight(weights, layer.in);
  return {
      [=, &context] { GroupedLinearBackwardInputOfTwo(context, dgate, gate, dup, up, offsets); },
      2 * ProductFlops(layer),
      BytesOf({dgate, dup, gate, up}) + SumBytes(layer, Pass::kInput, DTypeBytes(in.dtype()))};
}

std::string ShapeText(const Layer& layer) {
  return absl::StrFormat("%d x %d -> %d", layer.rows, layer.in, layer.out);
}

}  // namespace

void AddLinearCases(const OpSizes& sizes, const OpRequest& request, std::vector<OpCase>& cases) {
  for (const bool fp8 : {false, true}) {
    if (fp8 && !Fp8Operands(sizes.dtype, sizes.cuda)) continue;
    for (const Layer& layer : LayersOf(sizes)) {
      if (fp8 && !(layer.fp8 && Fp8Fits(layer.out, layer.in))) continue;
      for (const Pass pass : kPasses) {
        cases.push_back({.op = absl::StrCat(fp8 ? "fp8." : "gemm.", layer.name, ".", Name(pass)),
                         .shape = ShapeText(layer),
                         .kernel = KernelWords(sizes, ""),
                         .bound = fp8 ? OpBound::kFp8Matmul : OpBound::kMatmul,
                         .rows = layer.rows,
                         .ids = {},
                         .make = [=](OpInputs& in) {
                           return fp8 ? Fp8LinearCall(in, layer, pass)
                                      : LinearCall(in, layer, pass);
                         }});
      }
    }
  }
  const int64_t rows = std::min(request.query_rows, sizes.group_rows);
  for (const bool query : {true, false}) {
    cases.push_back({.op = query ? "gemm.absorb_query" : "gemm.absorb_value",
                     .shape = absl::StrFormat("%d rows, %d heads", rows, sizes.heads),
                     .kernel = KernelWords(sizes, ""),
                     .bound = OpBound::kMatmul,
                     .rows = rows,
                     .ids = {},
                     .make = [=](OpInputs& in) { return AbsorbCall(in, sizes, rows, query); }});
  }
}

void AddExpertCases(const OpSizes& sizes, std::vector<OpCase>& cases) {
  const int64_t inner = sizes.model.moe_intermediate_size, D = sizes.model.hidden_size;
  const int64_t experts = sizes.experts;
  const int64_t rows = sizes.expert_rows / experts * experts;
  const Layer layers[] = {{"gate", rows, D, inner}, {"down", rows, inner, D}};
  cases.push_back(
      {.op = "grouped.gate_up.dgrad",
       .shape = absl::StrFormat("%d experts, %d x %d -> 2 x %d", experts, rows, D, inner),
       .kernel = KernelWords(sizes, ""),
       .bound = OpBound::kMatmul,
       .rows = rows,
       .ids = {},
       .make = [=, layer = layers[0]](OpInputs& in) {
         return SharedInputCall(in, layer, experts);
       }});
  for (const bool fp8 : {false, true}) {
    if (fp8 && !Fp8Operands(sizes.dtype, sizes.cuda)) continue;
    for (const Layer& layer : layers) {
      if (fp8 && !Fp8Fits(layer.out, layer.in)) continue;
      for (const Pass pass : kPasses) {
        if (fp8 && OfWeight(pass)) continue;  // stays in the activations' dtype
        cases.push_back(
            {.op = absl::StrCat(fp8 ? "grouped_fp8." : "grouped.", layer.name, ".", Name(pass)),
             .shape = absl::StrFormat("%d experts, %s", experts, ShapeText(layer)),
             .kernel = KernelWords(sizes, ""),
             .bound = fp8 ? OpBound::kFp8Matmul : OpBound::kMatmul,
             .rows = rows,
             .ids = {},
             .make = [=](OpInputs& in) { return GroupedCall(in, layer, experts, pass, fp8); }});
      }
    }
  }
}

}  // namespace baleen
