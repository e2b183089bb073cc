// Every op on small inputs, as a list: what dry_run_test.cc runs really and dry.
#pragma once

#include "kernels/ops/adamw.h"
#include "kernels/ops/cross_entropy.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/embedding.h"
#include "kernels/ops/indexer/selection_hash.h"
#include "kernels/ops/layer_norm.h"
#include "kernels/ops/linear/fp8_linear.h"
#include "kernels/ops/linear/grouped_matmul.h"
#include "kernels/ops/linear/matmul.h"
#include "kernels/ops/moe/permute.h"
#include "kernels/ops/moe/router.h"
#include "kernels/ops/moe/slot_values.h"
#include "kernels/ops/moe/weighted_swiglu.h"
#include "kernels/ops/reduce.h"
#include "kernels/ops/rms_norm.h"
#include "kernels/ops/rope.h"
#include "kernels/ops/strided.h"
#include "kernels/ops/swiglu.h"
#include "tests/ops/dry_attention_cases.h"
#include "tests/ops/dry_inputs.h"

namespace baleen::testing {

inline std::vector<OpCase> MatmulCases() {
  return {
      {"Matmul",
       [](const Context& c, DType d) -> Call {
         return [&c, a = In(c, d, {4, 7, 300}), b = In(c, d, {300, 9}),
                 r = In(c, d, {4, 7, 9})]() -> std::vector<Tensor> {
           Matmul(c, AsBatch(a), Transpose::kNo, AsMatrix(b), Transpose::kNo, AsBatch(r));
           return {};
         };
       }},
      {"Linear",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, kD}), w = In(c, d, {700, kD})]() -> std::vector<Tensor> {
           return {Linear(c, x, w)};
         };
       }},
      {"LinearBackwardInput",
       [](const Context& c, DType d) -> Call {
         return [&c, dy = In(c, d, {kT, 700}), w = In(c, d, {700, kD})]() -> std::vector<Tensor> {
           return {LinearBackwardInput(c, dy, w)};
         };
       }},
      {"LinearBackwardWeight",
       [](const Context& c, DType d) -> Call {
         return [&c, dy = In(c, d, {kT, 700}), x = In(c, d, {kT, kD}),
                 dw = Sums(c, d, {700, kD})]() -> std::vector<Tensor> {
           LinearBackwardWeight(c, dy, x, dw);
           return {};
         };
       }},
      {"GroupedLinear",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {60, kD}), w = In(c, d, {kE, 40, kD}),
                 offsets =
                     IntTensorOf(c, {kE + 1}, {0, 12, 24, 36, 48, 60})]() -> std::vector<Tensor> {
           return {GroupedLinear(c, x, w, offsets)};
         };
       }},
      {"GroupedLinearBackwardInput",
       [](const Context& c, DType d) -> Call {
         return [&c, dy = In(c, d, {60, 40}), w = In(c, d, {kE, 40, kD}),
                 offsets =
                     IntTensorOf(c, {kE + 1}, {0, 12, 24, 36, 48, 60})]() -> std::vector<Tensor> {
           return {GroupedLinearBackwardInput(c, dy, w, offsets)};
         };
       }},
      {"GroupedLinearBackwardInputOfTwo",
       [](const Context& c, DType d) -> Call {
         return [&c, dya = In(c, d, {60, 40}), dyb = In(c, d, {60, 40}),
                 wa = In(c, d, {kE, 40, kD}), wb = In(c, d, {kE, 40, kD}),
                 offsets =
                     IntTensorOf(c, {kE + 1}, {0, 12, 24, 36, 48, 60})]() -> std::vector<Tensor> {
           return {GroupedLinearBackwardInputOfTwo(c, dya, wa, dyb, wb, offsets)};
         };
       }},
      {"GroupedLinearBackwardWeight",
       [](const Context& c, DType d) -> Call {
         return [&c, dy = In(c, d, {60, 40}), x = In(c, d, {60, kD}), dw = Sums(c, d, {kE, 40, kD}),
                 offsets =
                     IntTensorOf(c, {kE + 1}, {0, 12, 24, 36, 48, 60})]() -> std::vector<Tensor> {
           GroupedLinearBackwardWeight(c, dy, x, offsets, dw);
           return {};
         };
       }},
  };
}

