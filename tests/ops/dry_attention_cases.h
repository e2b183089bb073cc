// Attention and the indexer on small inputs: cases of dry_cases.h.
#pragma once

#include "kernels/ops/attention/sparse_attention.h"
#include "kernels/ops/hadamard.h"
#include "kernels/ops/indexer/fp8_simulate.h"
#include "kernels/ops/indexer/indexer_loss.h"
#include "kernels/ops/indexer/indexer_scores.h"
#include "kernels/ops/indexer/topk_select.h"
#include "tests/ops/attention_oracle.h"
#include "tests/ops/dry_inputs.h"

namespace baleen::testing {

struct AttentionInputs {
  AttentionInputs(const Context& context, DType dtype)
      : q(In(context, dtype, {kT, kH, kQ})),
        k(In(context, dtype, {kS, kH, kQ}, 2)),
        v(In(context, dtype, {kS, kH, kV}, 3)),
        d_out(In(context, dtype, {kT, kH, kV}, 4)),
        forward{In(context, dtype, {kT, kH, kV}, 5), Sums(context, dtype, {kT, kH})},
        dk(Sums(context, dtype, k.shape())),
        dv(Sums(context, dtype, v.shape())),
        windows(CausalWindows(context, kT)),
        ids(ListedKeys(context)),
        target(Sums(context, dtype, {kT, kK})) {}
  Tensor q, k, v, d_out;
  AttentionResult forward;
  Tensor dk, dv;
  KeyWindows windows;
  Tensor ids, target;
};

struct IndexerInputs {
  IndexerInputs(const Context& context, DType dtype)
      : q(In(context, dtype, {kT, kI, kJ})),
        k(In(context, dtype, {kS, kJ}, 2)),
        w(Sums(context, dtype, {kT, kI})),
        dk(Sums(context, dtype, {kS, kJ})),
        dense{In(context, dtype, {kT, kH, kQ}, 3), In(context, dtype, {kS, kH, kQ}, 4),
              Sums(context, dtype, {kT, kH}), 0.3},
        target(Sums(context, dtype, {kT, kK})),
        windows(CausalWindows(context, kT)),
        ids(ListedKeys(context)) {}
  Tensor q, k, w, dk;
  DenseTarget dense;
  Tensor target;
  KeyWindows windows;
  Tensor ids;
};

inline std::vector<OpCase> AttentionCases() {
  return {
      {"Attention",
       [](const Context& c, DType d) -> Call {
         return [&c, in = AttentionInputs(c, d)]() -> std::vector<Tensor> {
           const AttentionResult r = Attention(c, in.q, in.k, in.v, in.windows, 0.4);
           return {r.o_THV, r.lse_TH};
         };
       }},
      {"AttentionBackward",
       [](const Context& c, DType d) -> Call {
         return [&c, in = AttentionInputs(c, d)]() -> std::vector<Tensor> {
           return {AttentionBackward(c, in.d_out, in.q, in.k, in.v, in.forward, in.windows, 0.4,
                                     in.dk, in.dv)};
         };
       }},
      {"MaskedAttention",
       [](const Context& c, DType d) -> Call {
         return [&c, in = AttentionInputs(c, d)]() -> std::vector<Tensor> {
           const AttentionResult r = MaskedAttention(c, in.q, in.k, in.v, in.ids, 0.4);
           return {r.o_THV, r.lse_TH};
         };
       }},
      {"MaskedAttentionBackward",
       [](const Context& c, DType d) -> Call {
         return [&c, in = AttentionInputs(c, d)]() -> std::vector<Tensor> {
           return {MaskedAttentionBackward(c, in.d_out, in.q, in.k, in.v, in.forward, in.ids, 0.4,
                                           in.dk, in.dv, in.target)};
         };
       }},
      {"SparseAttention",
       [](const Context& c, DType d) -> Call {
         return [&c, in = AttentionInputs(c, d), kv = In(c, d, {kS, kQ})]() -> std::vector<Tensor> {
           const SparseAttentionResult r = SparseAttention(c, in.q, kv, in.ids, kV, 0.4);
           return {r.o_THV, r.lse_TH};
         };
       }},
      {"SparseAttentionBackward",
       [](const Context& c, DType d) -> Call {
         return [&c, in = AttentionInputs(c, d), kv = In(c, d, {kS, kQ}),
                 dkv = Sums(c, d, {kS, kQ})]() -> std::vector<Tensor> {
           return {SparseAttentionBackward(c, in.d_out, in.q, kv,
                                           {in.forward.o_THV, in.forward.lse_TH}, in.ids, 0.4, dkv,
                                           in.target)};
         };
       }},
      {"IndexerScores",
       [](const Context& c, DType d) -> Call {
         return [&c, in = IndexerInputs(c, d)]() -> std::vector<Tensor> {
           return {IndexerScores(c, in.q, in.k, in.w, in.windows),
                   IndexerScoresFp8(c, QuantiseFp8(c, in.q, kJ), QuantiseFp8(c, in.k, kJ), in.w,
                                    in.windows)};
         };
       }},
      {"TopkSelect",
       [](const Context& c, DType d) -> Call {
         return [&c, scores = Sums(c, d, {kT, kS}),
                 windows = CausalWindows(c, kT)]() -> std::vector<Tensor> {
           const TopkResult r = TopkSelect(c, scores, windows, kK, ChosenScores::kKeep);
           return {r.ids_TK, r.ties_T, r.nan_row_1, r.scores_TK};
         };
       }},
      {"SparseIndexerLoss",
       [](const Context& c, DType d) -> Call {
         return [&c, in = IndexerInputs(c, d)]() -> std::vector<Tensor> {
           const IndexerLossResult r =
               SparseIndexerLoss(c, in.q, in.k, in.w, in.ids, in.target, 0.5, 1, in.dk);
           return {r.loss_T, r.dq_TIJ, r.dw_TI};
         };
       }},
      {"DenseIndexerLoss",
       [](const Context& c, DType d) -> Call {
         return [&c, in = IndexerInputs(c, d)]() -> std::vector<Tensor> {
           const IndexerLossResult r =
               DenseIndexerLoss(c, in.q, in.k, in.w, in.dense, in.windows, 1, 32, in.dk);
           return {r.loss_T, r.dq_TIJ, r.dw_TI};
         };
       }},
      {"DenseTargetProbabilities",
       [](const Context& c, DType d) -> Call {
         return [&c, in = IndexerInputs(c, d)]() -> std::vector<Tensor> {
           return {DenseTargetProbabilities(c, in.dense, in.windows)};
         };
       }},
      {"SelectionQuality",
       [](const Context& c, DType d) -> Call {
         return [&c, in = IndexerInputs(c, d), p = Sums(c, d, {kT, kS})]() -> std::vector<Tensor> {
           const SelectionQualityResult r = SelectionQuality(c, p, in.ids, in.windows);
           return {r.mass_T, r.best_mass_T, r.recall_T};
         };
       }},
      {"HadamardTransform",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, 64})]() -> std::vector<Tensor> {
           return {HadamardTransform(c, x)};
         };
       }},
      {"SimulateFp8",
       [](const Context& c, DType d) -> Call {
         return [&c, x = In(c, d, {kT, 64})]() -> std::vector<Tensor> {
           return {SimulateFp8(c, x, 32), QuantiseFp8(c, x, 32).codes};
         };
       }},
  };
}

}  // namespace baleen::testing
