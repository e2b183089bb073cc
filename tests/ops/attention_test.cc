// Dense and masked attention: by hand, against the plain loops, against central differences, and
// what must be exact.
#include "kernels/ops/attention/attention.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/ops/attention_oracle.h"
#include "tests/support/gradient_check.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the helpers of tests/support

// Random operands of one shape; scale as in the model, so that logits are of order one.
struct Case {
  Case(DType dtype, int64_t T, int64_t S, int64_t H, int64_t Q, int64_t V)
      : q(RandomTensor(context, dtype, {T, H, Q}, 1)),
        k(RandomTensor(context, dtype, {S, H, Q}, 2)),
        v(RandomTensor(context, dtype, {S, H, V}, 3)),
        d_out(RandomTensor(context, dtype, {T, H, V}, 4)),
        dk(context.Zeros(dtype, {S, H, Q})),
        dv(context.Zeros(dtype, {S, H, V})),
        scale(1 / std::sqrt(static_cast<double>(Q))) {}
  Context context = Context::Cpu();
  Tensor q, k, v, d_out, dk, dv;
  double scale;
};

// Windows of every kind at once: causal, a document that begins late, one key, none.
KeyWindows MixedWindows(const Context& context, int64_t T, int64_t S) {
  std::vector<int32_t> begin(T), end(T);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t place = t * S / T;
    begin[t] = static_cast<int32_t>(t < T / 2 ? 0 : std::max<int64_t>(0, S / 2 - 3));
    end[t] = static_cast<int32_t>(std::max<int64_t>(begin[t], place + 1));
    if (t % 11 == 3) begin[t] = end[t] - (end[t] > begin[t] ? 1 : 0);
    if (t % 11 == 5) begin[t] = end[t];
  }
  return WindowsOf(context, begin, end);
}

TEST(Attention, ThreeKeysByHand) {
  Case c(DType::kF64, 1, 3, 1, 1, 1);
  c.q = TensorOf(c.context, DType::kF64, {1, 1, 1}, {1});
  c.k = TensorOf(c.context, DType::kF64, {3, 1, 1}, {0, std::log(2), std::log(5)});
  c.v = TensorOf(c.context, DType::kF64, {3, 1, 1}, {8, 16, 24});
  c.d_out = TensorOf(c.context, DType::kF64, {1, 1, 1}, {1});
  const KeyWindows windows = WindowsOf(c.context, {0}, {3});
  // P = 1/8, 2/8, 5/8.
  const AttentionResult result = Attention(c.context, c.q, c.k, c.v, windows, 1.0);
  EXPECT_NEAR(ToDoubles(result.o_THV)[0], 1 + 4 + 15, 1e-13);
  EXPECT_NEAR(ToDoubles(result.lse_TH)[0], std::log(8), 1e-15);
  // dS = P (v - 20) = -1.5, -1, 2.5.
  const Tensor dq =
      AttentionBackward(c.context, c.d_out, c.q, c.k, c.v, result, windows, 1.0, c.dk, c.dv);
  EXPECT_NEAR(ToDoubles(dq)[0], -std::log(2) + 2.5 * std::log(5), 1e-13);
  EXPECT_LT(RelativeError(ToDoubles(c.dk), {-1.5, -1, 2.5}), 1e-14);
  EXPECT_LT(RelativeError(ToDoubles(c.dv), {0.125, 0.25, 0.625}), 1e-15);
}

TEST(MaskedAttention, TwoOfThreeKeysByHand) {
  Case c(DType::kF64, 1, 3, 1, 1, 1);
  c.q = TensorOf(c.context, DType::kF64, {1, 1, 1}, {1});
  c.k = TensorOf(c.context, DType::kF64, {3, 1, 1}, {0, std::log(2), std::log(5)});
  c.v = TensorOf(c.context, DType::kF64, {3, 1, 1}, {8, 16, 24});
  const Tensor ids = IntTensorOf(c.context, {1, 3}, {2, -1, 0});
  const AttentionResult result = MaskedAttention(c.context, c.q, c.k, c.v, ids, 1.0);
  EXPECT_NEAR(ToDoubles(result.o_THV)[0], (24 * 5 + 8) / 6.0, 1e-13);
  EXPECT_NEAR(ToDoubles(result.lse_TH)[0], std::log(6), 1e-15);
  const Tensor target = RandomTensor(c.context, DType::kF64, {1, 3}, 9);  // to be overwritten
  MaskedAttentionBackward(c.context, c.d_out, c.q, c.k, c.v, result, ids, 1.0, c.dk, c.dv, target);
  EXPECT_LT(RelativeError(ToDoubles(target), {5 / 6.0, 0, 1 / 6.0}), 1e-15);
  EXPECT_EQ(ToDoubles(c.dk)[1], 0);
  EXPECT_EQ(ToDoubles(c.dv)[1], 0);
}

