// The indexer's KL loss, sparse and dense: by hand, against plain loops, against central
// differences, and the facts that tie the two forms together.
#include "kernels/ops/indexer/indexer_loss.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops/attention/sparse_attention.h"
#include "kernels/ops/indexer/indexer_scores.h"
#include "kernels/ops/indexer/topk_select.h"
#include "tests/ops/attention_oracle.h"
#include "tests/support/gradient_check.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the helpers of tests/support

// Indexer operands, and a main attention over the same rows and keys as the target.
struct Case {
  Case(DType dtype_in, int64_t T, int64_t S, int64_t I = 3, int64_t J = 6, int64_t H = 2,
       int64_t Q = 5)
      : dtype(dtype_in),
        q(RandomTensor(context, dtype, {T, I, J}, 1)),
        k(RandomTensor(context, dtype, {S, J}, 2)),
        w(RandomTensor(context, dtype, {T, I}, 3, 0.5)),
        main_q(RandomTensor(context, dtype, {T, H, Q}, 4)),
        main_k(RandomTensor(context, dtype, {S, H, Q}, 5)),
        dk(context.Zeros(dtype, {S, J})) {}

  DenseTarget Target(const KeyWindows& windows) const {
    const double scale = 0.7;
    const AttentionResult attention = Attention(context, main_q, main_k, main_k, windows, scale);
    return {main_q, main_k, attention.lse_TH, scale};
  }
  IndexerLossResult Dense(const KeyWindows& windows, double grad_scale, int64_t key_tile) const {
    return DenseIndexerLoss(context, q, k, w, Target(windows), windows, grad_scale, key_tile, dk);
  }
  Context context = Context::Cpu();
  DType dtype;
  Tensor q, k, w, main_q, main_k, dk;
};

struct OracleLoss {
  std::vector<double> loss_T, dq_TIJ, dw_TI, dk_SJ;
};

// The gradient written out, one (t, s, j) at a time. target_TS is p, already divided by the heads.
OracleLoss PlainLoss(const Case& c, const KeyLists& keys, const std::vector<double>& target_TS,
                     double grad_scale) {
  const std::vector<double> q = ToDoubles(c.q), k = ToDoubles(c.k), w = ToDoubles(c.w);
  const int64_t T = c.q.dim(0), I = c.q.dim(1), J = c.q.dim(2), S = c.k.dim(0);
  OracleLoss r = {std::vector<double>(T), std::vector<double>(q.size()),
                  std::vector<double>(w.size()), std::vector<double>(k.size())};
  for (int64_t t = 0; t < T; ++t) {
    std::vector<double> a(S * I), score(S);
    double sum = 0, p_sum = 0;
    for (const int64_t s : keys[t]) {
      for (int64_t j = 0; j < I; ++j) {
        for (int64_t i = 0; i < J; ++i) a[s * I + j] += q[(t * I + j) * J + i] * k[s * J + i];
        score[s] += w[t * I + j] * std::max(a[s * I + j], 0.0);
      }
      sum += std::exp(score[s]);
      p_sum += target_TS[t * S + s];
    }
    for (const int64_t s : keys[t]) {
      const double p = target_TS[t * S + s], pi = std::exp(score[s]) / sum;
      if (p > 0) r.loss_T[t] += p * std::log(p / pi);
      const double delta = grad_scale * (pi * p_sum - p);
      for (int64_t j = 0; j < I; ++j) {
        if (a[s * I + j] <= 0) continue;
        r.dw_TI[t * I + j] += delta * a[s * I + j];
        for (int64_t i = 0; i < J; ++i) {
          r.dq_TIJ[(t * I + j) * J + i] += delta * w[t * I + j] * k[s * J + i];
          r.dk_SJ[s * J + i] += delta * w[t * I + j] * q[(t * I + j) * J + i];
        }
      }
    }
  }
  return r;
}

