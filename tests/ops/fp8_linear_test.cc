// Block FP8 on the CPU: scales and codes worked out by hand, both orientations of an operand, and
// products that are those of the values the codes stand for.
#include "kernels/ops/linear/fp8_linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "kernels/ops/linear/grouped_matmul.h"
#include "kernels/ops/linear/matmul.h"
#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the helpers of tests/support

Tensor Values(const Context& context, const Fp8Operand& operand, DType dtype) {
  return Dequantise(context, operand, dtype).Reshaped({operand.outer, operand.depth});
}

TEST(Fp8Quantise, TakesTheSmallestPowerOfTwoThatHoldsTheLargestValue) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    // 448: scale 1. 500: scale 2, 17 is the tie between 16 and 18 (8, 9 steps of 2). Zeros: 1.
    // 1e-30 is no power of two times 448 but near: no floor takes it to 0.
    const Tensor x =
        TensorOf(context, dtype, {4, 2}, {448, -17, 500, 17, 0, 0, 0x1p-100, 0x1p-101});
    const Fp8Operand rows = QuantiseRows(context, x);
    EXPECT_EQ(rows.codes.shape(), (Shape{16, 128}));
    ASSERT_EQ(rows.scales.shape(), (Shape{1, 16}));
    const std::vector<double> scales = ToDoubles(rows.scales);
    EXPECT_EQ(std::vector<double>(scales.begin(), scales.begin() + 4),
              (std::vector<double>{1, 2, 1, 0x1p-108}));
    EXPECT_EQ(ToDoubles(Dequantise(context, rows, dtype)),
              (std::vector<double>{448, -16, 512, 16, 0, 0, 0x1p-100, 0x1p-101}));
  }
}

TEST(Fp8Quantise, GivesEveryRunOf128AScaleOfItsOwn) {
  const Context context = Context::Cpu();
  std::vector<double> values(2 * 130, 1.0);
  values[127] = 448;  // row 0, first run: 1.03125 would be lost there only
  values[129] = values[0] = 1.03125;
  const Tensor x = TensorOf(context, DType::kF32, {2, 130}, values);
  const Fp8Operand rows = QuantiseRows(context, x);
  ASSERT_EQ(rows.scales.shape(), (Shape{2, 16}));
  EXPECT_EQ(rows.scales.data<float>()[0], 1.0f);
  EXPECT_EQ(rows.scales.data<float>()[1], 0x1p-8f);
  EXPECT_EQ(rows.scales.data<float>()[16], 0x1p-8f);  // the second run, row 0
  const std::vector<double> back = ToDoubles(Dequantise(context, rows, DType::kF32));
  EXPECT_EQ(back[127], 448);
  EXPECT_EQ(back[0], 1.0);
  EXPECT_EQ(back[129], 1.0);  // 1.03125 lies a quarter of a step above 1
}

TEST(Fp8Quantise, StaysWithinHalfAStepOfEveryValue) {
  const Context context = Context::Cpu();
  const Tensor x = RandomTensor(context, DType::kF64, {150, 300}, 1);
  const std::vector<double> exact = ToDoubles(x);
  const std::vector<double> rows =
      ToDoubles(Dequantise(context, QuantiseRows(context, x), DType::kF64));
  for (size_t i = 0; i < exact.size(); ++i) {
    // Half of 2^-3 of the value, or half of the smallest step where |x| < 8 is a run's largest.
    ASSERT_LE(std::abs(rows[i] - exact[i]), std::max(std::abs(exact[i]) * 0x1p-4, 0x1p-16)) << i;
  }
}

TEST(Fp8Quantise, QuantisesColumnsAsTheRowsOfTheTranspose) {
  const Context context = Context::Cpu();
  const int64_t n = 131, c = 19;
  const Tensor x = RandomTensor(context, DType::kF32, {n, c}, 1);
  const Tensor turned = context.Empty(DType::kF32, {c, n});
  for (int64_t i = 0; i < n * c; ++i) {
    turned.data<float>()[i % c * n + i / c] = x.data<float>()[i];
  }
  const Fp8Operand columns = QuantiseColumns(context, x), rows = QuantiseRows(context, turned);
  EXPECT_TRUE(SameBits(columns.codes, rows.codes));
  EXPECT_TRUE(SameBits(columns.scales, rows.scales));
  const Fp8RowsAndColumns both = QuantiseRowsAndColumns(context, turned);
  EXPECT_TRUE(SameBits(both.rows.codes, rows.codes));
  EXPECT_TRUE(SameBits(both.columns.codes, QuantiseColumns(context, turned).codes));
}

