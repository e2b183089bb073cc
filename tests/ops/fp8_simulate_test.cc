// FP8 simulation against values worked out by hand: scale, rounding, the floor of amax, groups.
#include "kernels/ops/indexer/fp8_simulate.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the helpers of tests/support

std::vector<double> Simulate(DType dtype, const std::vector<double>& x, int64_t group) {
  const Context context = Context::Cpu();
  const Shape shape = {1, static_cast<int64_t>(x.size())};
  return ToDoubles(SimulateFp8(context, TensorOf(context, dtype, shape, x), group));
}

TEST(SimulateFp8, RoundsToThreeMantissaBitsByHand) {
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    // amax 448: scale 1. Steps of 32 at 448, 2 at 17..31, 2^-9 below 2^-6; ties to even.
    EXPECT_EQ(Simulate(dtype, {448, -17, 19, 0.0029296875, 0.0009765625, 0}, 6),
              (std::vector<double>{448, -16, 20, 0.00390625, 0, 0}));
    // amax 500: 500 / 448 = 1.116, so scale 2: 250 lies between 240 and 256, 8.5 becomes 8 (a tie).
    EXPECT_EQ(Simulate(dtype, {500, 17}, 2), (std::vector<double>{512, 16}));
    // amax 3.5 = 448 * 2^-7 exactly: scale 2^-7, and 2^-16 is its smallest step.
    EXPECT_EQ(Simulate(dtype, {3.5, -1.75, 0x1p-16}, 3),
              (std::vector<double>{3.5, -1.75, 0x1p-16}));
    // Just above: scale 2^-6. 3.5 + 2^-20 over it is 224.00006, which rounds to 224.
    EXPECT_EQ(Simulate(dtype, {3.5 + 0x1p-20, 0x1p-16}, 2), (std::vector<double>{3.5, 0}));
  }
}

TEST(SimulateFp8, HasAFloorForAmax) {
  // 1e-4 / 448 = 2.23e-7, between 2^-23 and 2^-22: scale 2^-22, and the smallest step is 2^-9 of
  // it.
  const double step = 0x1p-31;
  EXPECT_EQ(Simulate(DType::kF64, {0, 3 * step, 1.4 * step, 0.5 * step}, 4),
            (std::vector<double>{0, 3 * step, step, 0}));
  EXPECT_EQ(Simulate(DType::kF32, {0, 3 * step, 1.4 * step, 0.5 * step}, 4),
            (std::vector<double>{0, 3 * step, step, 0}));
}

TEST(SimulateFp8, ScalesEachGroupByItself) {
  // 17 survives in the first group (amax 17: scale 2^-4) and not beside 448.
  EXPECT_EQ(Simulate(DType::kF32, {17, 1, 448, 17}, 2), (std::vector<double>{17 - 1, 1, 448, 16}));
  EXPECT_EQ(Simulate(DType::kF32, {0.40625, 1, 448, 0.40625}, 2),
            (std::vector<double>{0.40625, 1, 448, 0.40625}));
  EXPECT_EQ(Simulate(DType::kF32, {0x1p-8, 1, 0x1p-11, 448}, 2),
            (std::vector<double>{0x1p-8, 1, 0, 448}));
}

TEST(SimulateFp8, StaysWithinHalfAStepAndIsIdempotent) {
  const Context context = Context::Cpu();
  const Tensor x = RandomTensor(context, DType::kF32, {7, 256}, 1, 3.0);
  const Tensor y = SimulateFp8(context, x, 128);
  EXPECT_GT(RelativeError(y, x), 1e-3);
  const std::vector<double> a = ToDoubles(x), b = ToDoubles(y);
  for (size_t i = 0; i < a.size(); ++i) {
    // Half a step of three mantissa bits: 2^-4 of the value; where E4M3 is subnormal, half of 2^-9
    // times the scale, which is at most 2^-4 for amax below 28.
    EXPECT_LE(std::fabs(a[i] - b[i]), std::max(std::fabs(a[i]) / 16, 0x1p-14)) << a[i];
  }
  EXPECT_TRUE(SameBits(SimulateFp8(context, y, 128), y));
}

TEST(SimulateFp8, LetsNanAndInfinityThrough) {
  const std::vector<double> nan = Simulate(DType::kF32, {1, NAN, 2, 3}, 4);
  EXPECT_TRUE(std::isnan(nan[1]));
  EXPECT_EQ(nan[0], 1);
  for (const double y : Simulate(DType::kF64, {1, INFINITY, 2, -INFINITY}, 4)) {
    EXPECT_TRUE(std::isnan(y));  // never turned into a large finite number
  }
}

TEST(SimulateFp8DeathTest, RefusesGroupsThatDoNotDivide) {
  const Context context = Context::Cpu();
  EXPECT_DEATH(SimulateFp8(context, context.Zeros(DType::kF32, {2, 12}), 8),
               "groups of 8 do not divide the last dimension of F32\\[2, 12\\]");
}

}  // namespace
}  // namespace baleen