// Errors of all outputs against the oracle. A logit of order one sums Q products; o, dq sum S keys;
// dk, dv sum T rows.
void ExpectMatches(const Case& c, const AttentionResult& result, const Tensor& dq,
                   const OracleAttention& oracle) {
  const int64_t Q = c.q.dim(2), S = c.k.dim(0), T = c.q.dim(0);
  const double tolerance = RoundingTolerance(c.q.dtype(), Q + S + T, 1.0);
  EXPECT_LT(ErrorOf(ToDoubles(result.o_THV), oracle.o_THV), tolerance);
  EXPECT_LT(ErrorOf(ToDoubles(dq), oracle.dq_THQ), tolerance);
  EXPECT_LT(ErrorOf(ToDoubles(c.dk), oracle.dk_SHQ), tolerance);
  EXPECT_LT(ErrorOf(ToDoubles(c.dv), oracle.dv_SHV), tolerance);
  const std::vector<double> lse = ToDoubles(result.lse_TH);
  for (size_t i = 0; i < lse.size(); ++i) {
    if (std::isinf(oracle.lse_TH[i])) {
      EXPECT_EQ(lse[i], oracle.lse_TH[i]) << i;
    } else {
      EXPECT_NEAR(lse[i], oracle.lse_TH[i], tolerance * 4) << i;
    }
  }
}

TEST(Attention, EqualsThePlainLoopsOnMixedWindows) {
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    for (const auto& [T, S] : {std::pair<int64_t, int64_t>{1, 1}, {7, 5}, {70, 70}, {130, 300}}) {
      SCOPED_TRACE(::testing::Message() << DTypeName(dtype).data() << " T " << T << " S " << S);
      const Case c(dtype, T, S, 3, 12, 5);
      const KeyWindows windows = MixedWindows(c.context, T, S);
      const AttentionResult result = Attention(c.context, c.q, c.k, c.v, windows, c.scale);
      const Tensor dq = AttentionBackward(c.context, c.d_out, c.q, c.k, c.v, result, windows,
                                          c.scale, c.dk, c.dv);
      ExpectMatches(c, result, dq,
                    PlainAttention(c.q, c.k, c.v, c.d_out, ListsOf(windows), c.scale));
    }
  }
}

TEST(MaskedAttention, EqualsThePlainLoopsAndItsTargetSumsToTheHeadCount) {
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    for (const int64_t k : {1, 6, 200}) {
      SCOPED_TRACE(::testing::Message() << DTypeName(dtype).data() << " K " << k);
      const int64_t T = 130, S = 150, H = 3;
      const Case c(dtype, T, S, H, 12, 5);
      const Tensor ids = ScatteredIds(c.context, T, k, /*offset=*/20, /*empty_every=*/9);
      const AttentionResult result = MaskedAttention(c.context, c.q, c.k, c.v, ids, c.scale);
      const Tensor target = c.context.Empty(dtype, {T, k});
      const Tensor dq = MaskedAttentionBackward(c.context, c.d_out, c.q, c.k, c.v, result, ids,
                                                c.scale, c.dk, c.dv, target);
      const OracleAttention oracle = PlainAttention(c.q, c.k, c.v, c.d_out, ListsOf(ids), c.scale);
      ExpectMatches(c, result, dq, oracle);
      const std::vector<double> target_values = ToDoubles(target);
      for (int64_t t = 0; t < T; ++t) {
        double row_sum = 0;
        for (int64_t i = 0; i < k; ++i) {
          const int64_t s = ids.data<int32_t>()[t * k + i];
          double expected = 0;
          for (int64_t h = 0; s >= 0 && h < H; ++h)
            expected += oracle.probs_THS[(t * H + h) * S + s];
          EXPECT_NEAR(target_values[t * k + i], expected, RoundingTolerance(dtype, 12, 4.0) * H);
          row_sum += target_values[t * k + i];
        }
        EXPECT_NEAR(row_sum, t % 9 == 8 ? 0 : H, RoundingTolerance(dtype, 12, 4.0) * H);
      }
    }
  }
}