// p_TS from the plain attention.
std::vector<double> PlainTarget(const Case& c, const KeyLists& keys, double scale) {
  const int64_t T = c.q.dim(0), S = c.k.dim(0), H = c.main_q.dim(1);
  const OracleAttention attention =
      PlainAttention(c.main_q, c.main_k, c.main_k, c.main_q, keys, scale);
  std::vector<double> target(T * S, 0);
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t h = 0; h < H; ++h) {
      for (int64_t s = 0; s < S; ++s) {
        target[t * S + s] += attention.probs_THS[(t * H + h) * S + s] / H;
      }
    }
  }
  return target;
}

void ExpectMatches(const Case& c, const IndexerLossResult& result, const OracleLoss& oracle) {
  const int64_t terms = c.q.dim(0) + c.k.dim(0);
  const double tolerance = RoundingTolerance(c.dtype, terms, 4.0);
  EXPECT_LT(ErrorOf(ToDoubles(result.loss_T), oracle.loss_T), tolerance);
  EXPECT_LT(ErrorOf(ToDoubles(result.dq_TIJ), oracle.dq_TIJ), tolerance);
  EXPECT_LT(ErrorOf(ToDoubles(result.dw_TI), oracle.dw_TI), tolerance);
  EXPECT_LT(ErrorOf(ToDoubles(c.dk), oracle.dk_SJ), tolerance);
}

// Documents, an empty row now and then, row 0 with one key.
KeyWindows DocumentWindows(const Context& context, int64_t T, int64_t S) {
  std::vector<int32_t> begin(T), end(T);
  for (int64_t t = 0; t < T; ++t) {
    begin[t] = static_cast<int32_t>(t < T / 2 ? 0 : T / 2);
    end[t] = static_cast<int32_t>(t % 13 == 7 ? begin[t] : t + 1 + (t > 0 ? S - T : 0));
  }
  return WindowsOf(context, begin, end);
}

Tensor AllIds(const Context& context, const KeyWindows& windows, int64_t S) {
  const int64_t T = windows.begin_T.dim(0);
  std::vector<int32_t> ids(T * S, -1);
  const KeyLists lists = ListsOf(windows);
  for (int64_t t = 0; t < T; ++t) std::copy(lists[t].begin(), lists[t].end(), &ids[t * S]);
  return IntTensorOf(context, {T, S}, ids);
}

TEST(SparseIndexerLoss, TwoKeysByHand) {
  Case c(DType::kF64, 1, 3, 1, 1);
  c.q = TensorOf(c.context, DType::kF64, {1, 1, 1}, {2});
  c.k = TensorOf(c.context, DType::kF64, {3, 1}, {-1, 9, std::log(3) / 4});
  c.w = TensorOf(c.context, DType::kF64, {1, 1}, {2});
  const Tensor ids = IntTensorOf(c.context, {1, 3}, {0, -1, 2});
  // Scores 0 and ln 3: pi = 1/4, 3/4. p = 1/2, 1/2 (head sums 2 and 2 of 4 heads).
  const Tensor target = TensorOf(c.context, DType::kF64, {1, 3}, {2, 0, 2});
  const IndexerLossResult r =
      SparseIndexerLoss(c.context, c.q, c.k, c.w, ids, target, 0.25, 10.0, c.dk);
  EXPECT_NEAR(ToDoubles(r.loss_T)[0], 0.5 * std::log(2) + 0.5 * std::log(2.0 / 3), 1e-15);
  // delta = 10 (pi - p) = -2.5, 2.5; only key 2 has a > 0, a = ln 3 / 2.
  EXPECT_NEAR(ToDoubles(r.dw_TI)[0], 2.5 * std::log(3) / 2, 1e-14);
  EXPECT_NEAR(ToDoubles(r.dq_TIJ)[0], 2 * 2.5 * std::log(3) / 4, 1e-14);
  EXPECT_LT(RelativeError(ToDoubles(c.dk), {0, 0, 2.5 * 2 * 2}), 1e-14);
}

