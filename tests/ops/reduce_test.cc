// Sums in fp64: exact on small integers, no loss over long fp32 tensors, NaN and infinity
// propagate.
#include "kernels/ops/reduce.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::TensorOf;

double SumOf(const Context& context, const Tensor& x, double start = 0) {
  const Tensor result = TensorOf(context, DType::kF64, {1}, {start});
  AddSum(context, x, result);
  return result.data<double>()[0];
}

double SquaresOf(const Context& context, const Tensor& x, double start = 0) {
  const Tensor result = TensorOf(context, DType::kF64, {1}, {start});
  AddSumOfSquares(context, x, result);
  return result.data<double>()[0];
}

TEST(Reduce, AddsThreeNumbersToTheResult) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const Tensor x = TensorOf(context, dtype, {3}, {1, -2, 4});
    EXPECT_EQ(SumOf(context, x, 100), 103);
    EXPECT_EQ(SquaresOf(context, x, 100), 121);
  }
}

TEST(Reduce, SumsEveryElementOfOddLengths) {
  const Context context = Context::Cpu();
  for (const int64_t count : {0, 1, 7, 8, 9, 31, 1000}) {
    const Tensor x = context.Empty(DType::kF32, {count});
    for (int64_t i = 0; i < count; ++i) x.data<float>()[i] = static_cast<float>(i + 1);
    EXPECT_EQ(SumOf(context, x), count * (count + 1) / 2);
    EXPECT_EQ(SquaresOf(context, x), count * (count + 1) * (2 * count + 1) / 6);
  }
}

TEST(Reduce, KeepsSmallTermsOfLongFloatTensors) {
  const Context context = Context::Cpu();
  const int64_t count = 100001;
  const Tensor x = context.Empty(DType::kF32, {count});
  for (int64_t i = 0; i < count; ++i) x.data<float>()[i] = 0x1p-12f;
  x.data<float>()[0] = 4096;  // in fp32 the squares 2^-24 would vanish beside 2^24
  EXPECT_EQ(SquaresOf(context, x), 0x1p24 + 100000 * 0x1p-24);
  EXPECT_EQ(SumOf(context, x), 4096 + 100000 * 0x1p-12);
}

TEST(Reduce, PropagatesNanAndInfinityAndSquaresBeyondFloat) {
  const Context context = Context::Cpu();
  EXPECT_TRUE(std::isnan(
      SquaresOf(context, TensorOf(context, DType::kF32, {9}, {1, 2, 3, 4, 5, 6, 7, 8, NAN}))));
  EXPECT_TRUE(std::isnan(SumOf(context, TensorOf(context, DType::kF32, {2}, {NAN, 1}))));
  EXPECT_EQ(SquaresOf(context, TensorOf(context, DType::kF32, {2}, {-INFINITY, 1})), INFINITY);
  const Tensor large = TensorOf(context, DType::kF32, {1}, {0x1p100});
  EXPECT_EQ(SquaresOf(context, large), 0x1p200);
}

TEST(ReduceDeathTest, WantsAnFp64Result) {
  const Context context = Context::Cpu();
  const Tensor x = context.Zeros(DType::kF32, {3});
  EXPECT_DEATH(AddSum(context, x, x), "result is F32\\[3\\], expected F64\\[1\\]");
}

TEST(Reduce, AddsIntegersProductsAndConstants) {
  const Context context = Context::Cpu();
  const Tensor result = TensorOf(context, DType::kF64, {1}, {100});
  AddIntSum(context, testing::IntTensorOf(context, {3}, {5, -7, 2000000000}), result);
  EXPECT_EQ(result.data<double>()[0], 2000000098);
  AddConstant(context, -2000000000, result);
  EXPECT_EQ(result.data<double>()[0], 98);
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const Tensor dot = TensorOf(context, DType::kF64, {1}, {1});
    AddDot(context, TensorOf(context, dtype, {3}, {1, 2, 3}),
           TensorOf(context, dtype, {3}, {4, 5, 6}), -0.5, dot);
    EXPECT_EQ(dot.data<double>()[0], 1 - 16);
  }
}

}  // namespace
}  // namespace baleen
