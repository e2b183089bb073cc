// Exact top-k: against a stable sort, on plateaus and signed zeros, short windows, padding, NaN.
#include "kernels/ops/indexer/topk_select.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "tests/ops/attention_oracle.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the helpers of tests/support

std::vector<int32_t> Ints(const Tensor& tensor) {
  return {tensor.data<int32_t>(), tensor.data<int32_t>() + tensor.num_elements()};
}

// The contract word for word: sort the window by (score descending, index ascending), take k, sort
// the ids.
std::vector<int32_t> SortedOracle(const double* scores, int64_t begin, int64_t end, int64_t k,
                                  int32_t* ties) {
  std::vector<int32_t> order(end - begin);
  std::iota(order.begin(), order.end(), static_cast<int32_t>(begin));
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return scores[a] > scores[b]; });
  const size_t taken = std::min<size_t>(order.size(), k);
  *ties = 0;
  for (size_t i = taken; i < order.size(); ++i) {
    *ties += scores[order[i]] == scores[order[taken - 1]];
  }
  order.resize(taken);
  std::sort(order.begin(), order.end());
  order.resize(k, -1);
  return order;
}

void ExpectSorted(const Context& context, const Tensor& scores_TS, const KeyWindows& windows,
                  int64_t k) {
  EXPECT_TRUE(TopkSelect(context, scores_TS, windows, k).scores_TK.empty());
  const TopkResult result = TopkSelect(context, scores_TS, windows, k, ChosenScores::kKeep);
  const std::vector<double> scores = ToDoubles(scores_TS), chosen = ToDoubles(result.scores_TK);
  const std::vector<int32_t> ids = Ints(result.ids_TK), ties = Ints(result.ties_T);
  ASSERT_EQ(result.ids_TK.shape(), (Shape{scores_TS.dim(0), k}));
  for (int64_t t = 0; t < scores_TS.dim(0); ++t) {
    int32_t expected_ties = 0;
    const std::vector<int32_t> expected =
        SortedOracle(&scores[t * scores_TS.dim(1)], windows.begin_T.data<int32_t>()[t],
                     windows.end_T.data<int32_t>()[t], k, &expected_ties);
    EXPECT_EQ(std::vector<int32_t>(&ids[t * k], &ids[t * k] + k), expected) << "row " << t;
    EXPECT_EQ(ties[t], expected_ties) << "row " << t;
    for (int64_t i = t * k; i < (t + 1) * k; ++i) {
      EXPECT_EQ(chosen[i], ids[i] < 0 ? 0 : scores[t * scores_TS.dim(1) + ids[i]]) << "row " << t;
    }
  }
  EXPECT_EQ(Ints(result.nan_row_1)[0], -1);
}

TEST(TopkSelect, FourOfSixByHand) {
  const Context context = Context::Cpu();
  const Tensor scores = TensorOf(context, DType::kF32, {1, 6}, {-1, 3, 0.5, -2, 0.5, 0.5});
  const TopkResult result = TopkSelect(context, scores, WindowsOf(context, {0}, {6}), 3);
  EXPECT_EQ(Ints(result.ids_TK), (std::vector<int32_t>{1, 2, 4}));
  EXPECT_EQ(Ints(result.ties_T)[0], 1);  // key 5
  EXPECT_EQ(Ints(result.nan_row_1)[0], -1);
}

TEST(TopkSelect, EqualsAStableSortOnRandomScores) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const int64_t T = 40, S = 97;
    const Tensor scores = RandomTensor(context, dtype, {T, S}, 11);
    std::vector<int32_t> begin(T), end(T);
    for (int64_t t = 0; t < T; ++t) {
      begin[t] = static_cast<int32_t>(t % 5 == 0 ? 0 : t);
      end[t] = static_cast<int32_t>(t % 7 == 0 ? begin[t] : std::min<int64_t>(S, begin[t] + 2 * t));
    }
    for (const int64_t k : {1, 2, 16, 64, 97, 120}) {
      SCOPED_TRACE(k);
      ExpectSorted(context, scores, WindowsOf(context, begin, end), k);
    }
  }
}