TEST(Attention, GradientsAreTheCentralDifferences) {
  Case c(DType::kF64, 9, 11, 2, 4, 3);
  const KeyWindows windows = MixedWindows(c.context, 9, 11);
  const AttentionResult result = Attention(c.context, c.q, c.k, c.v, windows, c.scale);
  const Tensor dq =
      AttentionBackward(c.context, c.d_out, c.q, c.k, c.v, result, windows, c.scale, c.dk, c.dv);
  const auto loss = [&] {
    return DotOf(c.d_out, Attention(c.context, c.q, c.k, c.v, windows, c.scale).o_THV);
  };
  EXPECT_LT(GradientError(loss, c.q, dq), 1e-8);
  EXPECT_LT(GradientError(loss, c.k, c.dk), 1e-8);
  EXPECT_LT(GradientError(loss, c.v, c.dv), 1e-8);
}

TEST(MaskedAttention, GradientsAreTheCentralDifferences) {
  Case c(DType::kF64, 9, 9, 2, 4, 3);
  const Tensor ids = ScatteredIds(c.context, 9, 4, 0, /*empty_every=*/5);
  const AttentionResult result = MaskedAttention(c.context, c.q, c.k, c.v, ids, c.scale);
  const Tensor target = c.context.Empty(DType::kF64, {9, 4});
  const Tensor dq = MaskedAttentionBackward(c.context, c.d_out, c.q, c.k, c.v, result, ids, c.scale,
                                            c.dk, c.dv, target);
  const auto loss = [&] {
    return DotOf(c.d_out, MaskedAttention(c.context, c.q, c.k, c.v, ids, c.scale).o_THV);
  };
  EXPECT_LT(GradientError(loss, c.q, dq), 1e-8);
  EXPECT_LT(GradientError(loss, c.k, c.dk), 1e-8);
  EXPECT_LT(GradientError(loss, c.v, c.dv), 1e-8);
}

TEST(Attention, GradientsAreAddedToWhatIsThere) {
  const Case c(DType::kF64, 5, 5, 2, 4, 3);
  const KeyWindows windows = CausalWindows(c.context, 5);
  const AttentionResult result = Attention(c.context, c.q, c.k, c.v, windows, c.scale);
  const Tensor dk = TensorOf(c.context, DType::kF64, {5, 2, 4}, std::vector<double>(40, 10));
  const Tensor dv = TensorOf(c.context, DType::kF64, {5, 2, 3}, std::vector<double>(30, 20));
  AttentionBackward(c.context, c.d_out, c.q, c.k, c.v, result, windows, c.scale, c.dk, c.dv);
  AttentionBackward(c.context, c.d_out, c.q, c.k, c.v, result, windows, c.scale, dk, dv);
  for (int i = 0; i < 40; ++i) EXPECT_NEAR(ToDoubles(dk)[i], 10 + ToDoubles(c.dk)[i], 1e-13);
  for (int i = 0; i < 30; ++i) EXPECT_NEAR(ToDoubles(dv)[i], 20 + ToDoubles(c.dv)[i], 1e-13);
}

// Rows that share a block begin at different keys, and each sees several runs of keys.
KeyWindows StaggeredWindows(const Context& context, int64_t T, int64_t S) {
  std::vector<int32_t> begin(T), end(T);
  for (int64_t t = 0; t < T; ++t) {
    begin[t] = static_cast<int32_t>(t % 50 < 20 ? t / 50 : 150 + t % 7);
    end[t] = static_cast<int32_t>(t % 11 == 5 ? begin[t] : S - t % 13);
  }
  return WindowsOf(context, begin, end);
}

