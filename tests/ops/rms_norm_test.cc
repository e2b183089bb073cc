// RMSNorm: three numbers by hand, gradients, fp32 against fp64.
#include "kernels/ops/rms_norm.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops/elementwise.h"
#include "tests/support/gradient_check.h"
#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::Cosine;
using testing::GradientError;
using testing::RandomTensor;
using testing::RelativeError;
using testing::TensorOf;
using testing::ToDoubles;

TEST(RmsNorm, NormalisesThreeNumbersByHand) {
  const Context context = Context::Cpu();
  const Tensor x = TensorOf(context, DType::kF64, {1, 3}, {1, 2, -3});
  const Tensor weight = TensorOf(context, DType::kF64, {3}, {1, 10, 100});
  const RmsNormResult result = RmsNorm(context, x, weight, 1.0 / 3);
  // mean(x^2) + eps = 14/3 + 1/3 = 5.
  const double rstd = 1 / std::sqrt(5.0);
  EXPECT_NEAR(ToDoubles(result.rstd)[0], rstd, 1e-16);
  const std::vector<double> y = ToDoubles(result.y);
  EXPECT_NEAR(y[0], rstd, 1e-15);
  EXPECT_NEAR(y[1], 20 * rstd, 1e-14);
  EXPECT_NEAR(y[2], -300 * rstd, 1e-13);
}

TEST(RmsNorm, HasTheGradientsOfCentralDifferences) {
  const Context context = Context::Cpu();
  for (const int64_t D : {1, 3, 13, 24}) {
    const Tensor x = RandomTensor(context, DType::kF64, {2, 3, D}, 1);
    const Tensor weight = RandomTensor(context, DType::kF64, {D}, 2);
    const Tensor dy = RandomTensor(context, DType::kF64, {2, 3, D}, 3);
    const auto loss = [&] {
      const std::vector<double> y = ToDoubles(RmsNorm(context, x, weight, 0.1).y);
      double sum = 0;
      for (size_t i = 0; i < y.size(); ++i) sum += y[i] * ToDoubles(dy)[i];
      return sum;
    };
    const Tensor rstd = RmsNorm(context, x, weight, 0.1).rstd;
    EXPECT_LT(GradientError(loss, x, RmsNormBackwardInput(context, dy, x, weight, rstd)), 1e-7)
        << D;
    const Tensor dweight = context.Zeros(DType::kF64, {D});
    RmsNormBackwardWeight(context, dy, x, rstd, dweight);
    EXPECT_LT(GradientError(loss, weight, dweight), 1e-7) << D;
    const std::vector<double> once = ToDoubles(dweight);
    RmsNormBackwardWeight(context, dy, x, rstd, dweight);
    for (int64_t d = 0; d < D; ++d) EXPECT_EQ(ToDoubles(dweight)[d], 2 * once[d]);
  }
}

TEST(RmsNorm, AgreesBetweenFloatAndDouble) {
  const Context context = Context::Cpu();
  const Tensor x = RandomTensor(context, DType::kF32, {33, 129}, 1);
  const Tensor weight = RandomTensor(context, DType::kF32, {129}, 2);
  const Tensor dy = RandomTensor(context, DType::kF32, {33, 129}, 3);
  const auto wide = [&](const Tensor& tensor) { return Cast(context, tensor, DType::kF64); };
  const RmsNormResult result = RmsNorm(context, x, weight, 1e-6);
  const RmsNormResult exact = RmsNorm(context, wide(x), wide(weight), 1e-6);
  // Sums are fp64: only the few products of one element round.
  const double tolerance = 4 * 0x1p-24;
  EXPECT_LT(RelativeError(result.y, exact.y), tolerance);
  const Tensor dx = RmsNormBackwardInput(context, dy, x, weight, result.rstd);
  const Tensor dx_exact =
      RmsNormBackwardInput(context, wide(dy), wide(x), wide(weight), exact.rstd);
  EXPECT_LT(RelativeError(dx, dx_exact), tolerance);
  EXPECT_GT(Cosine(dx, dx_exact), 1 - 1e-12);
  const Tensor dweight = context.Zeros(DType::kF32, {129});
  const Tensor dweight_exact = context.Zeros(DType::kF64, {129});
  RmsNormBackwardWeight(context, dy, x, result.rstd, dweight);
  RmsNormBackwardWeight(context, wide(dy), wide(x), exact.rstd, dweight_exact);
  EXPECT_LT(RelativeError(dweight, dweight_exact), tolerance);
}

TEST(RmsNorm, TakesZeroRowsAndRowsOfZeros) {
  const Context context = Context::Cpu();
  const Tensor weight = TensorOf(context, DType::kF32, {2}, {1, 1});
  EXPECT_EQ(RmsNorm(context, context.Empty(DType::kF32, {0, 2}), weight, 1e-6).y.shape(),
            (Shape{0, 2}));
  const RmsNormResult result = RmsNorm(context, context.Zeros(DType::kF32, {1, 2}), weight, 1e-6);
  EXPECT_EQ(ToDoubles(result.y), (std::vector<double>{0, 0}));
  EXPECT_NEAR(ToDoubles(result.rstd)[0], 1000, 1e-3);
}

TEST(RmsNormDeathTest, NamesTheShapesThatDoNotFit) {
  const Context context = Context::Cpu();
  const Tensor x = context.Zeros(DType::kF32, {2, 3}), weight = context.Zeros(DType::kF32, {2});
  EXPECT_DEATH(RmsNorm(context, x, weight, 1e-6),
               "rms_norm: weight is F32\\[2\\], expected F32\\[3\\]");
  EXPECT_DEATH(RmsNormBackwardWeight(context, x, x, context.Zeros(DType::kF32, {3}),
                                     context.Zeros(DType::kF32, {3})),
               "rstd is F32\\[3\\], expected F32\\[2\\]");
}

}  // namespace
}  // namespace baleen