TEST(SparseIndexerLoss, EqualsThePlainLoops) {
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    for (const int64_t k : {1, 8, 80}) {
      SCOPED_TRACE(::testing::Message() << DTypeName(dtype).data() << " K " << k);
      const int64_t T = 40, S = 50;
      const Case c(dtype, T, S);
      const Tensor ids = ScatteredIds(c.context, T, k, S - T, /*empty_every=*/9);
      const std::vector<double> p = PlainTarget(c, ListsOf(ids), 0.7);
      std::vector<double> slots(T * k, 0);
      for (int64_t i = 0; i < T * k; ++i) {
        const int64_t s = ids.data<int32_t>()[i];
        if (s >= 0) slots[i] = 2 * p[i / k * S + s];
      }
      const IndexerLossResult result = SparseIndexerLoss(
          c.context, c.q, c.k, c.w, ids, TensorOf(c.context, dtype, {T, k}, slots), 0.5, 1.5, c.dk);
      ExpectMatches(c, result, PlainLoss(c, ListsOf(ids), p, 1.5));
    }
  }
}

// Given scores replace the computed ones in the softmax; the masks stay those of q and k.
TEST(SparseIndexerLoss, TakesTheScoresThatSelectionGives) {
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const int64_t T = 40, S = 50, K = 8;
    const Case c(dtype, T, S);
    const KeyWindows windows = DocumentWindows(c.context, T, S);
    const Tensor scores = IndexerScores(c.context, c.q, c.k, c.w, windows);
    const TopkResult chosen = TopkSelect(c.context, scores, windows, K, ChosenScores::kKeep);
    const Tensor target = RandomTensor(c.context, dtype, {T, K}, 7);
    for (int64_t i = 0; i < T * K; ++i) {
      if (dtype == DType::kF32) target.data<float>()[i] = std::fabs(target.data<float>()[i]);
      if (dtype == DType::kF64) target.data<double>()[i] = std::fabs(target.data<double>()[i]);
    }
    const auto run = [&](const Tensor& scores_TK, const Tensor& dk) {
      return SparseIndexerLoss(c.context, c.q, c.k, c.w, chosen.ids_TK, target, 0.5, 1.5, dk,
                               scores_TK);
    };
    const auto new_dk = [&] { return c.context.Zeros(dtype, c.k.shape()); };
    const Tensor dk_computed = new_dk(), dk_given = new_dk(), dk_other = new_dk();
    const IndexerLossResult computed = run(Tensor(), dk_computed);
    const IndexerLossResult given = run(chosen.scores_TK, dk_given);
    EXPECT_EQ(ToDoubles(given.loss_T), ToDoubles(computed.loss_T));
    EXPECT_EQ(ToDoubles(given.dq_TIJ), ToDoubles(computed.dq_TIJ));
    EXPECT_EQ(ToDoubles(given.dw_TI), ToDoubles(computed.dw_TI));
    EXPECT_EQ(ToDoubles(dk_given), ToDoubles(dk_computed));
    // Other scores must be seen.
    const IndexerLossResult other = run(c.context.Zeros(dtype, {T, K}), dk_other);
    EXPECT_GT(RelativeError(ToDoubles(other.loss_T), ToDoubles(computed.loss_T)), 1e-3);
    EXPECT_GT(RelativeError(ToDoubles(dk_other), ToDoubles(dk_computed)), 1e-3);
  }
}

TEST(DenseIndexerLoss, EqualsThePlainLoops) {
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    for (const auto& [T, S] : {std::pair<int64_t, int64_t>{1, 1}, {20, 25}, {70, 90}}) {
      SCOPED_TRACE(::testing::Message() << DTypeName(dtype).data() << " T " << T);
      const Case c(dtype, T, S);
      const KeyWindows windows = DocumentWindows(c.context, T, S);
      const IndexerLossResult result = c.Dense(windows, 1.5, 16);
      const KeyLists keys = ListsOf(windows);
      ExpectMatches(c, result, PlainLoss(c, keys, PlainTarget(c, keys, 0.7), 1.5));
    }
  }
}

