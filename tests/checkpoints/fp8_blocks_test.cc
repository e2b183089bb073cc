#include "checkpoints/fp8_blocks.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/core/random.h"

namespace baleen {
namespace {

std::vector<float> RandomWeight(int64_t rows, int64_t cols, uint64_t seed) {
  const RandomStream stream(seed, 0);
  std::vector<float> weight(static_cast<size_t>(rows * cols));
  for (size_t i = 0; i < weight.size(); ++i) weight[i] = static_cast<float>(stream.Normal(i));
  return weight;
}

TEST(Fp8Blocks, ScaleIsTheSmallestPowerOfTwoThatFits) {
  EXPECT_EQ(Ue8m0Scale(448), 1);
  EXPECT_EQ(Ue8m0Scale(std::nextafter(448.0f, 1e9f)), 2);
  EXPECT_EQ(Ue8m0Scale(224), 0.5f);
  EXPECT_EQ(Ue8m0Scale(1), 1.0f / 256);             // 1 / 448 rounded up
  EXPECT_EQ(Ue8m0Scale(0), std::ldexp(1.0f, -22));  // 1e-4 / 448 = 2^-22.1
  EXPECT_EQ(Ue8m0Scale(1e-4f), Ue8m0Scale(0));
  for (float amax = 1e-4f; amax < 1e6f; amax *= 1.0173f) {
    const float scale = Ue8m0Scale(amax);
    EXPECT_TRUE(IsPowerOfTwo(scale)) << amax;
    EXPECT_LE(amax / scale, 448) << amax;
    EXPECT_GT(amax / (scale / 2), 448) << amax;
  }
}

TEST(Fp8Blocks, PowersOfTwoAreTold) {
  EXPECT_TRUE(IsPowerOfTwo(1));
  EXPECT_TRUE(IsPowerOfTwo(0x1p-126f));
  EXPECT_FALSE(IsPowerOfTwo(0));
  EXPECT_FALSE(IsPowerOfTwo(-2));
  EXPECT_FALSE(IsPowerOfTwo(0.3f));
  EXPECT_FALSE(IsPowerOfTwo(std::numeric_limits<float>::infinity()));
  EXPECT_FALSE(IsPowerOfTwo(std::nanf("")));
}

TEST(Fp8Blocks, GridRoundsUp) {
  EXPECT_EQ(Fp8ScaleShape({576, 7168}), (Shape{5, 56}));
  EXPECT_EQ(Fp8ScaleShape({1, 129}), (Shape{1, 2}));
  EXPECT_EQ(Fp8ScaleShape({0, 128}), (Shape{0, 1}));
}

// By hand: two column blocks, the second of one column, each with its own multiplier.
TEST(Fp8Blocks, DequantisesByMultiplying) {
  std::vector<uint8_t> values(2 * 129, Float8E4M3::FromFloat(1.5f).bits);
  values[129 + 128] = Float8E4M3::FromFloat(-448).bits;
  const float scales[] = {0.3f, 2.0f};
  std::vector<double> out(2);
  DequantiseFp8(values.data(), scales, {2, 129, 1, 127, 1, 2}, out.data());
  EXPECT_EQ(out[0], 1.5 * static_cast<double>(0.3f));
  EXPECT_EQ(out[1], -896);
}

TEST(Fp8Blocks, EverySliceEqualsThatPartOfTheWhole) {
  constexpr int64_t kRows = 200, kCols = 300;
  std::vector<float> weight = RandomWeight(kRows, kCols, 1);
  for (int64_t r = 0; r < kRows; ++r) {  // every block has a scale of its own
    for (int64_t c = 0; c < kCols; ++c) {
      weight[static_cast<size_t>(r * kCols + c)] *=
          static_cast<float>(1 << (2 * (r / 128 * 3 + c / 128)));
    }
  }
  std::vector<uint8_t> values(weight.size());
  std::vector<float> scales(2 * 3), whole(weight.size());
  QuantiseFp8(weight.data(), kRows, kCols, values.data(), scales.data());
  DequantiseFp8(values.data(), scales.data(), {kRows, kCols, 0, 0, kRows, kCols}, whole.data());
  for (const Fp8Slice& slice :
       {Fp8Slice{kRows, kCols, 100, 250, 60, 50}, Fp8Slice{kRows, kCols, 127, 127, 2, 2},
        Fp8Slice{kRows, kCols, 199, 0, 1, 300}, Fp8Slice{kRows, kCols, 5, 299, 0, 1}}) {
    std::vector<float> part(static_cast<size_t>(slice.num_rows * slice.num_cols));
    DequantiseFp8(values.data(), scales.data(), slice, part.data());
    for (int64_t r = 0; r < slice.num_rows; ++r) {
      for (int64_t c = 0; c < slice.num_cols; ++c) {
        EXPECT_EQ(part[static_cast<size_t>(r * slice.num_cols + c)],
                  whole[static_cast<size_t>((slice.row + r) * kCols + slice.col + c)]);
      }
    }
  }
}

TEST(Fp8Blocks, QuantisingIsWithinHalfAStepAndThenStandsStill) {
  constexpr int64_t kRows = 192, kCols = 160;
  std::vector<float> weight = RandomWeight(kRows, kCols, 2);
  for (int64_t r = 128; r < kRows; ++r) {  // the partial row block is much larger
    for (int64_t c = 0; c < 128; ++c) weight[static_cast<size_t>(r * kCols + c)] *= 1000;
  }
  weight[0] = -70;  // the largest of its block is negative
  std::vector<uint8_t> values(weight.size()), again(weight.size());
  std::vector<float> scales(4), scales_again(4), back(weight.size());
  QuantiseFp8(weight.data(), kRows, kCols, values.data(), scales.data());
  DequantiseFp8(values.data(), scales.data(), {kRows, kCols, 0, 0, kRows, kCols}, back.data());
  EXPECT_GT(scales[2], 10 * scales[0]);
  for (size_t i = 0; i < weight.size(); ++i) {
    const size_t block = i / kCols / 128 * 2 + i % kCols / 128;
    // 3 mantissa bits: half a step is 2^-4 of the value; 2^-10 of the scale below the normal range.
    const double bound = std::max(std::fabs(weight[i]) / 16.0, scales[block] * 0x1p-10);
    ASSERT_LE(std::fabs(weight[i] - back[i]), bound) << i;
  }
  QuantiseFp8(back.data(), kRows, kCols, again.data(), scales_again.data());
  std::vector<float> twice(weight.size());
  DequantiseFp8(again.data(), scales_again.data(), {kRows, kCols, 0, 0, kRows, kCols},
                twice.data());
  EXPECT_EQ(back, twice);
}

TEST(Fp8Blocks, DoublesQuantiseLikeTheirFloats) {
  const std::vector<float> weight = RandomWeight(130, 10, 3);
  const std::vector<double> wide(weight.begin(), weight.end());
  std::vector<uint8_t> values(weight.size()), wide_values(weight.size());
  std::vector<float> scales(2), wide_scales(2);
  QuantiseFp8(weight.data(), 130, 10, values.data(), scales.data());
  QuantiseFp8(wide.data(), 130, 10, wide_values.data(), wide_scales.data());
  EXPECT_EQ(values, wide_values);
  EXPECT_EQ(scales, wide_scales);
}

TEST(Fp8Blocks, ZeroBlockHasAScaleAndStaysZero) {
  const std::vector<float> weight(4, 0.0f);
  std::vector<uint8_t> values(4, 0xff);
  float scale = 0;
  QuantiseFp8(weight.data(), 2, 2, values.data(), &scale);
  EXPECT_EQ(scale, std::ldexp(1.0f, -22));
  EXPECT_EQ(values, std::vector<uint8_t>(4, 0));
}

}  // namespace
}  // namespace baleen
