// SwiGLU: three numbers by hand, gradients, fp32 against fp64, saturated gates.
#include "kernels/ops/swiglu.h"

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

TEST(Swiglu, GatesThreeNumbersByHand) {
  const Context context = Context::Cpu();
  // sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4.
  const double ln3 = std::log(3.0);
  const Tensor gate = TensorOf(context, DType::kF64, {3}, {ln3, 0, -ln3});
  const Tensor up = TensorOf(context, DType::kF64, {3}, {2, 5, 8});
  const std::vector<double> y = ToDoubles(Swiglu(context, gate, up));
  EXPECT_NEAR(y[0], 1.5 * ln3, 1e-15);
  EXPECT_EQ(y[1], 0);
  EXPECT_NEAR(y[2], -2 * ln3, 1e-15);
}

TEST(Swiglu, HasTheGradientsOfCentralDifferences) {
  const Context context = Context::Cpu();
  const Tensor gate = RandomTensor(context, DType::kF64, {3, 7}, 1, 2.0);
  const Tensor up = RandomTensor(context, DType::kF64, {3, 7}, 2);
  const Tensor dy = RandomTensor(context, DType::kF64, {3, 7}, 3);
  const auto loss = [&] {
    const std::vector<double> y = ToDoubles(Swiglu(context, gate, up));
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * ToDoubles(dy)[i];
    return sum;
  };
  const SwigluGradients gradients = SwigluBackward(context, dy, gate, up);
  EXPECT_LT(GradientError(loss, gate, gradients.dgate), 1e-8);
  EXPECT_LT(GradientError(loss, up, gradients.dup), 1e-8);
}

TEST(Swiglu, AgreesBetweenFloatAndDouble) {
  const Context context = Context::Cpu();
  const Tensor gate = RandomTensor(context, DType::kF32, {33, 65}, 1, 3.0);
  const Tensor up = RandomTensor(context, DType::kF32, {33, 65}, 2);
  const Tensor dy = RandomTensor(context, DType::kF32, {33, 65}, 3);
  const auto wide = [&](const Tensor& tensor) { return Cast(context, tensor, DType::kF64); };
  const double tolerance = 8 * 0x1p-24;  // a handful of roundings in each element
  EXPECT_LT(RelativeError(Swiglu(context, gate, up), Swiglu(context, wide(gate), wide(up))),
            tolerance);
  const SwigluGradients gradients = SwigluBackward(context, dy, gate, up);
  const SwigluGradients exact = SwigluBackward(context, wide(dy), wide(gate), wide(up));
  EXPECT_LT(RelativeError(gradients.dgate, exact.dgate), tolerance);
  EXPECT_LT(RelativeError(gradients.dup, exact.dup), tolerance);
  EXPECT_GT(Cosine(gradients.dgate, exact.dgate), 1 - 1e-12);
}

TEST(Swiglu, StaysFiniteForSaturatedGatesAndTakesNoElements) {
  const Context context = Context::Cpu();
  const Tensor gate = TensorOf(context, DType::kF32, {2}, {-200, 200});
  const Tensor up = TensorOf(context, DType::kF32, {2}, {3, 3});
  EXPECT_EQ(ToDoubles(Swiglu(context, gate, up)), (std::vector<double>{0, 600}));
  const SwigluGradients gradients = SwigluBackward(context, up, gate, up);
  EXPECT_EQ(ToDoubles(gradients.dgate), (std::vector<double>{0, 9}));
  const Tensor none = context.Empty(DType::kF32, {0, 4});
  EXPECT_EQ(Swiglu(context, none, none).shape(), (Shape{0, 4}));
}

TEST(SwigluDeathTest, NamesTheShapesThatDoNotFit) {
  const Context context = Context::Cpu();
  const Tensor a = context.Zeros(DType::kF32, {2, 3}), b = context.Zeros(DType::kF32, {3, 3});
  EXPECT_DEATH(Swiglu(context, a, b), "swiglu: up is F32\\[3, 3\\], expected F32\\[2, 3\\]");
  EXPECT_DEATH(SwigluBackward(context, b, a, a), "dy is F32\\[3, 3\\]");
}

}  // namespace
}  // namespace baleen