TEST(Attention, ARowHasTheSameBitsInEveryChunkOfRows) {
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const int64_t T = 300, S = 700;
    const Case c(dtype, T, S, 2, 40, 24);
    const KeyWindows windows = StaggeredWindows(c.context, T, S);
    const AttentionResult whole = Attention(c.context, c.q, c.k, c.v, windows, c.scale);
    const Tensor whole_dq =
        AttentionBackward(c.context, c.d_out, c.q, c.k, c.v, whole, windows, c.scale, c.dk, c.dv);
    const Tensor dk = c.context.Zeros(dtype, c.k.shape()), dv = c.context.Zeros(dtype, c.v.shape());
    for (const auto& [first, last] :
         {std::pair<int64_t, int64_t>{0, 1}, {1, 38}, {38, 171}, {171, 190}, {190, 300}}) {
      SCOPED_TRACE(::testing::Message() << "rows " << first << ".." << last);
      const KeyWindows part = {windows.begin_T.Rows(first, last), windows.end_T.Rows(first, last)};
      const Tensor q = c.q.Rows(first, last);
      const AttentionResult rows = Attention(c.context, q, c.k, c.v, part, c.scale);
      EXPECT_TRUE(SameBits(rows.o_THV, whole.o_THV.Rows(first, last)));
      EXPECT_TRUE(SameBits(rows.lse_TH, whole.lse_TH.Rows(first, last)));
      const Tensor dq = AttentionBackward(c.context, c.d_out.Rows(first, last), q, c.k, c.v, rows,
                                          part, c.scale, dk, dv);
      EXPECT_TRUE(SameBits(dq, whole_dq.Rows(first, last)));
    }
    EXPECT_LT(RelativeError(dk, c.dk), RoundingTolerance(dtype, T, 1.0));
    EXPECT_LT(RelativeError(dv, c.dv), RoundingTolerance(dtype, T, 1.0));
  }
}

TEST(MaskedAttention, ARowHasTheSameBitsInEveryChunkOfRows) {
  const int64_t T = 300, S = 700, K = 24;
  const Case c(DType::kF32, T, S, 2, 40, 24);
  const Tensor ids = ScatteredIds(c.context, T, K, /*offset=*/400, /*empty_every=*/13);
  const Tensor target = c.context.Empty(DType::kF32, {T, K});
  const AttentionResult whole = MaskedAttention(c.context, c.q, c.k, c.v, ids, c.scale);
  const Tensor whole_dq = MaskedAttentionBackward(c.context, c.d_out, c.q, c.k, c.v, whole, ids,
                                                  c.scale, c.dk, c.dv, target);
  for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 1}, {1, 90}, {90, 300}}) {
    SCOPED_TRACE(::testing::Message() << "rows " << first << ".." << last);
    const Tensor q = c.q.Rows(first, last), part = ids.Rows(first, last);
    const Tensor part_target = c.context.Empty(DType::kF32, {last - first, K});
    const AttentionResult rows = MaskedAttention(c.context, q, c.k, c.v, part, c.scale);
    const Tensor dq = MaskedAttentionBackward(c.context, c.d_out.Rows(first, last), q, c.k, c.v,
                                              rows, part, c.scale, c.dk, c.dv, part_target);
    EXPECT_TRUE(SameBits(rows.o_THV, whole.o_THV.Rows(first, last)));
    EXPECT_TRUE(SameBits(rows.lse_TH, whole.lse_TH.Rows(first, last)));
    EXPECT_TRUE(SameBits(dq, whole_dq.Rows(first, last)));
    EXPECT_TRUE(SameBits(part_target, target.Rows(first, last)));
  }
}

TEST(MaskedAttention, WithAllKeysOfTheWindowIsDenseAttention) {
  const Case c(DType::kF64, 20, 20, 2, 8, 6);
  std::vector<int32_t> ids(20 * 20, -1);
  for (int t = 0; t < 20; ++t) {
    for (int s = 0; s <= t; ++s) ids[t * 20 + s] = s;
  }
  const AttentionResult dense =
      Attention(c.context, c.q, c.k, c.v, CausalWindows(c.context, 20), c.scale);
  const AttentionResult masked =
      MaskedAttention(c.context, c.q, c.k, c.v, IntTensorOf(c.context, {20, 20}, ids), c.scale);
  EXPECT_TRUE(SameBits(masked.o_THV, dense.o_THV));
  EXPECT_TRUE(SameBits(masked.lse_TH, dense.lse_TH));
}

