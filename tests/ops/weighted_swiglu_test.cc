// Weighted SwiGLU: by hand, against the plain one, gradients, corner cases.
#include "kernels/ops/moe/weighted_swiglu.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops/elementwise.h"
#include "kernels/ops/swiglu.h"
#include "tests/support/gradient_check.h"
#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::GradientError;
using testing::RandomTensor;
using testing::RelativeError;
using testing::SameBits;
using testing::TensorOf;
using testing::ToDoubles;

TEST(WeightedSwiglu, GatesTwoRowsByHand) {
  const Context context = Context::Cpu();
  // sigmoid(ln 3) = 3/4, sigmoid(-ln 3) = 1/4.
  const double ln3 = std::log(3.0);
  const Tensor gate = TensorOf(context, DType::kF64, {2, 2}, {ln3, 0, -ln3, ln3});
  const Tensor up = TensorOf(context, DType::kF64, {2, 2}, {2, 5, 8, 4});
  const Tensor weight = TensorOf(context, DType::kF64, {2}, {10, 0.5});
  const std::vector<double> y = ToDoubles(WeightedSwiglu(context, gate, up, weight));
  EXPECT_NEAR(y[0], 15 * ln3, 1e-14);
  EXPECT_EQ(y[1], 0);
  EXPECT_NEAR(y[2], -ln3, 1e-15);
  EXPECT_NEAR(y[3], 1.5 * ln3, 1e-15);
}

TEST(WeightedSwiglu, WithWeightsOfOneIsThePlainOne) {
  const Context context = Context::Cpu();
  const Tensor gate = RandomTensor(context, DType::kF64, {5, 9}, 1, 2.0);
  const Tensor up = RandomTensor(context, DType::kF64, {5, 9}, 2);
  const Tensor dy = RandomTensor(context, DType::kF64, {5, 9}, 3);
  const Tensor ones = TensorOf(context, DType::kF64, {5}, {1, 1, 1, 1, 1});
  EXPECT_LT(RelativeError(WeightedSwiglu(context, gate, up, ones), Swiglu(context, gate, up)),
            1e-15);
  const WeightedSwigluGradients weighted = WeightedSwigluBackward(context, dy, gate, up, ones);
  const SwigluGradients plain = SwigluBackward(context, dy, gate, up);
  EXPECT_LT(RelativeError(weighted.dgate, plain.dgate), 1e-15);
  EXPECT_LT(RelativeError(weighted.dup, plain.dup), 1e-15);
}

TEST(WeightedSwiglu, HasTheGradientsOfCentralDifferences) {
  const Context context = Context::Cpu();
  const Tensor gate = RandomTensor(context, DType::kF64, {3, 7}, 1, 2.0);
  const Tensor up = RandomTensor(context, DType::kF64, {3, 7}, 2);
  const Tensor weight = RandomTensor(context, DType::kF64, {3}, 3);
  const Tensor dy = RandomTensor(context, DType::kF64, {3, 7}, 4);
  const auto loss = [&] {
    const std::vector<double> y = ToDoubles(WeightedSwiglu(context, gate, up, weight));
    double sum = 0;
    for (size_t i = 0; i < y.size(); ++i) sum += y[i] * ToDoubles(dy)[i];
    return sum;
  };
  const WeightedSwigluGradients gradients = WeightedSwigluBackward(context, dy, gate, up, weight);
  EXPECT_LT(GradientError(loss, gate, gradients.dgate), 1e-8);
  EXPECT_LT(GradientError(loss, up, gradients.dup), 1e-8);
  EXPECT_LT(GradientError(loss, weight, gradients.dweight_N), 1e-8);
}

// A gate of any size has a finite gradient, a weight of zero still learns, no rows are no work.
TEST(WeightedSwiglu, StaysFiniteAndTakesZeroWeightsAndNoRows) {
  const Context context = Context::Cpu();
  const Tensor gate = TensorOf(context, DType::kF32, {1, 2}, {-200, 200});
  const Tensor up = TensorOf(context, DType::kF32, {1, 2}, {3, 3});
  const Tensor zero = TensorOf(context, DType::kF32, {1}, {0});
  EXPECT_EQ(ToDoubles(WeightedSwiglu(context, gate, up, zero)), (std::vector<double>{0, 0}));
  const WeightedSwigluGradients gradients = WeightedSwigluBackward(context, up, gate, up, zero);
  EXPECT_EQ(ToDoubles(gradients.dgate), (std::vector<double>{0, 0}));
  EXPECT_EQ(ToDoubles(gradients.dweight_N), (std::vector<double>{1800}));
  const Tensor none = context.Empty(DType::kF32, {0, 4});
  const Tensor no_weights = context.Empty(DType::kF32, {0});
  EXPECT_EQ(WeightedSwiglu(context, none, none, no_weights).shape(), (Shape{0, 4}));
}

TEST(WeightedSwigluDeathTest, NamesTheShapesThatDoNotFit) {
  const Context context = Context::Cpu();
  const Tensor a = context.Zeros(DType::kF32, {2, 3}), b = context.Zeros(DType::kF32, {3, 3});
  const Tensor w = context.Zeros(DType::kF32, {2});
  EXPECT_DEATH(WeightedSwiglu(context, a, b, w),
               "weighted swiglu: up is F32\\[3, 3\\], expected F32\\[2, 3\\]");
  EXPECT_DEATH(WeightedSwiglu(context, b, b, w), "weight is F32\\[2\\], expected F32\\[3\\]");
  EXPECT_DEATH(WeightedSwigluBackward(context, b, a, a, w), "dy is F32\\[3, 3\\]");
}

}  // namespace
}  // namespace baleen
