// Grouped linear layers against one Linear for each row, with empty experts and all rows at one
// expert.
#include "kernels/ops/linear/grouped_matmul.h"

#include <gtest/gtest.h>

#include "kernels/ops/linear/matmul.h"
#include "tests/support/gradient_check.h"
#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::GradientError;
using testing::IntTensorOf;
using testing::RandomTensor;
using testing::SameBits;
using testing::TensorOf;
using testing::ToDoubles;

const std::vector<std::vector<int32_t>>& OffsetCases() {
  // Usual; empty experts first, in the middle and last; all rows at one expert; no rows at all.
  static const std::vector<std::vector<int32_t>> cases = {
      {0, 2, 5, 7}, {0, 0, 4, 4, 5, 5}, {0, 0, 9, 9}, {0, 0, 0}, {0, 6}};
  return cases;
}

TEST(GroupedMatmul, MultipliesEachRowByItsExpertByHand) {
  const Context context = Context::Cpu();
  const Tensor x = TensorOf(context, DType::kF32, {3, 1}, {1, 2, 3});
  const Tensor weight = TensorOf(context, DType::kF32, {2, 2, 1}, {1, 10, 100, 1000});
  const Tensor offsets = IntTensorOf(context, {3}, {0, 1, 3});
  EXPECT_EQ(ToDoubles(GroupedLinear(context, x, weight, offsets)),
            (std::vector<double>{1, 10, 200, 2000, 300, 3000}));
}

TEST(GroupedMatmul, GivesEveryRowTheBitsOfALinearOfItsOwn) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    for (const std::vector<int32_t>& offsets : OffsetCases()) {
      const int64_t experts = static_cast<int64_t>(offsets.size()) - 1, rows = offsets.back();
      const Tensor x = RandomTensor(context, dtype, {rows, 19}, 1);
      const Tensor weight = RandomTensor(context, dtype, {experts, 37, 19}, 2);
      const Tensor offsets_L1 = IntTensorOf(context, {experts + 1}, offsets);
      const Tensor y = GroupedLinear(context, x, weight, offsets_L1);
      const Tensor dx = GroupedLinearBackwardInput(context, y, weight, offsets_L1);
      EXPECT_EQ(y.shape(), (Shape{rows, 37}));
      for (int64_t l = 0; l < experts; ++l) {
        const Tensor expert = weight.Rows(l, l + 1).Reshaped({37, 19});
        for (int64_t n = offsets[l]; n < offsets[l + 1]; ++n) {
          EXPECT_TRUE(SameBits(y.Rows(n, n + 1), Linear(context, x.Rows(n, n + 1), expert)));
          EXPECT_TRUE(
              SameBits(dx.Rows(n, n + 1), LinearBackwardInput(context, y.Rows(n, n + 1), expert)));
        }
      }
    }
  }
}

TEST(GroupedMatmul, HasTheGradientsOfCentralDifferences) {
  const Context context = Context::Cpu();
  for (const std::vector<int32_t>& offsets : OffsetCases()) {
    const int64_t experts = static_cast<int64_t>(offsets.size()) - 1, rows = offsets.back();
    const Tensor x = RandomTensor(context, DType::kF64, {rows, 3}, 1);
    const Tensor weight = RandomTensor(context, DType::kF64, {experts, 4, 3}, 2);
    const Tensor dy = RandomTensor(context, DType::kF64, {rows, 4}, 3);
    const Tensor offsets_L1 = IntTensorOf(context, {experts + 1}, offsets);
    const auto loss = [&] {
      const std::vector<double> y = ToDoubles(GroupedLinear(context, x, weight, offsets_L1));
      double sum = 0;
      for (size_t i = 0; i < y.size(); ++i) sum += y[i] * ToDoubles(dy)[i];
      return sum;
    };
    EXPECT_LT(GradientError(loss, x, GroupedLinearBackwardInput(context, dy, weight, offsets_L1)),
              1e-8);
    const Tensor dweight = context.Zeros(DType::kF64, {experts, 4, 3});
    GroupedLinearBackwardWeight(context, dy, x, offsets_L1, dweight);
    EXPECT_LT(GradientError(loss, weight, dweight), 1e-8);
  }
}

TEST(GroupedMatmul, AddsToTheWeightGradientAndLeavesEmptyExpertsAsTheyAre) {
  const Context context = Context::Cpu();
  const Tensor x = TensorOf(context, DType::kF32, {2, 1}, {1, 2});
  const Tensor dy = TensorOf(context, DType::kF32, {2, 1}, {10, 20});
  const Tensor dweight = TensorOf(context, DType::kF32, {3, 1, 1}, {1, 2, 3});
  GroupedLinearBackwardWeight(context, dy, x, IntTensorOf(context, {4}, {0, 0, 2, 2}), dweight);
  EXPECT_EQ(ToDoubles(dweight), (std::vector<double>{1, 52, 3}));
}

TEST(GroupedMatmulDeathTest, RefusesOffsetsThatDoNotCoverTheRows) {
  const Context context = Context::Cpu();
  const Tensor x = context.Zeros(DType::kF32, {4, 3}),
               weight = context.Zeros(DType::kF32, {2, 5, 3});
  EXPECT_DEATH(GroupedLinear(context, x, weight, IntTensorOf(context, {3}, {0, 1, 3})),
               "offsets go from 0 to 3, expected 0 to 4");
  EXPECT_DEATH(GroupedLinear(context, x, weight, IntTensorOf(context, {3}, {0, 5, 4})),
               "\\(5 vs. 4\\).*fall after expert 1");
  EXPECT_DEATH(GroupedLinear(context, x, weight, IntTensorOf(context, {2}, {0, 4})),
               "offsets is I32\\[2\\], expected I32\\[3\\]");
}

}  // namespace
}  // namespace baleen
