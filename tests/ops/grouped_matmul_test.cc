// Grouped linear layers against one Linear for each row, with empty experts and all rows at one
// expert.
#include "kernels/ops/linear/grouped_matmul.h"

#include <gtest/gtest.h>

#include "kernels/ops/elementwise.h"
#include "kernels/ops/linear/matmul.h"
#include "tests/support/gradient_check.h"
#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::GradientError;
using testing::IntTensorOf;
using testing::RandomTensor;
using testing::RelativeError;
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
    const Tensor written = RandomTensor(context, DType::kF64, {experts, 4, 3}, 5);
    GroupedLinearBackwardWeight(context, dy, x, offsets_L1, written, Accumulate::kOverwrite);
    EXPECT_TRUE(SameBits(written, dweight));
  }
}

TEST(GroupedMatmul, SumsTheInputsGradientsOfTwoLayersByHand) {
  const Context context = Context::Cpu();
  const Tensor dya = TensorOf(context, DType::kF32, {3, 2}, {1, 2, 3, 4, 5, 6});
  const Tensor dyb = TensorOf(context, DType::kF32, {3, 2}, {7, 8, 9, 1, 2, 3});
  // Expert 0, none, expert 2: [out 2, in 1] each.
  const Tensor wa = TensorOf(context, DType::kF32, {3, 2, 1}, {1, 10, 0, 0, 100, 1000});
  const Tensor wb = TensorOf(context, DType::kF32, {3, 2, 1}, {2, 20, 0, 0, 200, 2000});
  const Tensor offsets = IntTensorOf(context, {4}, {0, 1, 1, 3});
  EXPECT_EQ(
      ToDoubles(GroupedLinearBackwardInputOfTwo(context, dya, wa, dyb, wb, offsets)),
      (std::vector<double>{1 + 20 + 14 + 160, 300 + 4000 + 1800 + 2000, 500 + 6000 + 400 + 6000}));
}

TEST(GroupedMatmul, SumsTheInputsGradientsOfTwoLayersAsTwoProductsAndASum) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    for (const std::vector<int32_t>& offsets : OffsetCases()) {
      const int64_t experts = static_cast<int64_t>(offsets.size()) - 1, rows = offsets.back();
      const Tensor dya = RandomTensor(context, dtype, {rows, 37}, 1);
      const Tensor dyb = RandomTensor(context, dtype, {rows, 37}, 2);
      const Tensor wa = RandomTensor(context, dtype, {experts, 37, 19}, 3);
      const Tensor wb = RandomTensor(context, dtype, {experts, 37, 19}, 4);
      const Tensor offsets_L1 = IntTensorOf(context, {experts + 1}, offsets);
      const Tensor expected = GroupedLinearBackwardInput(context, dya, wa, offsets_L1);
      AddInPlace(context, expected, GroupedLinearBackwardInput(context, dyb, wb, offsets_L1));
      const Tensor dx = GroupedLinearBackwardInputOfTwo(context, dya, wa, dyb, wb, offsets_L1);
      EXPECT_EQ(dx.shape(), (Shape{rows, 19}));
      EXPECT_LE(RelativeError(dx, expected), dtype == DType::kF32 ? 1e-6 : 1e-15);
    }
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

TEST(GroupedMatmulDeathTest, RefusesTwoLayersOfDifferentShapes) {
  const Context context = Context::Cpu();
  const Tensor dy = context.Zeros(DType::kF32, {4, 5}),
               weight = context.Zeros(DType::kF32, {2, 5, 3});
  const Tensor offsets = IntTensorOf(context, {3}, {0, 1, 4});
  const auto of_two = [&](const Tensor& dya, const Tensor& wa, const Tensor& dyb,
                          const Tensor& wb) {
    GroupedLinearBackwardInputOfTwo(context, dya, wa, dyb, wb, offsets);
  };
  EXPECT_DEATH(of_two(dy, weight, context.Zeros(DType::kF32, {3, 5}), weight),
               "dyb is F32\\[3, 5\\], expected F32\\[4, 5\\]");
  EXPECT_DEATH(of_two(dy, weight, dy, context.Zeros(DType::kF32, {2, 5, 2})),
               "second weight is F32\\[2, 5, 2\\], expected F32\\[2, 5, 3\\]");
  const Tensor wide = context.Zeros(DType::kF32, {4, 6});
  EXPECT_DEATH(of_two(wide, weight, wide, weight), "dya F32\\[4, 6\\], weight F32\\[2, 5, 3\\]");
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
