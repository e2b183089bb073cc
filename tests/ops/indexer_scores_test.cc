// Indexer scores: by hand, against the plain loops, outside the windows, and bits that do not
// depend on chunks.
#include "kernels/ops/indexer/indexer_scores.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/ops/attention_oracle.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the helpers of tests/support

TEST(IndexerScores, TwoHeadsByHand) {
  const Context context = Context::Cpu();
  const Tensor q = TensorOf(context, DType::kF32, {1, 2, 2}, {1, 2, -1, 1});
  const Tensor k = TensorOf(context, DType::kF32, {4, 2}, {1, 1, -2, 1, 3, -5, 0, 0});
  const Tensor w = TensorOf(context, DType::kF32, {1, 2}, {10, -0.5});
  // Products: head 0: 3, 0, -7, 0; head 1: 0, 3, -8, 0.
  const Tensor scores = IndexerScores(context, q, k, w, WindowsOf(context, {0}, {4}));
  EXPECT_EQ(ToDoubles(scores), (std::vector<double>{30, -1.5, 0, 0}));
}

TEST(IndexerScores, EqualsThePlainLoopsInsideTheWindowsAndIsMinusInfinityOutside) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const int64_t T = 70, S = 90, I = 5, J = 12;
    const Tensor q = RandomTensor(context, dtype, {T, I, J}, 1);
    const Tensor k = RandomTensor(context, dtype, {S, J}, 2);
    const Tensor w = RandomTensor(context, dtype, {T, I}, 3);
    std::vector<int32_t> begin(T), end(T);
    for (int64_t t = 0; t < T; ++t) {
      begin[t] = static_cast<int32_t>(t < 30 ? 0 : 31);
      end[t] = static_cast<int32_t>(t % 8 == 5 ? begin[t] : t + 21);
      if (t < 10) begin[t] = end[t] = static_cast<int32_t>(t);
    }
    const Tensor scores = IndexerScores(context, q, k, w, WindowsOf(context, begin, end));
    const std::vector<double> a = ToDoubles(scores), x = ToDoubles(q), y = ToDoubles(k),
                              z = ToDoubles(w);
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t s = 0; s < S; ++s) {
        if (s < begin[t] || s >= end[t]) {
          EXPECT_EQ(a[t * S + s], -INFINITY);
          continue;
        }
        double expected = 0, magnitude = 0;
        for (int64_t j = 0; j < I; ++j) {
          double dot = 0;
          for (int64_t i = 0; i < J; ++i) dot += x[(t * I + j) * J + i] * y[s * J + i];
          expected += z[t * I + j] * std::max(dot, 0.0);
          magnitude += std::fabs(z[t * I + j]) * (std::fabs(dot) + std::sqrt(double(J)));
        }
        EXPECT_NEAR(a[t * S + s], expected, RoundingTolerance(dtype, J + I, magnitude));
      }
    }
  }
}

TEST(IndexerScores, ARowHasTheSameBitsInEveryChunkOfRows) {
  const Context context = Context::Cpu();
  const int64_t T = 100, S = 400;
  const Tensor q = RandomTensor(context, DType::kF32, {T, 4, 32}, 1);
  const Tensor k = RandomTensor(context, DType::kF32, {S, 32}, 2);
  const Tensor w = RandomTensor(context, DType::kF32, {T, 4}, 3);
  KeyWindows windows = CausalWindows(context, T, S - T);
  for (int64_t t = 50; t < T; ++t) windows.begin_T.data<int32_t>()[t] = 77;
  const Tensor whole = IndexerScores(context, q, k, w, windows);
  for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 1}, {1, 60}, {60, 100}}) {
    const Tensor rows =
        IndexerScores(context, q.Rows(first, last), k, w.Rows(first, last),
                      {windows.begin_T.Rows(first, last), windows.end_T.Rows(first, last)});
    EXPECT_TRUE(SameBits(rows, whole.Rows(first, last)));
  }
}

