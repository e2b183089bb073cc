// The indexer of baleen bench ops.
//
// FLOP: scores 2 T S I J over all keys; the backward on K selected keys 6 T K I J (scores, dq, dk).
// The warm-up is attention's forward, the target's logits, and four products of the indexer (scores
// twice, dq, dk) a pair of the causal windows: 2 H (Q + V) + 2 H Q + 8 I J.
#include <algorithm>
#include <functional>

#include "absl/strings/str_format.h"
#include "kernels/ops/elementwise.h"
#include "kernels/ops/indexer/fp8_simulate.h"
#include "kernels/ops/indexer/indexer_loss.h"
#include "kernels/ops/indexer/indexer_scores.h"
#include "kernels/ops/indexer/topk_select.h"
#include "trainer/bench/op_case.h"

namespace baleen {
namespace {

constexpr int64_t kFp8Group = 128;

struct Problem {
  int64_t T = 0, S = 0;
  std::optional<BenchIds> ids;
};

struct Operands {
  Tensor q_TIJ, k_SJ, w_TI;
};

Operands MakeOperands(OpInputs& in, const ModelConfig& model, const Problem& p) {
  const int64_t I = model.index_n_heads, J = model.index_head_dim;
  Operands x{in.Normal({p.T, I, J}), in.Normal({p.S, J}), in.NormalStatistics({p.T, I})};
  ScaleInPlace(in.context(), x.w_TI, model.index_scale());
  return x;
}

double Products(const ModelConfig& model, int64_t T, int64_t S) {
  return 2.0 * static_cast<double>(T) * static_cast<double>(S) *
         static_cast<double>(model.index_n_heads * model.index_head_dim);
}

OpCall Scores(OpInputs& in, const ModelConfig& model, const Problem& p) {
  const Operands x = MakeOperands(in, model, p);
  const KeyWindows windows = in.Windows(p.T, p.S, /*causal=*/false);
  const Context& context = in.context();
  return {[=, &context] { IndexerScores(context, x.q_TIJ, x.k_SJ, x.w_TI, windows); },
          Products(model, p.T, p.S),
          BytesOf({x.q_TIJ, x.k_SJ, x.w_TI}) + 4.0 * static_cast<double>(p.T * p.S)};
}

// Of the codes, which the model makes for each chunk of queries (indexer.quantise) and once a layer
// for all keys.
OpCall Fp8Scores(OpInputs& in, const ModelConfig& model, const Problem& p) {
  const Operands x = MakeOperands(in, model, p);
  const Fp8Codes q = QuantiseFp8(in.context(), x.q_TIJ, model.index_head_dim),
                 k = QuantiseFp8(in.context(), x.k_SJ, model.index_head_dim);
  const KeyWindows windows = in.Windows(p.T, p.S, /*causal=*/false);
  const Context& context = in.context();
  return {[=, &context, w_TI = x.w_TI] { IndexerScoresFp8(context, q, k, w_TI, windows); },
          Products(model, p.T, p.S),
          BytesOf({q.codes, q.scales, k.codes, k.scales, x.w_TI}) +
              4.0 * static_cast<double>(p.T * p.S)};
}

// Of shapes without a kernel for codes: queries rounded to E4M3, then the same products. Keys are
// rounded once a layer.
OpCall SimulatedFp8Scores(OpInputs& in, const ModelConfig& model, const Problem& p) {
  const Operands x = MakeOperands(in, model, p);
  const int64_t group = std::min(kFp8Group, model.index_head_dim);
  const Tensor k_SJ = SimulateFp8(in.context(), x.k_SJ, group);
  const KeyWindows windows = in.Windows(p.T, p.S, /*causal=*/false);
  const Context& context = in.context();
  return {
      [=, &context] {
        const Tensor q_TIJ = SimulateFp8(context, x.q_TIJ, group);
        IndexerScores(context, q_TIJ, k_SJ, x.w_TI, windows);
      },
      Products(model, p.T, p.S),
      BytesOf({x.q_TIJ, x.q_TIJ, x.q_TIJ, k_SJ, x.w_TI}) + 4.0 * static_cast<double>(p.T * p.S)};
}

// Codes and scales of a chunk of queries.
OpCall Quantise(OpInputs& in, const ModelConfig& model, const Problem& p) {
  const Tensor q_TIJ = in.Normal({p.T, model.index_n_heads, model.index_head_dim});
  const int64_t group = model.index_head_dim, groups = p.T * model.index_n_heads;
  const int64_t written = q_TIJ.num_elements() + groups * DTypeBytes(StatisticsOf(q_TIJ.dtype()));
  const Context& context = in.context();
  return {[=, &context] { QuantiseFp8(context, q_TIJ, group); }, 0,
          BytesOf({q_TIJ}) + static_cast<double>(written)};
}

OpCall TopkCall(OpInputs& in, const ModelConfig& model, const Problem& p, ChosenScores chosen) {
  const Tensor scores_TS = in.NormalStatistics({p.T, p.S});
  const KeyWindows windows = in.Windows(p.T, p.S, /*causal=*/false);
  const int64_t k = model.index_topk;
  const Context& context = in.context();
  const double written = static_cast<double>(p.T * k) * (chosen == ChosenScores::kKeep ? 8 : 4);
  return {[=, &context] { TopkSelect(context, scores_TS, windows, k, chosen); }, 0,
          BytesOf({scores_TS}) + written};
}
OpCall Topk(OpInputs& in, const ModelConfig& model, const Problem& p) {
  return TopkCall(in, model, p, ChosenScores::kDrop);
}
OpCall TopkWithScores(OpInputs& in, const ModelConfig& model, const Problem& p) {
  return TopkCall(in, model, p, ChosenScores::kKeep);
}

// With the chosen scores of the top-k at hand, as the model has them, or without.
OpCall BackwardCall(OpInputs& in, const ModelConfig& model, const Problem& p, bool scores_given) {
  const Operands x = MakeOperands(in, model, p);
  const int64_t K = model.index_topk, chosen = std::min(K, p.S);
  const auto heads = static_cast<double>(model.num_attention_heads);
  const Tensor ids_TK = in.Ids(*p.ids, p.T, p.S, K, /*causal=*/false);
  const Tensor target_TK = in.Positive({p.T, K}, heads / static_cast<double>(chosen));
  const Tensor scores_TK = scores_given ? in.NormalStatistics({p.T, K}) : Tensor();
  const Tensor dk_SJ = in.ZeroStatistics(x.k_SJ.shape());
  const Context& context = in.context();
  return {[=, &context] {
            FillZero(context, dk_SJ);
            SparseIndexerLoss(context, x.q_TIJ, x.k_SJ, x.w_TI, ids_TK, target_TK, 1 / heads, 1,
                              dk_SJ, scores_TK);
          },
          3 * Products(model, p.T, chosen),
          BytesOf({x.q_TIJ, x.q_TIJ, x.k_SJ, x.w_TI, x.w_TI, ids_TK, target_TK, scores_TK, dk_SJ})};
}
OpCall Backward(OpInputs& in, const ModelConfig& model, const Problem& p) {
  return BackwardCall(in, model, p, true);
}
OpCall BackwardWithoutScores(OpInputs& in, const ModelConfig& model, const Problem& p) {
  return BackwardCall(in, model, p, false);
}

// The warm-up's attention and indexer of one layer, chunk by chunk of query rows as the model does:
// attention forward for the LSE, then target, loss and the indexer's gradients.
struct WarmUpOperands {
  Operands index;
  Tensor q_THQ, k_SHQ, v_SHV, dk_SJ;
  KeyWindows windows;
  int64_t chunk = 0;
  double scale = 1;
};

void RunWarmUp(const Context& context, const WarmUpOperands& x) {
  FillZero(context, x.dk_SJ);
  const int64_t rows = x.q_THQ.dim(0);
  for (int64_t begin = 0; begin < rows; begin += x.chunk) {
    const int64_t end = std::min(rows, begin + x.chunk);
    const KeyWindows windows = x.windows.Rows(begin, end);
    const Tensor q = x.q_THQ.Rows(begin, end);
    const AttentionResult attention = Attention(context, q, x.k_SHQ, x.v_SHV, windows, x.scale);
    DenseIndexerLoss(context, x.index.q_TIJ.Rows(begin, end), x.index.k_SJ,
                     x.index.w_TI.Rows(begin, end), {q, x.k_SHQ, attention.lse_TH, x.scale},
                     windows, 1, 1024, x.dk_SJ);
  }
}

OpCall WarmUp(OpInputs& in, const ModelConfig& model, const Problem& p, int64_t H, int64_t chunk) {
  const int64_t Q = model.qk_head_dim(), V = model.v_head_dim;
  WarmUpOperands x{MakeOperands(in, model, p), in.Normal({p.T, H, Q}), in.Normal({p.S, H, Q}),
                   in.Normal({p.S, H, V})};
  x.dk_SJ = in.ZeroStatistics(x.index.k_SJ.shape());
  x.windows = in.Windows(p.T, p.S, /*causal=*/true);
  x.chunk = chunk;
  x.scale = model.softmax_scale();
  const auto rows = static_cast<double>(p.T), keys = static_cast<double>(p.S);
  const double pairs = rows * (keys - rows) + rows * (rows + 1) / 2;
  const Context& context = in.context();
  return {[=, &context] { RunWarmUp(context, x); },
          pairs * static_cast<double>(2 * H * (2 * Q + V) +
                                      8 * model.index_n_heads * model.index_head_dim),
          BytesOf({x.q_THQ, x.k_SHQ, x.v_SHV, x.index.q_TIJ, x.index.q_TIJ, x.index.k_SJ,
                   x.index.w_TI, x.index.w_TI, x.dk_SJ})};
}

using Make = OpCall (*)(OpInputs&, const ModelConfig&, const Problem&);

}  // namespace

void AddIndexerCases(const OpSizes& sizes, const OpRequest& request, std::vector<OpCase>& cases) {
  const ModelConfig& model = sizes.model;
  const int64_t I = model.index_n_heads, J = model.index_head_dim, K = model.index_topk;
  const auto add = [&](const std::string& op, const std::string& detail, const std::string& kernel,
                       OpBound bound, const Problem& p, int64_t heads,
                       std::function<OpCall(OpInputs&)> make) {
    cases.push_back({.op = op,
                     .shape = absl::StrFormat("%d x %d, %s", p.T, p.S, detail),
                     .kernel = KernelWords(sizes, kernel),
                     .bound = bound,
                     .rows = p.T,
                     .heads = heads,
                     .keys = p.S,
                     .ids = p.ids,
                     .make = std::move(make)});
  };
  const std::string heads = absl::StrFormat("%d x %d", I, J);
  const std::string scores = IndexerScoresKernelName(sizes.dtype, I, J);
  for (const int64_t S : request.tokens) {
    const Problem p{std::min(request.query_rows, S), S, {}};
    const auto of = [&](Make make, const Problem& problem) {
      return [=](OpInputs& in) { return make(in, model, problem); };
    };
    add("indexer.scores", heads, scores, OpBound::kMatmul, p, I, of(&Scores, p));
    if (!sizes.cuda || HasFp8IndexerScores(sizes.dtype, I, J)) {
      add("indexer.scores_fp8", heads, IndexerScoresFp8KernelName(), OpBound::kFp8Matmul, p, I,
          of(&Fp8Scores, p));
      add("indexer.quantise", heads, "", OpBound::kCopy, p, 0, of(&Quantise, p));
    } else {
      add("indexer.scores_fp8", heads, absl::StrCat("queries rounded to E4M3; ", scores),
          OpBound::kFp8Matmul, p, I, of(&SimulatedFp8Scores, p));
    }
    for (const auto& [op, make] : {std::pair("indexer.topk", &Topk),
                                   std::pair("indexer.topk_with_scores", &TopkWithScores)}) {
      add(op, absl::StrFormat("top-%d", K), TopkSelectKernelName(), OpBound::kCopy, p, 0,
          of(make, p));
    }
    for (const BenchIds ids : request.ids) {
      const Problem selected{p.T, S, ids};
      for (const auto& [op, make] : {std::pair("indexer.backward", &Backward),
                                     std::pair("indexer.backward_alone", &BackwardWithoutScores)}) {
        add(op, absl::StrFormat("%s, %d %s", heads, K, Name(ids)),
            SparseIndexerLossKernelName(sizes.dtype, I, J, K), OpBound::kMatmul, selected, I,
            of(make, selected));
      }
    }
    for (const int64_t H : request.heads) {
      const Problem whole{S <= kMostWholeRows ? S : p.T, S, {}};
      const int64_t chunk = request.query_rows;
      add("warmup.whole", absl::StrFormat("%d heads, %s", H, heads),
          DenseIndexerLossKernelName(sizes.dtype, I, J, model.qk_head_dim()), OpBound::kMatmul,
          whole, H, [=](OpInputs& in) { return WarmUp(in, model, whole, H, chunk); });
    }
  }
}

}  // namespace baleen