// Widths that are multiples of 16 and not of 128.
inline std::vector<OpCase> Fp8Cases() {
  constexpr int64_t kIn = 304, kOut = 48;
  return {
      {"Fp8Linear",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, kIn}), w = In(c, d, {kOut, kIn})]() -> std::vector<Tensor> {
           return {Fp8Linear(c, x, w)};
         };
       }},
      {"Fp8LinearBackwardInput",
       [](const Context& c, DType d) -> Call {
         return
             [&c, dy = In(c, d, {kT, kOut}), w = In(c, d, {kOut, kIn})]() -> std::vector<Tensor> {
               return {Fp8LinearBackwardInput(c, dy, w)};
             };
       }},
      {"Fp8LinearBackwardWeight",
       [](const Context& c, DType d) -> Call {
         return [&c, dy = In(c, d, {kT, kOut}), x = In(c, d, {kT, kIn}),
                 dw = Sums(c, d, {kOut, kIn})]() -> std::vector<Tensor> {
           Fp8LinearBackwardWeight(c, dy, x, dw);
           return {};
         };
       }},
      {"Fp8GroupedLinear",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {60, kIn}), w = In(c, d, {kE, kOut, kIn}),
                 offsets =
                     IntTensorOf(c, {kE + 1}, {0, 12, 24, 36, 48, 60})]() -> std::vector<Tensor> {
           return {Fp8GroupedLinear(c, x, w, offsets)};
         };
       }},
      {"Fp8GroupedLinearBackwardInput",
       [](const Context& c, DType d) -> Call {
         return [&c, dy = In(c, d, {60, kOut}), w = In(c, d, {kE, kOut, kIn}),
                 offsets =
                     IntTensorOf(c, {kE + 1}, {0, 12, 24, 36, 48, 60})]() -> std::vector<Tensor> {
           return {Fp8GroupedLinearBackwardInput(c, dy, w, offsets)};
         };
       }},
  };
}

inline std::vector<OpCase> RowCases() {
  return {
      {"RmsNorm",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, kD}), w = In(c, d, {kD})]() -> std::vector<Tensor> {
           const RmsNormResult r = RmsNorm(c, x, w, 1e-6);
           return {r.y, r.rstd};
         };
       }},
      {"RmsNormBackward",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, kD}), w = In(c, d, {kD}), rstd = Sums(c, d, {kT}),
                 dw = Sums(c, d, {kD})]() -> std::vector<Tensor> {
           RmsNormBackwardWeight(c, x, x, rstd, dw);
           return {RmsNormBackwardInput(c, x, x, w, rstd)};
         };
       }},
      {"LayerNorm",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, kD}), w = In(c, d, {kD})]() -> std::vector<Tensor> {
           const LayerNormResult r = LayerNorm(c, x, w, w, 1e-6);
           return {r.y, r.mean, r.rstd};
         };
       }},
      {"LayerNormBackward",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, kD}), w = In(c, d, {kD}), s = Sums(c, d, {kT}),
                 dw = Sums(c, d, {kD}), db = Sums(c, d, {kD})]() -> std::vector<Tensor> {
           LayerNormBackwardWeight(c, x, x, s, s, dw, db);
           return {LayerNormBackwardInput(c, x, x, w, s, s)};
         };
       }},
      {"Swiglu",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, kD})]() -> std::vector<Tensor> {
           const SwigluGradients g = SwigluBackward(c, x, x, x);
           return {Swiglu(c, x, x), g.dgate, g.dup};
         };
       }},
      {"WeightedSwiglu",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, kD}), w = Sums(c, d, {kT})]() -> std::vector<Tensor> {
           const WeightedSwigluGradients g = WeightedSwigluBackward(c, x, x, x, w);
           return {WeightedSwiglu(c, x, x, w), g.dgate, g.dup, g.dweight_N};
         };
       }},
      {"Rope",
       [](const Context& c, DType d) -> Call {
         return [&c, d, x = In(c, d, {kT, kH, 6}),
                 positions = Ints(c, {kT}, 50)]() -> std::vector<Tensor> {
           const RopeTable table = MakeRopeTable(c, d, RopeFrequencies({.dim = 4}), 50);
           ApplyRope(c, PerHead(x).Columns(0, 4), positions, table, RopeLayout::kHalfSplit,
                     RopeDirection::kForward);
           return {table.cos, table.sin};
         };
       }},
      {"Elementwise",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, kD}), y = In(c, d, {kT, kD})]() -> std::vector<Tensor> {
           AddInPlace(c, x, y);
           ScaleInPlace(c, x, 2);
           FillZero(c, y);
           Copy(c, x, y);
           const Tensor joined = ConcatColumns(c, x, y);
           return {Add(c, x, y), Clone(c, x), joined, SliceColumns(c, joined, 5, 100),
                   Cast(c, x, DType::kBF16)};
         };
       }},
      {"Strided",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, kH, kQ}), y = In(c, d, {kT, kQ})]() -> std::vector<Tensor> {
           CopyView(c, AsMatrix(y), PerHead(x));
           AddBatchSum(c, PerHead(x), AsMatrix(y));
           return {};
         };
       }},
      {"Embedding",
       [](const Context& c, DType d) -> Call {
         return [&c, ids = Ints(c, {kT}, 30), table = In(c, d, {20, kD}), dy = In(c, d, {kT, kD}),
                 dtable = Sums(c, d, {20, kD})]() -> std::vector<Tensor> {
           EmbeddingBackward(c, ids, dy, dtable, 5);
           return {EmbeddingLookup(c, ids, table, 5)};
         };
       }},
      {"CrossEntropy",
       [](const Context& c, DType d) -> Call {
         return [&c, logits = In(c, d, {kT, 90}), targets = Ints(c, {kT}, 90),
                 part = Sums(c, d, {2, kT})]() -> std::vector<Tensor> {
           const CrossEntropyStats stats = CrossEntropyLocalStats(c, logits, targets, 0);
           const CrossEntropyStats whole = CombineCrossEntropyStats(c, {part, part, part});
           CrossEntropyBackwardInPlace(c, logits, targets, whole, 0, 0.1);
           return {stats.row_max_T, stats.row_sum_T, stats.target_logit_T, whole.row_max_T,
                   CrossEntropyLoss(c, whole, targets)};
         };
       }},
      {"Reduce",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kD}), sum = In(c, DType::kF64, {1})]() -> std::vector<Tensor> {
           AddSumOfSquares(c, x, sum);
           AddSum(c, x, sum);
           AddDot(c, x, x, 0.5, sum);
           AddConstant(c, 1, sum);
           return {};
         };
       }},
      {"Adamw",
       [](const Context& c, DType d) -> Call {
         return [&c, p = Sums(c, d, {kD}), g = Sums(c, d, {kD}), m = Sums(c, d, {kD}),
                 v = Sums(c, d, {kD}), control = Sums(c, d, {2}),
                 working = c.Zeros(DType::kBF16, {kD}),
                 sum = In(c, DType::kF64, {1})]() -> std::vector<Tensor> {
           ClipControl(c, sum, 1.0, control);
           ShareSkipFlag(c, control, control);
           AdamwUpdate(c, AdamwParams(), p, g, m, v, control);
           AdamwUpdate(c, AdamwParams(),
                       AdamwTensors{.param = p, .grad = g, .m = m, .v = v, .working = working},
                       control);
           return {};
         };
       }},
  };
}