TEST(IndexerScores, LetsNanThrough) {
  const Context context = Context::Cpu();
  const Tensor q = TensorOf(context, DType::kF32, {1, 1, 1}, {1});
  const Tensor k = TensorOf(context, DType::kF32, {3, 1}, {2, NAN, -2});
  const Tensor w = TensorOf(context, DType::kF32, {1, 1}, {1});
  const std::vector<double> scores =
      ToDoubles(IndexerScores(context, q, k, w, WindowsOf(context, {0}, {3})));
  EXPECT_EQ(scores[0], 2);
  EXPECT_TRUE(std::isnan(scores[1]));
  EXPECT_EQ(scores[2], 0);
}

TEST(IndexerScoresFp8, TwoHeadsByHand) {
  const Context context = Context::Cpu();
  // Scales 2^-8 (amax 1 or 1.5) and 2^-7 (2, 3); the second key's codes are those of the first.
  const Tensor q = TensorOf(context, DType::kF32, {1, 2, 2}, {1, 2, -1.5, 1});
  const Tensor k = TensorOf(context, DType::kF32, {3, 2}, {1, 0.5, 2, 1, -3, 4});
  const Tensor w = TensorOf(context, DType::kF32, {1, 2}, {10, -0.5});
  const Fp8Codes q_codes = QuantiseFp8(context, q, 2), k_codes = QuantiseFp8(context, k, 2);
  EXPECT_EQ(ToDoubles(k_codes.scales), (std::vector<double>{0x1p-8, 0x1p-7, 0x1p-6}));
  // Products: head 0: 2, 4, 5; head 1: -1, -2, 8.5.
  const Tensor scores =
      IndexerScoresFp8(context, q_codes, k_codes, w, WindowsOf(context, {0}, {3}));
  EXPECT_EQ(ToDoubles(scores), (std::vector<double>{20, 40, 50 - 4.25}));
}

TEST(IndexerScoresFp8, HasTheBitsOfTheScoresOfItsValues) {
  const Context context = Context::Cpu();
  const int64_t T = 70, S = 90, I = 5, J = 12;
  std::vector<int32_t> begin(T), end(T);
  for (int64_t t = 0; t < T; ++t) {
    begin[t] = static_cast<int32_t>(t < 30 ? 0 : 31);
    end[t] = static_cast<int32_t>(t % 8 == 5 ? begin[t] : t + 21);
  }
  const KeyWindows windows = WindowsOf(context, begin, end);
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const Tensor q = RandomTensor(context, dtype, {T, I, J}, 1, 3);
    const Tensor k = RandomTensor(context, dtype, {S, J}, 2, 0.2);
    const Tensor w = RandomTensor(context, dtype, {T, I}, 3);
    const Tensor q_rounded = SimulateFp8(context, q, J), k_rounded = SimulateFp8(context, k, J);
    const Tensor expected = IndexerScores(context, q_rounded, k_rounded, w, windows);
    EXPECT_TRUE(SameBits(IndexerScoresFp8(context, QuantiseFp8(context, q, J),
                                          QuantiseFp8(context, k, J), w, windows),
                         expected));
    // Codes made of the rounded values, as the model makes them: other scales here and there.
    EXPECT_TRUE(SameBits(IndexerScoresFp8(context, QuantiseFp8(context, q_rounded, J),
                                          QuantiseFp8(context, k_rounded, J), w, windows),
                         expected));
  }
}

TEST(IndexerScoresFp8, LetsNanAndInfinityThroughAsNan) {
  const Context context = Context::Cpu();
  const Tensor q = TensorOf(context, DType::kF32, {2, 1, 2}, {1, 1, 1, NAN});
  const Tensor k = TensorOf(context, DType::kF32, {3, 2}, {2, 0, INFINITY, 1, -2, 1});
  const Tensor w = TensorOf(context, DType::kF32, {2, 1}, {1, 1});
  const std::vector<double> scores =
      ToDoubles(IndexerScoresFp8(context, QuantiseFp8(context, q, 2), QuantiseFp8(context, k, 2), w,
                                 WindowsOf(context, {0, 0}, {3, 3})));
  EXPECT_EQ(scores[0], 2);
  EXPECT_TRUE(std::isnan(scores[1]));
  EXPECT_EQ(scores[2], 0);
  for (int s = 3; s < 6; ++s) EXPECT_TRUE(std::isnan(scores[s])) << s;
}