// The target is constant: differences are taken of the indexer's operands alone.
TEST(SparseIndexerLoss, GradientsAreTheCentralDifferences) {
  const Case c(DType::kF64, 8, 10);
  const Tensor ids = ScatteredIds(c.context, 8, 5, 2, /*empty_every=*/5);
  const Tensor target = RandomTensor(c.context, DType::kF64, {8, 5}, 7);
  for (int64_t i = 0; i < 40; ++i) {
    // Any non-negative target, rows need not sum to 1.
    double& p = target.data<double>()[i];
    p = ids.data<int32_t>()[i] < 0 ? 0 : std::fabs(p);
  }
  const auto run = [&](const Tensor& dk) {
    return SparseIndexerLoss(c.context, c.q, c.k, c.w, ids, target, 0.3, 2.0, dk);
  };
  const IndexerLossResult result = run(c.dk);
  const auto loss = [&] {
    double sum = 0;
    for (const double x : ToDoubles(run(c.context.Zeros(DType::kF64, {10, 6})).loss_T)) sum += x;
    return 2.0 * sum;
  };
  EXPECT_LT(GradientError(loss, c.q, result.dq_TIJ), 1e-8);
  EXPECT_LT(GradientError(loss, c.k, c.dk), 1e-8);
  EXPECT_LT(GradientError(loss, c.w, result.dw_TI), 1e-8);
}

TEST(DenseIndexerLoss, GradientsAreTheCentralDifferences) {
  const Case c(DType::kF64, 9, 11);
  const KeyWindows windows = DocumentWindows(c.context, 9, 11);
  const DenseTarget target = c.Target(windows);
  const auto run = [&](const Tensor& dk) {
    return DenseIndexerLoss(c.context, c.q, c.k, c.w, target, windows, 2.0, 4, dk);
  };
  const IndexerLossResult result = run(c.dk);
  const auto loss = [&] {
    double sum = 0;
    for (const double x : ToDoubles(run(c.context.Zeros(DType::kF64, {11, 6})).loss_T)) sum += x;
    return 2.0 * sum;
  };
  EXPECT_LT(GradientError(loss, c.q, result.dq_TIJ), 1e-8);
  EXPECT_LT(GradientError(loss, c.k, c.dk), 1e-8);
  EXPECT_LT(GradientError(loss, c.w, result.dw_TI), 1e-8);
}

TEST(DenseIndexerLoss, EqualsTheSparseLossOverTheWholeWindow) {
  const int64_t T = 40, S = 45, H = 2, Q = 5;
  const Case c(DType::kF64, T, S);
  const KeyWindows windows = DocumentWindows(c.context, T, S);
  const IndexerLossResult dense = c.Dense(windows, 0.5, 7);
  const Tensor ids = AllIds(c.context, windows, S);
  // The target as the training step gets it: from the masked attention's backward.
  const AttentionResult masked = MaskedAttention(c.context, c.main_q, c.main_k, c.main_k, ids, 0.7);
  const Tensor target = c.context.Empty(DType::kF64, {T, S});
  const Tensor ignored = c.context.Zeros(DType::kF64, {S, H, Q});
  MaskedAttentionBackward(c.context, c.main_q, c.main_q, c.main_k, c.main_k, masked, ids, 0.7,
                          ignored, c.context.Zeros(DType::kF64, {S, H, Q}), target);
  const Tensor dk = c.context.Zeros(DType::kF64, c.k.shape());
  const IndexerLossResult sparse =
      SparseIndexerLoss(c.context, c.q, c.k, c.w, ids, target, 1.0 / H, 0.5, dk);
  EXPECT_LT(RelativeError(sparse.loss_T, dense.loss_T), 1e-13);
  EXPECT_LT(RelativeError(sparse.dq_TIJ, dense.dq_TIJ), 1e-13);
  EXPECT_LT(RelativeError(sparse.dw_TI, dense.dw_TI), 1e-13);
  EXPECT_LT(RelativeError(dk, c.dk), 1e-13);
}

