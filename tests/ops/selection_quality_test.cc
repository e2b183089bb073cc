// Selection quality: how much of the dense target the chosen keys hold, by hand and against the
// plain loops.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <numeric>

#include "kernels/ops/indexer/indexer_loss.h"
#include "tests/ops/attention_oracle.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the helpers of tests/support

Tensor TargetOf(const Context& context, const Tensor& q, const Tensor& k, const KeyWindows& windows,
                double scale) {
  const Tensor lse = Attention(context, q, k, k, windows, scale).lse_TH;
  return DenseTargetProbabilities(context, {q, k, lse, scale}, windows);
}

TEST(SelectionQuality, FourKeysByHand) {
  const Context context = Context::Cpu();
  const Tensor q = TensorOf(context, DType::kF64, {2, 1, 1}, {1, 1});
  const Tensor k = TensorOf(context, DType::kF64, {5, 1, 1},
                            {std::log(90), std::log(4), std::log(1), std::log(3), std::log(2)});
  const KeyWindows windows = WindowsOf(context, {1, 2}, {5, 2});
  const Tensor target = TargetOf(context, q, k, windows, 1.0);
  // p of row 0 = 0.4, 0.1, 0.3, 0.2 from key 1 on; the two best are 1 and 3. Row 1 sees nothing.
  const Tensor ids = IntTensorOf(context, {2, 3}, {1, 4, -1, -1, -1, -1});
  const SelectionQualityResult r = SelectionQuality(context, target, ids, windows);
  EXPECT_LT(RelativeError(ToDoubles(r.mass_T), {0.6, 0}), 1e-14);
  EXPECT_LT(RelativeError(ToDoubles(r.best_mass_T), {0.7, 0}), 1e-14);
  EXPECT_EQ(ToDoubles(r.recall_T), (std::vector<double>{0.5, 1}));
}

TEST(SelectionQuality, EqualsThePlainLoops) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const int64_t T = 30, S = 40, H = 3, K = 6;
    const Tensor q = RandomTensor(context, dtype, {T, H, 7}, 1);
    const Tensor k = RandomTensor(context, dtype, {S, H, 7}, 2);
    const KeyWindows windows = CausalWindows(context, T, S - T);
    const Tensor ids = ScatteredIds(context, T, K, S - T);
    const OracleAttention oracle = PlainAttention(q, k, k, q, ListsOf(windows), 0.4);
    const SelectionQualityResult r =
        SelectionQuality(context, TargetOf(context, q, k, windows, 0.4), ids, windows);
    for (const int64_t t : {0, 29, 13, 6}) {
      std::vector<double> p(S, 0);
      for (int64_t n = 0; n < H * S; ++n) p[n % S] += oracle.probs_THS[t * H * S + n] / H;
      std::vector<int64_t> order(S);
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(),
                       [&](int64_t a, int64_t b) { return p[a] > p[b]; });
      const std::vector<int64_t> chosen = ListsOf(ids)[t];
      ASSERT_EQ(chosen.size(), size_t{K});
      double mass = 0, best_mass = 0, common = 0;
      for (int64_t n = 0; n < K; ++n) {
        mass += p[chosen[n]];
        best_mass += p[order[n]];
        common += std::count(chosen.begin(), chosen.end(), order[n]);
      }
      const double tolerance = RoundingTolerance(dtype, 7 + S, 1.0);
      EXPECT_NEAR(ToDoubles(r.mass_T)[t], mass, tolerance);
      EXPECT_NEAR(ToDoubles(r.best_mass_T)[t], best_mass, tolerance);
      EXPECT_NEAR(ToDoubles(r.recall_T)[t], common / K, 1e-7);
    }
  }
}

TEST(SelectionQuality, OfTheBestKeysIsPerfectAndEqualOnesCountByIndex) {
  const Context context = Context::Cpu();
  const Tensor q = context.Zeros(DType::kF64, {1, 2, 3});  // every key has the same probability
  const Tensor k = RandomTensor(context, DType::kF64, {8, 2, 3}, 1);
  const KeyWindows windows = WindowsOf(context, {0}, {8});
  const Tensor target = TargetOf(context, q, k, windows, 1.0);
  const auto recall = [&](const std::vector<int32_t>& ids) {
    return ToDoubles(
        SelectionQuality(context, target, IntTensorOf(context, {1, 4}, ids), windows).recall_T)[0];
  };
  EXPECT_EQ(recall({0, 1, 2, 3}), 1);
  EXPECT_EQ(recall({2, 3, 4, 5}), 0.5);
  EXPECT_EQ(recall({4, 5, 6, 7}), 0);
}

TEST(SelectionQualityDeathTest, RefusesAKeyOutsideTheWindow) {
  const Context context = Context::Cpu();
  const Tensor q = RandomTensor(context, DType::kF32, {2, 1, 2}, 1);
  const Tensor k = RandomTensor(context, DType::kF32, {3, 1, 2}, 2);
  const KeyWindows windows = WindowsOf(context, {0, 0}, {1, 2});
  const Tensor target = TargetOf(context, q, k, windows, 1.0);
  const Tensor ids = IntTensorOf(context, {2, 1}, {0, 2});
  EXPECT_DEATH(SelectionQuality(context, target, ids, windows),
               "row 1 has chosen key 2 outside its window \\[0, 2\\)");
}

}  // namespace
}  // namespace baleen