TEST(Fp8Quantise, GivesAWeightTheSameValuesForBothSums) {
  const Context context = Context::Cpu();
  const int64_t l = 2, r = 144, c = 272;
  const Tensor w = RandomTensor(context, DType::kF32, {l, r, c}, 1);
  const Fp8Operand forward = QuantiseWeight(context, w, Fp8Side::kColumns),
                   backward = QuantiseWeight(context, w, Fp8Side::kRows);
  EXPECT_EQ(forward.scales.shape(), (Shape{l * 2, 4}));
  EXPECT_EQ(backward.scales.shape(), (Shape{l * 3, 4}));
  const Tensor a = Dequantise(context, forward, DType::kF32),
               b = Dequantise(context, backward, DType::kF32);
  for (int64_t i = 0; i < l * r * c; ++i) {
    const int64_t m = i / (r * c), row = i / c % r, column = i % c;
    ASSERT_EQ(a.data<float>()[i], b.data<float>()[(m * c + column) * r + row]) << i;
  }
  // One large value takes its block of 128 x 128 along, and no other.
  w.data<float>()[0] = 1e6f;
  const Tensor changed =
      Dequantise(context, QuantiseWeight(context, w, Fp8Side::kColumns), DType::kF32);
  EXPECT_EQ(changed.data<float>()[127 * c + 127], 0.0f);
  EXPECT_EQ(changed.data<float>()[127 * c + 128], a.data<float>()[127 * c + 128]);
  EXPECT_EQ(changed.data<float>()[128 * c], a.data<float>()[128 * c]);
}

TEST(Fp8Quantise, KeepsNotANumberAndMakesItOfInfinity) {
  const Context context = Context::Cpu();
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = INFINITY;
  const Tensor x = TensorOf(context, DType::kF64, {2, 3}, {1, nan, 2, 1, -inf, 2});
  const std::vector<double> back =
      ToDoubles(Dequantise(context, QuantiseRows(context, x), DType::kF64));
  EXPECT_EQ(back[0], 1);
  EXPECT_TRUE(std::isnan(back[1]));
  EXPECT_EQ(back[2], 2);
  for (int i = 3; i < 6; ++i) EXPECT_TRUE(std::isnan(back[i])) << i;
}

TEST(Fp8Linear, IsTheLinearLayerOfTheRoundedValues) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    for (const int64_t rows : {0, 1, 150}) {
      const int64_t in = 272, out = 144;
      const Tensor x = RandomTensor(context, dtype, {rows, in}, 1),
                   dy = RandomTensor(context, dtype, {rows, out}, 2),
                   w = RandomTensor(context, dtype, {out, in}, 3);
      const Tensor rounded_w =
          Values(context, QuantiseWeight(context, w, Fp8Side::kColumns), dtype);
      EXPECT_TRUE(
          SameBits(Fp8Linear(context, x, w),
                   Linear(context, Values(context, QuantiseRows(context, x), dtype), rounded_w)));
      EXPECT_LT(
          RelativeError(Fp8LinearBackwardInput(context, dy, w),
                        LinearBackwardInput(
                            context, Values(context, QuantiseRows(context, dy), dtype), rounded_w)),
          1e-6);
      // E4M3 keeps 4 bits: the products differ from those of the values by about 2^-5.
      const Tensor dw = RandomTensor(context, dtype, {out, in}, 4),
                   exact = RandomTensor(context, dtype, {out, in}, 4);
      Fp8LinearBackwardWeight(context, dy, x, dw);
      LinearBackwardWeight(context, dy, x, exact);
      EXPECT_LT(RelativeError(dw, exact), 0.05);
      EXPECT_EQ(RelativeError(dw, exact) > 0.005, rows > 0);
      const Tensor from_zero = context.Zeros(dtype, {out, in});
      Fp8LinearBackwardWeight(context, dy, x, from_zero);
      Fp8LinearBackwardWeight(context, dy, x, dw, Accumulate::kOverwrite);
      EXPECT_TRUE(SameBits(dw, from_zero));
    }
  }
}

TEST(Fp8Linear, GivesExpertsTheirOwnWeights) {
  const Context context = Context::Cpu();
  const Tensor x = RandomTensor(context, DType::kF64, {70, 48}, 1),
               dy = RandomTensor(context, DType::kF64, {70, 144}, 2),
               w = RandomTensor(context, DType::kF64, {3, 144, 48}, 3),
               offsets = IntTensorOf(context, {4}, {0, 30, 30, 70});
  const Tensor y = Fp8GroupedLinear(context, x, w, offsets),
               dx = Fp8GroupedLinearBackwardInput(context, dy, w, offsets);
  const auto expert = [&](int64_t l) { return w.Rows(l, l + 1).Reshaped({144, 48}); };
  EXPECT_TRUE(SameBits(y.Rows(0, 30), Fp8Linear(context, x.Rows(0, 30), expert(0))));
  EXPECT_TRUE(SameBits(y.Rows(30, 70), Fp8Linear(context, x.Rows(30, 70), expert(2))));
  EXPECT_TRUE(
      SameBits(dx.Rows(30, 70), Fp8LinearBackwardInput(context, dy.Rows(30, 70), expert(2))));
}

TEST(Fp8LinearDeathTest, NamesWidthsThatDoNotFit) {
  const Context context = Context::Cpu();
  EXPECT_FALSE(Fp8Fits(24, 16));
  EXPECT_TRUE(Fp8Fits(576, 7168));
  EXPECT_DEATH(
      Fp8Linear(context, context.Zeros(DType::kF32, {2, 16}), context.Zeros(DType::kF32, {24, 16})),
      "fp8_matmul: x .*24");
}

}  // namespace
}  // namespace baleen