TEST(DenseIndexerLoss, DoesNotDependOnTheKeyTile) {
  const int64_t T = 50, S = 600;
  const Case reference(DType::kF64, T, S);
  const KeyWindows windows = DocumentWindows(reference.context, T, S);
  const IndexerLossResult whole = reference.Dense(windows, 1.0, S);
  for (const int64_t key_tile : {1, 13, 64, 10000}) {
    SCOPED_TRACE(key_tile);
    const Case c(DType::kF64, T, S);
    const IndexerLossResult tiled = c.Dense(windows, 1.0, key_tile);
    EXPECT_TRUE(SameBits(tiled.loss_T, whole.loss_T));
    EXPECT_TRUE(SameBits(tiled.dw_TI, whole.dw_TI));
    EXPECT_LT(RelativeError(tiled.dq_TIJ, whole.dq_TIJ), 1e-13);
    EXPECT_LT(RelativeError(c.dk, reference.dk), 1e-13);
  }
}

TEST(DenseIndexerLoss, ARowHasTheSameBitsInEveryChunkOfRows) {
  const int64_t T = 90, S = 700;
  const Case c(DType::kF32, T, S);
  const KeyWindows windows = DocumentWindows(c.context, T, S);
  const DenseTarget target = c.Target(windows);
  for (const int64_t key_tile : {50, 512}) {
    const IndexerLossResult whole = c.Dense(windows, 1.0, key_tile);
    for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 1}, {1, 50}, {50, 90}}) {
      const DenseTarget part = {c.main_q.Rows(first, last), c.main_k,
                                target.lse_TH.Rows(first, last), target.softmax_scale};
      const IndexerLossResult rows =
          DenseIndexerLoss(c.context, c.q.Rows(first, last), c.k, c.w.Rows(first, last), part,
                           {windows.begin_T.Rows(first, last), windows.end_T.Rows(first, last)},
                           1.0, key_tile, c.dk);
      EXPECT_TRUE(SameBits(rows.loss_T, whole.loss_T.Rows(first, last)));
      EXPECT_TRUE(SameBits(rows.dq_TIJ, whole.dq_TIJ.Rows(first, last)));
      EXPECT_TRUE(SameBits(rows.dw_TI, whole.dw_TI.Rows(first, last)));
    }
  }
}

// An indexer with one head, positive products and w = 1 whose scores are the logits of a one-head
// attention.
TEST(IndexerLoss, OfAPerfectIndexerIsZeroWithZeroGradient) {
  const int64_t T = 20, S = 20, J = 4;
  Case c(DType::kF64, T, S, 1, J, 1, J);
  for (const Tensor& x : {c.q, c.k}) {
    for (int64_t i = 0; i < x.num_elements(); ++i)
      x.data<double>()[i] = std::fabs(x.data<double>()[i]);
  }
  for (int64_t t = 0; t < T; ++t) c.w.data<double>()[t] = 0.7;  // the attention's scale
  c.main_q = c.q;
  c.main_k = c.k.Reshaped({S, 1, J});
  const KeyWindows windows = CausalWindows(c.context, T);
  const IndexerLossResult dense = c.Dense(windows, 100.0, 8);
  const Tensor ids = AllIds(c.context, windows, S);
  std::vector<double> slots(T * S, 0);
  const std::vector<double> p = PlainTarget(c, ListsOf(windows), 0.7);
  const Tensor target = TensorOf(c.context, DType::kF64, {T, S}, p);
  const IndexerLossResult sparse =
      SparseIndexerLoss(c.context, c.q, c.k, c.w, ids, target, 1.0, 100.0, c.dk);
  for (const Tensor& zero : {dense.loss_T, dense.dq_TIJ, dense.dw_TI, sparse.loss_T, sparse.dq_TIJ,
                             sparse.dw_TI, c.dk}) {
    for (const double value : ToDoubles(zero)) EXPECT_NEAR(value, 0, 1e-12);
  }
  EXPECT_EQ(ToDoubles(dense.loss_T)[0], 0);  // a single candidate: exactly nothing to learn
}