TEST(Attention, RowsWithoutKeysAreZeroAndChangeNothing) {
  const Case c(DType::kF32, 3, 4, 2, 4, 3);
  const KeyWindows windows = WindowsOf(c.context, {0, 2, 4}, {0, 2, 4});
  const AttentionResult result = Attention(c.context, c.q, c.k, c.v, windows, c.scale);
  const Tensor dq =
      AttentionBackward(c.context, c.d_out, c.q, c.k, c.v, result, windows, c.scale, c.dk, c.dv);
  for (const double o : ToDoubles(result.o_THV)) EXPECT_EQ(o, 0);
  for (const double lse : ToDoubles(result.lse_TH)) EXPECT_EQ(lse, -INFINITY);
  for (const Tensor& gradient : {dq, c.dk, c.dv}) {
    for (const double value : ToDoubles(gradient)) EXPECT_EQ(value, 0);
  }
}

TEST(Attention, LargeLogitsDoNotOverflow) {
  Case c(DType::kF32, 2, 2, 1, 1, 1);
  c.q = TensorOf(c.context, DType::kF32, {2, 1, 1}, {1000, -1000});
  c.k = TensorOf(c.context, DType::kF32, {2, 1, 1}, {1, 2});
  c.v = TensorOf(c.context, DType::kF32, {2, 1, 1}, {3, 4});
  const AttentionResult result =
      Attention(c.context, c.q, c.k, c.v, WindowsOf(c.context, {0, 0}, {2, 2}), 1.0);
  EXPECT_EQ(ToDoubles(result.o_THV), (std::vector<double>{4, 3}));
  EXPECT_EQ(ToDoubles(result.lse_TH), (std::vector<double>{2000, -1000}));
}

TEST(Attention, HoldsOnlyTwoBlocksOfScores) {
  const int64_t T = 1024, S = 1024;
  const Case c(DType::kF32, T, S, 1, 8, 8);
  const KeyWindows windows = CausalWindows(c.context, T);
  c.context.pool().ResetPeak();
  const int64_t held = c.context.pool().Total().bytes;
  const AttentionResult result = Attention(c.context, c.q, c.k, c.v, windows, c.scale);
  AttentionBackward(c.context, c.d_out, c.q, c.k, c.v, result, windows, c.scale, c.dk, c.dv);
  const int64_t outputs = c.q.bytes() + result.o_THV.bytes() + result.lse_TH.bytes();
  const int64_t blocks = 2 * 64 * S * 4;
  const int64_t panels = 600 * 1024;  // Matmul's packed operands
  EXPECT_LE(c.context.pool().Total().peak_bytes - held, outputs + blocks + panels);
  EXPECT_LT(outputs + blocks + panels, T * S * 4);
}

TEST(AttentionDeathTest, NamesWhatDoesNotFit) {
  const Case c(DType::kF32, 3, 4, 2, 4, 3);
  const KeyWindows windows = WindowsOf(c.context, {0, 0, 0}, {1, 2, 3});
  const Tensor wrong_k = RandomTensor(c.context, DType::kF32, {4, 2, 5}, 1);
  EXPECT_DEATH(Attention(c.context, c.q, wrong_k, c.v, windows, 1.0),
               "Attention: k_SHQ is F32\\[4, 2, 5\\], expected F32\\[4, 2, 4\\]");
  EXPECT_DEATH(Attention(c.context, c.q, c.k, c.v, WindowsOf(c.context, {0, 0, 0}, {1, 2, 5}), 1.0),
               "row 2 has the key window \\[0, 5\\) of 4 keys");
  EXPECT_DEATH(Attention(c.context, c.q, c.k, c.v, WindowsOf(c.context, {0, 2, 0}, {1, 1, 4}), 1.0),
               "row 1 has the key window \\[2, 1\\) of 4 keys");
  EXPECT_DEATH(
      MaskedAttention(c.context, c.q, c.k, c.v, IntTensorOf(c.context, {3, 1}, {0, 1, 4}), 1.0),
      "row 2 names key 4 of 4 keys");
  EXPECT_DEATH(MaskedAttention(c.context, c.q, c.k, c.v,
                               IntTensorOf(c.context, {3, 2}, {0, 1, 3, 3, -1, -1}), 1.0),
               "row 1 names key 3 twice");
  const Tensor half = c.context.Empty(DType::kBF16, {3, 2, 4});
  EXPECT_DEATH(Attention(c.context, half, c.context.Empty(DType::kBF16, {4, 2, 4}),
                         c.context.Empty(DType::kBF16, {4, 2, 3}), windows, 1.0),
               "not BF16");
}

}  // namespace
}  // namespace baleen
