// RoPE: YaRN frequencies of the published table, both pair layouts, backward as the inverse.
#include "kernels/ops/rope.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops/elementwise.h"
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
using Doubles = std::vector<double>;

constexpr RopeLayout kLayouts[] = {RopeLayout::kInterleaved, RopeLayout::kHalfSplit};

TEST(RopeFrequencies, AreThePlainPowersWithoutScaling) {
  const std::vector<double> f = RopeFrequencies({.dim = 4, .theta = 100});
  ASSERT_EQ(f.size(), 2u);
  EXPECT_EQ(f[0], 1);
  EXPECT_NEAR(f[1], 0.1, 1e-16);
}

TEST(RopeFrequencies, MatchTheYarnTableOfTheModel) {
  // dim 64, theta 1e4, factor 40, 4096 positions, betas 32 and 1: kept up to 10, divided by 40 from
  // 23 on.
  const std::vector<double> f = RopeFrequencies({.factor = 40});
  ASSERT_EQ(f.size(), 32u);
  EXPECT_EQ(f[0], 1);
  EXPECT_NEAR(f[10], 5.6234132519e-2, 1e-12);
  EXPECT_NEAR(f[11], 3.9006926567e-2, 1e-12);
  EXPECT_NEAR(f[16], 5.5e-3, 1e-12);
  EXPECT_NEAR(f[22], 1.77827941e-4, 1e-12);
  EXPECT_NEAR(f[23], 3.3338035804e-5, 1e-15);
  EXPECT_NEAR(f[31], 3.3338035804e-6, 1e-16);
}

TEST(RopeFrequencies, KeepTheRampInsideTheDimensions) {
  // A context so short that all waves are slow, and one so long that all are fast.
  for (const int64_t positions : {2, 1 << 30}) {
    const std::vector<double> f =
        RopeFrequencies({.dim = 8, .factor = 4, .original_max_position = positions});
    const std::vector<double> plain = RopeFrequencies({.dim = 8});
    for (size_t i = 0; i < f.size(); ++i) {
      EXPECT_TRUE(std::isfinite(f[i]) && f[i] <= plain[i] && f[i] >= plain[i] / 4) << i;
    }
    // A table without any fast wave still leaves the first frequency alone, since the ramp begins
    // at 0.
    EXPECT_NEAR(f[0], 1, 1e-15);
    EXPECT_NEAR(f[3], positions == 2 ? plain[3] / 4 : plain[3], 1e-15);
  }
}

TEST(Rope, TableHoldsCosAndSinOfFarPositionsInFullPrecision) {
  const Context context = Context::Cpu();
  const std::vector<double> frequencies = {1.0, 0.75};
  const RopeTable table = MakeRopeTable(context, DType::kF32, frequencies, 131072);
  EXPECT_EQ(table.cos.shape(), (Shape{131072, 2}));
  EXPECT_EQ(table.cos.data<float>()[2 * 131071 + 1], static_cast<float>(std::cos(131071 * 0.75)));
  EXPECT_EQ(table.sin.data<float>()[2 * 131071], static_cast<float>(std::sin(131071.0)));
  EXPECT_EQ(MakeRopeTable(context, DType::kBF16, frequencies, 1).cos.dtype(), DType::kF32);
  EXPECT_EQ(MakeRopeTable(context, DType::kF64, frequencies, 1).cos.dtype(), DType::kF64);
}

// A quarter turn maps (a, b) to (-b, a): which elements are a pair is then plain to see.
TEST(Rope, PairsNeighboursWhenInterleavedAndHalvesWhenSplit) {
  const Context context = Context::Cpu();
  const double quarter = std::acos(0.0);
  const RopeTable table = MakeRopeTable(context, DType::kF64, {quarter, 2 * quarter}, 2);
  const Tensor positions = IntTensorOf(context, {1}, {1});
  const Tensor interleaved = TensorOf(context, DType::kF64, {1, 4}, {1, 2, 3, 4});
  ApplyRope(context, AsMatrix(interleaved), positions, table, RopeLayout::kInterleaved,
            RopeDirection::kForward);
  const Doubles expected_interleaved = {-2, 1, -3, -4};
  const Tensor split = TensorOf(context, DType::kF64, {1, 4}, {1, 2, 3, 4});
  ApplyRope(context, AsMatrix(split), positions, table, RopeLayout::kHalfSplit,
            RopeDirection::kForward);
  const Doubles expected_split = {-3, -2, 1, -4};
  for (int i = 0; i < 4; ++i) {
    EXPECT_NEAR(ToDoubles(interleaved)[i], expected_interleaved[i], 1e-15);
    EXPECT_NEAR(ToDoubles(split)[i], expected_split[i], 1e-15);
  }
}