TEST(IndexerScoresFp8DeathTest, NamesWhatDoesNotFit) {
  const Context context = Context::Cpu();
  const Fp8Codes q = QuantiseFp8(context, context.Zeros(DType::kF32, {2, 4, 8}), 8),
                 k = QuantiseFp8(context, context.Zeros(DType::kF32, {3, 8}), 8);
  const Tensor w = context.Zeros(DType::kF32, {2, 4});
  const KeyWindows windows = WindowsOf(context, {0, 0}, {3, 3});
  const auto with_q = [&](const Fp8Codes& codes) {
    IndexerScoresFp8(context, codes, k, w, windows);
  };
  const auto with_k = [&](const Fp8Codes& codes) {
    IndexerScoresFp8(context, q, codes, w, windows);
  };
  EXPECT_DEATH(with_q(k), "IndexerScoresFp8: q_TIJ.codes is F8_E4M3\\[3, 8\\]");
  EXPECT_DEATH(with_k(q), "IndexerScoresFp8: k_SJ.codes is F8_E4M3\\[2, 4, 8\\]");
  EXPECT_DEATH(with_q({context.Zeros(DType::kF32, {2, 4, 8}), q.scales}),
               "q_TIJ.codes is F32\\[2, 4, 8\\], expected F8_E4M3\\[2, 4, 8\\]");
  EXPECT_DEATH(with_q({q.codes, context.Zeros(DType::kF32, {2, 4, 2})}),
               "q_TIJ.scales is F32\\[2, 4, 2\\], expected F32\\[2, 4, 1\\]");
  EXPECT_DEATH(with_k(QuantiseFp8(context, context.Zeros(DType::kF32, {3, 12}), 12)),
               "k_SJ.codes is F8_E4M3\\[3, 12\\], expected F8_E4M3\\[3, 8\\]");
  EXPECT_DEATH(with_k({k.codes, context.Zeros(DType::kF64, {3, 1})}),
               "k_SJ.scales is F64\\[3, 1\\], expected F32\\[3, 1\\]");
  EXPECT_DEATH(IndexerScoresFp8(context, q, k, context.Zeros(DType::kF32, {2, 5}), windows),
               "w_TI is F32\\[2, 5\\], expected F32\\[2, 4\\]");
  EXPECT_DEATH(IndexerScoresFp8(context, q, k, w, WindowsOf(context, {0}, {3})),
               "windows.begin_T is I32\\[1\\], expected I32\\[2\\]");
  EXPECT_DEATH(IndexerScoresFp8(context, q, k, w, WindowsOf(context, {0, 0}, {3, 4})),
               "row 1 has the key window \\[0, 4\\) of 3 keys");
}

TEST(IndexerScoresDeathTest, NamesWhatDoesNotFit) {
  const Context context = Context::Cpu();
  const Tensor q = context.Zeros(DType::kF32, {2, 4, 8}), k = context.Zeros(DType::kF32, {3, 8});
  EXPECT_DEATH(IndexerScores(context, q, k, context.Zeros(DType::kF32, {2, 5}),
                             WindowsOf(context, {0, 0}, {3, 3})),
               "IndexerScores: w_TI is F32\\[2, 5\\], expected F32\\[2, 4\\]");
  EXPECT_DEATH(IndexerScores(context, q, k, context.Zeros(DType::kF32, {2, 4}),
                             WindowsOf(context, {0, 0}, {3, 4})),
               "row 1 has the key window \\[0, 4\\) of 3 keys");
}

}  // namespace
}  // namespace baleen
