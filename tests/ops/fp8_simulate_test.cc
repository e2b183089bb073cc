// FP8 simulation and quantisation against values worked out by hand: scale, rounding, the floor of
// amax, groups.
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

// code * scale of a quantised tensor.
std::vector<double> ValuesOf(const Fp8Codes& quantised) {
  const std::vector<double> scales = ToDoubles(quantised.scales);
  const int64_t group = quantised.codes.num_elements() / quantised.scales.num_elements();
  std::vector<double> values;
  for (int64_t i = 0; i < quantised.codes.num_elements(); ++i) {
    values.push_back(double{quantised.codes.data<Float8E4M3>()[i].ToFloat()} * scales[i / group]);
  }
  return values;
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

TEST(QuantiseFp8, GivesCodesAndScalesByHand) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    // Groups of two: amax 448 (scale 1), 500 (2), 1e-6 (the floor's 2^-22), 3.5 (2^-7).
    const Fp8Codes r = QuantiseFp8(
        context, TensorOf(context, dtype, {2, 4}, {448, -17, 500, 17, 1e-6, 0, 3.5, 1}), 2);
    EXPECT_EQ(r.codes.DebugString(), "F8_E4M3[2, 4]");
    EXPECT_EQ(r.scales.shape(), (Shape{2, 2}));
    EXPECT_EQ(r.scales.dtype(), dtype);
    EXPECT_EQ(ToDoubles(r.scales), (std::vector<double>{1, 2, 0x1p-22, 0x1p-7}));
    std::vector<int> codes;
    for (int i = 0; i < 8; ++i) codes.push_back(r.codes.data<Float8E4M3>()[i].bits);
    // 448 = 1.75 x 2^8; -16 = 1 x 2^4, its exponent field 11; 256 (250 and its tie); 8; 1e-6 x 2^22
    // = 4.19 -> 4; 0; 448; 128.
    EXPECT_EQ(codes, (std::vector<int>{0x7e, 0xd8, 0x78, 0x50, 0x48, 0, 0x7e, 0x70}));
  }
}

TEST(QuantiseFp8, HasTheValuesOfSimulateFp8) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    for (const double scale : {1e-6, 1.0, 1e4}) {
      const Tensor x = RandomTensor(context, dtype, {5, 3, 128}, 1, scale);
      EXPECT_EQ(ValuesOf(QuantiseFp8(context, x, 64)), ToDoubles(SimulateFp8(context, x, 64)));
    }
  }
}

TEST(QuantiseFp8, IsExactOnValuesThatAreRoundedAlready) {
  const Context context = Context::Cpu();
  const Tensor x = RandomTensor(context, DType::kF32, {300, 128}, 1, 3.0);
  // The largest of row 7 is rounded down to 224 scales: the second scale is half of the first.
  std::fill_n(x.data<float>() + 7 * 128, 128, 0.5f);
  x.data<float>()[7 * 128 + 5] = 226;
  const Tensor y = SimulateFp8(context, x, 128);
  const Fp8Codes first = QuantiseFp8(context, x, 128), again = QuantiseFp8(context, y, 128);
  EXPECT_EQ(ValuesOf(again), ToDoubles(y));
  EXPECT_EQ(first.scales.data<float>()[7], 1);
  EXPECT_EQ(again.scales.data<float>()[7], 0.5);
}

TEST(QuantiseFp8, MakesNanOfWhatIsNotFinite) {
  const Context context = Context::Cpu();
  const Fp8Codes nan =
      QuantiseFp8(context, TensorOf(context, DType::kF32, {1, 4}, {1, NAN, 2, 3}), 4);
  EXPECT_TRUE(std::isnan(ValuesOf(nan)[1]));
  EXPECT_EQ(ValuesOf(nan)[3], 3);
  // The group's own code holds a NaN: a product of codes alone shows it.
  const Fp8Codes infinite =
      QuantiseFp8(context, TensorOf(context, DType::kF64, {1, 3}, {1, -INFINITY, 2}), 3);
  EXPECT_TRUE(std::isnan(infinite.codes.data<Float8E4M3>()[1].ToFloat()));
}

TEST(SimulateFp8DeathTest, RefusesGroupsThatDoNotDivide) {
  const Context context = Context::Cpu();
  EXPECT_DEATH(QuantiseFp8(context, context.Zeros(DType::kF32, {2, 12}), 8),
               "QuantiseFp8: groups of 8 do not divide the last dimension of F32\\[2, 12\\]");
  EXPECT_DEATH(SimulateFp8(context, context.Zeros(DType::kF32, {2, 12}), 8),
               "groups of 8 do not divide the last dimension of F32\\[2, 12\\]");
}

}  // namespace
}  // namespace baleen