inline std::vector<OpCase> RoutingCases() {
  const RouterParams params = {.num_experts_per_tok = kA};
  return {
      {"Router",
       [params](const Context& c, DType d) -> Call {
         return [&c, params, logits = In(c, d, {kT, kE}), bias = Sums(c, d, {kE}),
                 counts = c.Zeros(DType::kI64, {kE})]() -> std::vector<Tensor> {
           const RouterResult r = Route(c, logits, bias, params);
           const RouterResult again = RouteWithIds(c, logits, r.expert_ids_TA, params);
           CountExperts(c, r.expert_ids_TA, counts);
           UpdateRouterBias(c, counts, 0.1, bias);
           return {r.scores_TE, r.expert_ids_TA, r.weights_TA, again.weights_TA,
                   RouteBackward(c, r.weights_TA, Tensor(), r, params)};
         };
       }},
      {"Balance",
       [](const Context& c, DType d) -> Call {
         return [&c, scores = In(c, StatisticsOf(d), {kT, kE}),
                 sequence = Ints(c, {kT}, 2)]() -> std::vector<Tensor> {
           const BalanceStats stats = BalanceLocalStats(c, scores, sequence, 2, kA);
           return {stats.counts_BE, stats.prob_sum_BE,
                   BalanceBackward(c, scores, sequence, stats.prob_sum_BE)};
         };
       }},
      {"Permutation",
       [](const Context& c, DType d) -> Call {
         return [&c, ids = Ints(c, {kT, kA}, kE), x = In(c, d, {kT, kD}),
                 weights = In(c, StatisticsOf(d), {kT, kA})]() -> std::vector<Tensor> {
           const Permutation p = BuildPermutation(c, ids, 0, kE);
           const Tensor rows = GatherRows(c, x, p.source_row_N);
           return {p.source_row_N,
                   p.row_of_slot_TA,
                   p.offsets_L1,
                   rows,
                   GatherRowsBackward(c, rows, p.row_of_slot_TA),
                   SlotsOfRows(c, RowsOfSlots(c, weights, p.row_of_slot_TA, rows.dim(0)),
                               p.row_of_slot_TA),
                   GroupsOfTokens(c, ids, 2, kE / 2)};
         };
       }},
      {"SelectionHash",
       [](const Context& c, DType) -> Call {
         return [&c, rows = Ints(c, {kT}, 30), ids = Ints(c, {kT, kA}, kE),
                 nan_row = Ints(c, {1}, 3), ties = c.Zeros(DType::kF64, {1}),
                 hash = c.Zeros(DType::kI64, {1})]() -> std::vector<Tensor> {
           AddSelectionHash(c, rows, ids, hash);
           KeepFirstNanRow(c, nan_row, 5, nan_row);
           CountNanRow(c, nan_row, hash);
           AddIntSum(c, ids, ties);
           return {};
         };
       }},
  };
}

inline std::vector<OpCase> AllCases() {
  std::vector<OpCase> all;
  for (const auto& cases :
       {AttentionCases(), MatmulCases(), Fp8Cases(), RowCases(), RoutingCases()}) {
    all.insert(all.end(), cases.begin(), cases.end());
  }
  return all;
}

}  // namespace baleen::testing