TEST(IndexerLoss, RowsWithoutCandidatesAreZero) {
  const Case c(DType::kF32, 2, 3);
  const KeyWindows windows = WindowsOf(c.context, {0, 3}, {0, 3});
  const IndexerLossResult dense = c.Dense(windows, 1.0, 2);
  const Tensor ids = IntTensorOf(c.context, {2, 2}, std::vector<int32_t>(4, -1));
  const IndexerLossResult sparse = SparseIndexerLoss(
      c.context, c.q, c.k, c.w, ids, c.context.Zeros(DType::kF32, {2, 2}), 1.0, 1.0, c.dk);
  for (const Tensor& zero : {dense.loss_T, dense.dq_TIJ, dense.dw_TI, sparse.loss_T, sparse.dq_TIJ,
                             sparse.dw_TI, c.dk}) {
    for (const double value : ToDoubles(zero)) EXPECT_EQ(value, 0);
  }
}

TEST(IndexerLoss, ATargetOfZeroAddsNothing) {
  Case c(DType::kF32, 1, 2, 1, 1);
  c.q = TensorOf(c.context, DType::kF32, {1, 1, 1}, {1});
  c.k = TensorOf(c.context, DType::kF32, {2, 1}, {200, 0});
  c.w = TensorOf(c.context, DType::kF32, {1, 1}, {1});
  // pi of key 1 is e^-200, which fp32 cannot hold; its logarithm can.
  const Tensor ids = IntTensorOf(c.context, {1, 2}, {0, 1});
  const auto loss = [&](double p0, double p1) {
    const Tensor target = TensorOf(c.context, DType::kF32, {1, 2}, {p0, p1});
    return ToDoubles(
        SparseIndexerLoss(c.context, c.q, c.k, c.w, ids, target, 1.0, 1.0, c.dk).loss_T)[0];
  };
  EXPECT_EQ(loss(1, 0), 0);
  EXPECT_NEAR(loss(0, 1), 200, 1e-4);
  EXPECT_NEAR(loss(0.5, 0.5), 100 - std::log(2), 1e-4);
}

TEST(DenseIndexerLoss, NeverHoldsAnArrayOfRowsTimesKeys) {
  const int64_t T = 512, S = 512, I = 2, J = 4, H = 2, Q = 4, key_tile = 32;
  const Case c(DType::kF32, T, S, I, J, H, Q);
  const KeyWindows windows = CausalWindows(c.context, T);
  const DenseTarget target = c.Target(windows);
  c.context.pool().ResetPeak();
  const int64_t held = c.context.pool().Total().bytes;
  const IndexerLossResult result =
      DenseIndexerLoss(c.context, c.q, c.k, c.w, target, windows, 1.0, key_tile, c.dk);
  const int64_t used = c.context.pool().Total().peak_bytes - held;
  const int64_t outputs = result.loss_T.bytes() + result.dq_TIJ.bytes() + result.dw_TI.bytes();
  // Rows of one block times a tile for each index head and three more, and Matmul's packed
  // operands.
  EXPECT_LE(used, outputs + 32 * key_tile * (I + 3) * 4 + 64 * 1024);
  EXPECT_LT(used, T * S * 4 / 8);
}

TEST(IndexerLossDeathTest, NamesWhatDoesNotFit) {
  const Case c(DType::kF32, 2, 3);
  const KeyWindows windows = WindowsOf(c.context, {0, 0}, {3, 3});
  DenseTarget target = c.Target(windows);
  EXPECT_DEATH(DenseIndexerLoss(c.context, c.q, c.k, c.w, target, windows, 1.0, 0, c.dk),
               "0 vs. 1");
  target.q_THQ = target.q_THQ.Rows(0, 1);
  EXPECT_DEATH(DenseIndexerLoss(c.context, c.q, c.k, c.w, target, windows, 1.0, 8, c.dk),
               "target.lse_TH is F32\\[2, 2\\], expected F32\\[1, 2\\]");
  EXPECT_DEATH(SparseIndexerLoss(c.context, c.q, c.k, c.w, IntTensorOf(c.context, {2, 1}, {0, 1}),
                                 c.context.Zeros(DType::kF32, {2, 3}), 1.0, 1.0, c.dk),
               "target_TK is F32\\[2, 3\\], expected F32\\[2, 1\\]");
}

}  // namespace
}  // namespace baleen
