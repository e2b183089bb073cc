// LayerNorm: three numbers by hand, gradients of x, weight and bias, fp32 against fp64.
#include "kernels/ops/layer_norm.h"

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

TEST(LayerNorm, NormalisesThreeNumbersByHand) {
  const Context context = Context::Cpu();
  const Tensor x = TensorOf(context, DType::kF64, {1, 3}, {1, 2, 6});
  const Tensor weight = TensorOf(context, DType::kF64, {3}, {1, 10, 100});
  const Tensor bias = TensorOf(context, DType::kF64, {3}, {0.5, 0, -1});
  // mean 3; biased variance (4 + 1 + 9) / 3 = 14/3; with eps 1/3: 5.
  const LayerNormResult result = LayerNorm(context, x, weight, bias, 1.0 / 3);
  const double rstd = 1 / std::sqrt(5.0);
  EXPECT_EQ(ToDoubles(result.mean)[0], 3);
  EXPECT_NEAR(ToDoubles(result.rstd)[0], rstd, 1e-16);
  const std::vector<double> y = ToDoubles(result.y);
  EXPECT_NEAR(y[0], -2 * rstd + 0.5, 1e-15);
  EXPECT_NEAR(y[1], -10 * rstd, 1e-14);
  EXPECT_NEAR(y[2], 300 * rstd - 1, 1e-13);
}

TEST(LayerNorm, HasTheGradientsOfCentralDifferences) {
  const Context context = Context::Cpu();
  for (const int64_t D : {2, 3, 13, 24}) {
    const Tensor x = RandomTensor(context, DType::kF64, {2, 3, D}, 1);
    const Tensor weight = RandomTensor(context, DType::kF64, {D}, 2);
    const Tensor bias = RandomTensor(context, DType::kF64, {D}, 3);
    const Tensor dy = RandomTensor(context, DType::kF64, {2, 3, D}, 4);
    const auto loss = [&] {
      const std::vector<double> y = ToDoubles(LayerNorm(context, x, weight, bias, 0.1).y);
      double sum = 0;
      for (size_t i = 0; i < y.size(); ++i) sum += y[i] * ToDoubles(dy)[i];
      return sum;
    };
    const LayerNormResult saved = LayerNorm(context, x, weight, bias, 0.1);
    const Tensor dx = LayerNormBackwardInput(context, dy, x, weight, saved.mean, saved.rstd);
    EXPECT_LT(GradientError(loss, x, dx), 1e-7) << D;
    const Tensor dweight = context.Zeros(DType::kF64, {D}), dbias = context.Zeros(DType::kF64, {D});
    LayerNormBackwardWeight(context, dy, x, saved.mean, saved.rstd, dweight, dbias);
    EXPECT_LT(GradientError(loss, weight, dweight), 1e-7) << D;
    EXPECT_LT(GradientError(loss, bias, dbias), 1e-7) << D;
    const std::vector<double> once = ToDoubles(dweight), bias_once = ToDoubles(dbias);
    LayerNormBackwardWeight(context, dy, x, saved.mean, saved.rstd, dweight, dbias);
    for (int64_t d = 0; d < D; ++d) {
      EXPECT_EQ(ToDoubles(dweight)[d], 2 * once[d]);
      EXPECT_EQ(ToDoubles(dbias)[d], 2 * bias_once[d]);
    }
  }
}

TEST(LayerNorm, AgreesBetweenFloatAndDoubleAlsoWithALargeMean) {
  const Context context = Context::Cpu();
  for (const double mean : {0.0, 1000.0}) {
    const Tensor x = RandomTensor(context, DType::kF32, {17, 128}, 1);
    for (int64_t i = 0; i < x.num_elements(); ++i) x.data<float>()[i] += static_cast<float>(mean);
    const Tensor weight = RandomTensor(context, DType::kF32, {128}, 2);
    const Tensor bias = RandomTensor(context, DType::kF32, {128}, 3);
    const Tensor dy = RandomTensor(context, DType::kF32, {17, 128}, 4);
    const auto wide = [&](const Tensor& tensor) { return Cast(context, tensor, DType::kF64); };
    const LayerNormResult result = LayerNorm(context, x, weight, bias, 1e-6);
    const LayerNormResult exact = LayerNorm(context, wide(x), wide(weight), wide(bias), 1e-6);
    // Sums are fp64; the stored mean rounds to eps |mean|, which moves every element of unit size.
    const double tolerance = 0x1p-24 * (8 + mean);
    EXPECT_LT(RelativeError(result.y, exact.y), tolerance);
    const Tensor dx = LayerNormBackwardInput(context, dy, x, weight, result.mean, result.rstd);
    const Tensor dx_exact =
        LayerNormBackwardInput(context, wide(dy), wide(x), wide(weight), exact.mean, exact.rstd);
    EXPECT_LT(RelativeError(dx, dx_exact), tolerance);
    EXPECT_GT(Cosine(dx, dx_exact), 1 - tolerance);
    const Tensor dweight = context.Zeros(DType::kF32, {128}),
                 dbias = context.Zeros(DType::kF32, {128});
    const Tensor dweight_exact = context.Zeros(DType::kF64, {128});
    const Tensor dbias_exact = context.Zeros(DType::kF64, {128});
    LayerNormBackwardWeight(context, dy, x, result.mean, result.rstd, dweight, dbias);
    LayerNormBackwardWeight(context, wide(dy), wide(x), exact.mean, exact.rstd, dweight_exact,
                            dbias_exact);
    EXPECT_LT(RelativeError(dweight, dweight_exact), tolerance);
    EXPECT_LT(RelativeError(dbias, dbias_exact), 4 * 0x1p-24);
  }
}

TEST(LayerNorm, TakesZeroRowsAndConstantRows) {
  const Context context = Context::Cpu();
  const Tensor weight = TensorOf(context, DType::kF32, {2}, {3, 3});
  const Tensor bias = TensorOf(context, DType::kF32, {2}, {1, -1});
  EXPECT_EQ(LayerNorm(context, context.Empty(DType::kF32, {0, 2}), weight, bias, 1e-6).y.shape(),
            (Shape{0, 2}));
  const Tensor constant = TensorOf(context, DType::kF32, {1, 2}, {7, 7});
  EXPECT_EQ(ToDoubles(LayerNorm(context, constant, weight, bias, 1e-6).y),
            (std::vector<double>{1, -1}));
}

TEST(LayerNormDeathTest, NamesTheShapesThatDoNotFit) {
  const Context context = Context::Cpu();
  const Tensor x = context.Zeros(DType::kF32, {2, 3}), three = context.Zeros(DType::kF32, {3});
  const Tensor two = context.Zeros(DType::kF32, {2});
  EXPECT_DEATH(LayerNorm(context, x, three, two, 1e-6), "bias is F32\\[2\\], expected F32\\[3\\]");
  EXPECT_DEATH(LayerNormBackwardInput(context, x, x, three, two, three),
               "rstd is F32\\[3\\], expected F32\\[2\\]");
}

}  // namespace
}  // namespace baleen
