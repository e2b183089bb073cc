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