TEST(TopkSelect, TakesTheLowestIndicesOfAPlateau) {
  const Context context = Context::Cpu();
  const int64_t T = 30, S = 200;
  // Relu scores: two thirds are exact zeros of either sign, the rest of both signs, many of them
  // equal.
  Tensor scores = RandomTensor(context, DType::kF32, {T, S}, 12, 3.0);
  for (int64_t i = 0; i < T * S; ++i) {
    float& x = scores.data<float>()[i];
    x = i % 3 == 0 ? std::round(x) : (i % 2 == 0 ? 0.0f : -0.0f);
  }
  for (const int64_t k : {1, 20, 40, 100, 180}) {
    SCOPED_TRACE(k);
    ExpectSorted(context, scores, CausalWindows(context, T, S - T), k);
  }
}

TEST(TopkSelect, MinusZeroEqualsPlusZero) {
  const Context context = Context::Cpu();
  const Tensor scores = TensorOf(context, DType::kF32, {1, 5}, {-1, -0.0, 0.0, -0.0, 0.0});
  const TopkResult result = TopkSelect(context, scores, WindowsOf(context, {0}, {5}), 2);
  EXPECT_EQ(Ints(result.ids_TK), (std::vector<int32_t>{1, 2}));
  EXPECT_EQ(Ints(result.ties_T)[0], 2);
}

TEST(TopkSelect, KeepsAllKeysWhenFewerThanK) {
  const Context context = Context::Cpu();
  const Tensor scores = TensorOf(context, DType::kF64, {3, 4},
                                 {5, 1, 1, 9,  //
                                  5, 1, 1, 9,  //
                                  5, 1, 1, 9});
  const TopkResult result =
      TopkSelect(context, scores, WindowsOf(context, {0, 1, 2}, {4, 3, 2}), 6);
  EXPECT_EQ(Ints(result.ids_TK), (std::vector<int32_t>{0, 1, 2, 3, -1, -1,    //
                                                       1, 2, -1, -1, -1, -1,  //
                                                       -1, -1, -1, -1, -1, -1}));
  EXPECT_EQ(Ints(result.ties_T), (std::vector<int32_t>{0, 0, 0}));
}

TEST(TopkSelect, InfinitiesAreOrdinaryScores) {
  const Context context = Context::Cpu();
  const Tensor scores =
      TensorOf(context, DType::kF32, {1, 4}, {-INFINITY, -INFINITY, INFINITY, -INFINITY});
  const TopkResult result = TopkSelect(context, scores, WindowsOf(context, {0}, {4}), 2);
  EXPECT_EQ(Ints(result.ids_TK), (std::vector<int32_t>{0, 2}));
  EXPECT_EQ(Ints(result.ties_T)[0], 2);
}

TEST(TopkSelect, ReportsTheFirstRowWithANanAndSelectsNothingThere) {
  const Context context = Context::Cpu();
  const Tensor scores = TensorOf(context, DType::kF32, {4, 3},
                                 {1, 2, NAN,  //
                                  1, 2, 3,    //
                                  NAN, 2, 3,  //
                                  1, NAN, 3});
  // Row 0 does not see its NaN; row 2 has no more keys than k, and is reported all the same.
  const TopkResult result =
      TopkSelect(context, scores, WindowsOf(context, {0, 0, 0, 0}, {2, 3, 2, 3}), 2);
  EXPECT_EQ(Ints(result.nan_row_1)[0], 2);
  EXPECT_EQ(Ints(result.ids_TK), (std::vector<int32_t>{0, 1, 1, 2, -1, -1, -1, -1}));
}

TEST(TopkSelect, ARowHasTheSameIdsInEveryChunkOfRows) {
  const Context context = Context::Cpu();
  const Tensor scores = RandomTensor(context, DType::kF32, {50, 80}, 13);
  const KeyWindows windows = CausalWindows(context, 50, 30);
  const TopkResult whole = TopkSelect(context, scores, windows, 20);
  const TopkResult part = TopkSelect(
      context, scores.Rows(17, 41), {windows.begin_T.Rows(17, 41), windows.end_T.Rows(17, 41)}, 20);
  EXPECT_TRUE(SameBits(part.ids_TK, whole.ids_TK.Rows(17, 41)));
}

TEST(TopkSelectDeathTest, NamesWhatDoesNotFit) {
  const Context context = Context::Cpu();
  const Tensor scores = RandomTensor(context, DType::kF32, {2, 4}, 1);
  EXPECT_DEATH(TopkSelect(context, scores, WindowsOf(context, {0}, {4}), 2),
               "TopkSelect: windows.begin_T is I32\\[1\\], expected I32\\[2\\]");
  EXPECT_DEATH(TopkSelect(context, scores, WindowsOf(context, {0, 0}, {4, 4}), 0), "0 vs. 1");
}

}  // namespace
}  // namespace baleen