TEST(Rope, BackwardIsTheInverseAndTheGradient) {
  const Context context = Context::Cpu();
  const RopeTable table =
      MakeRopeTable(context, DType::kF64, RopeFrequencies({.dim = 6, .factor = 40}), 50);
  const Tensor positions = IntTensorOf(context, {4}, {0, 7, 7, 49});
  for (const RopeLayout layout : kLayouts) {
    const Tensor x = RandomTensor(context, DType::kF64, {4, 3, 6}, 1);
    const Tensor dy = RandomTensor(context, DType::kF64, {4, 3, 6}, 2);
    const auto rotated = [&](const Tensor& tensor, RopeDirection direction) {
      const Tensor copy = Clone(context, tensor);
      ApplyRope(context, PerHead(copy), positions, table, layout, direction);
      return copy;
    };
    const Tensor y = rotated(x, RopeDirection::kForward);
    EXPECT_GT(RelativeError(y, x), 0.1);
    EXPECT_LT(RelativeError(rotated(y, RopeDirection::kBackward), x), 1e-15);
    const auto loss = [&] {
      const Doubles values = ToDoubles(rotated(x, RopeDirection::kForward));
      double sum = 0;
      for (size_t i = 0; i < values.size(); ++i) sum += values[i] * ToDoubles(dy)[i];
      return sum;
    };
    EXPECT_LT(GradientError(loss, x, rotated(dy, RopeDirection::kBackward)), 1e-8);
  }
}

TEST(Rope, ScoresDependOnTheDistanceOnly) {
  const Context context = Context::Cpu();
  const RopeTable table = MakeRopeTable(context, DType::kF64, RopeFrequencies({.dim = 8}), 200);
  for (const RopeLayout layout : kLayouts) {
    const auto score = [&](int32_t query_position, int32_t key_position) {
      const Tensor q = RandomTensor(context, DType::kF64, {1, 8}, 1);
      const Tensor k = RandomTensor(context, DType::kF64, {1, 8}, 2);
      ApplyRope(context, AsMatrix(q), IntTensorOf(context, {1}, {query_position}), table, layout,
                RopeDirection::kForward);
      ApplyRope(context, AsMatrix(k), IntTensorOf(context, {1}, {key_position}), table, layout,
                RopeDirection::kForward);
      double sum = 0;
      for (int i = 0; i < 8; ++i) sum += ToDoubles(q)[i] * ToDoubles(k)[i];
      return sum;
    };
    EXPECT_NEAR(score(20, 5), score(190, 175), 1e-12);
    EXPECT_GT(std::fabs(score(20, 5) - score(20, 6)), 1e-3);
  }
}

TEST(Rope, RotatesOnlyTheColumnsOfTheView) {
  // The rope part of [nope 3 | rope 4] rows, in fp32 and close to fp64.
  const Context context = Context::Cpu();
  const std::vector<double> frequencies = RopeFrequencies({.dim = 4});
  const Tensor x = RandomTensor(context, DType::kF32, {5, 2, 7}, 1);
  const Tensor before = Clone(context, x), exact = Cast(context, x, DType::kF64);
  const Tensor positions = IntTensorOf(context, {5}, {4, 3, 2, 1, 0});
  ApplyRope(context, PerHead(x).Columns(3, 4), positions,
            MakeRopeTable(context, DType::kF32, frequencies, 5), RopeLayout::kHalfSplit,
            RopeDirection::kForward);
  ApplyRope(context, PerHead(exact).Columns(3, 4), positions,
            MakeRopeTable(context, DType::kF64, frequencies, 5), RopeLayout::kHalfSplit,
            RopeDirection::kForward);
  EXPECT_LT(RelativeError(x, exact), 3 * 0x1p-24);
  for (int64_t row = 0; row < 10; ++row) {
    for (int64_t i = 0; i < 3; ++i) {
      EXPECT_EQ(x.data<float>()[row * 7 + i], before.data<float>()[row * 7 + i]);
    }
  }
  // Each head is rotated by itself.
  const RopeTable table = MakeRopeTable(context, DType::kF32, frequencies, 5);
  for (int64_t head = 0; head < 2; ++head) {
    const int64_t begin = head * 7 + 3;
    const Tensor alone = SliceColumns(context, before.Reshaped({5, 14}), begin, 4);
    ApplyRope(context, AsMatrix(alone), positions, table, RopeLayout::kHalfSplit,
              RopeDirection::kForward);
    EXPECT_TRUE(SameBits(SliceColumns(context, x.Reshaped({5, 14}), begin, 4), alone)) << head;
  }
  // Position 0 turns nothing.
  EXPECT_TRUE(SameBits(x.Rows(4, 5), before.Rows(4, 5)));
  EXPECT_FALSE(SameBits(x.Rows(3, 4), before.Rows(3, 4)));
}

TEST(RopeDeathTest, NamesPositionsAndShapesThatDoNotFit) {
  const Context context = Context::Cpu();
  const RopeTable table = MakeRopeTable(context, DType::kF32, {1.0}, 3);
  const Tensor x = context.Zeros(DType::kF32, {2, 2}), wide = context.Zeros(DType::kF32, {2, 4});
  EXPECT_DEATH(ApplyRope(context, AsMatrix(x), IntTensorOf(context, {2}, {0, 3}), table,
                         RopeLayout::kHalfSplit, RopeDirection::kForward),
               "positions\\[1\\] is 3, expected 0 .. 2");
  EXPECT_DEATH(ApplyRope(context, AsMatrix(wide), IntTensorOf(context, {2}, {0, 1}), table,
                         RopeLayout::kHalfSplit, RopeDirection::kForward),
               "\\(4 vs. 2\\)");
  EXPECT_DEATH(RopeFrequencies({.dim = 3}), "dim 3");
}

}  // namespace
}  // namespace baleen
