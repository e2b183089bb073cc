// Copies, casts, sums and column joins: exact results.
#include "kernels/ops/elementwise.h"

#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::IntTensorOf;
using testing::RandomTensor;
using testing::SameBits;
using testing::TensorOf;
using testing::ToDoubles;
using Doubles = std::vector<double>;

TEST(Elementwise, AddsAndScalesThreeNumbers) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const Tensor a = TensorOf(context, dtype, {3}, {1, -2, 0.5});
    const Tensor b = TensorOf(context, dtype, {3}, {10, 20, 30});
    EXPECT_EQ(ToDoubles(Add(context, a, b)), (Doubles{11, 18, 30.5}));
    EXPECT_EQ(ToDoubles(a), (Doubles{1, -2, 0.5}));
    AddInPlace(context, a, b);
    EXPECT_EQ(ToDoubles(a), (Doubles{11, 18, 30.5}));
    ScaleInPlace(context, a, -0.5);
    EXPECT_EQ(ToDoubles(a), (Doubles{-5.5, -9, -15.25}));
    AddInPlace(context, a, a);
    EXPECT_EQ(ToDoubles(a), (Doubles{-11, -18, -30.5}));
    FillZero(context, a);
    EXPECT_EQ(ToDoubles(a), (Doubles{0, 0, 0}));
  }
}

TEST(Elementwise, HandlesTensorsLongerThanAVectorAndEmptyOnes) {
  const Context context = Context::Cpu();
  for (const int64_t count : {0, 1, 7, 64, 1001}) {
    const Tensor a = RandomTensor(context, DType::kF64, {count}, 1);
    const Tensor b = RandomTensor(context, DType::kF64, {count}, 2);
    const Doubles x = ToDoubles(a), y = ToDoubles(b), sum = ToDoubles(Add(context, a, b));
    for (int64_t i = 0; i < count; ++i) EXPECT_EQ(sum[i], x[i] + y[i]);
    EXPECT_TRUE(count == 0 || SameBits(Clone(context, a), a));
  }
}

TEST(Elementwise, CopiesBitsOfAnyDtypeBetweenShapes) {
  const Context context = Context::Cpu();
  const Tensor ids = IntTensorOf(context, {2, 3}, {1, -1, 2, 3, 4, 5});
  const Tensor copy = context.Zeros(DType::kI32, {6});
  Copy(context, ids, copy);
  EXPECT_EQ(ToDoubles(copy), ToDoubles(ids));
  const Tensor clone = Clone(context, ids);
  EXPECT_TRUE(SameBits(clone, ids));
  EXPECT_NE(clone.raw(), ids.raw());
}

TEST(Elementwise, CastsRoundToNearestAndBackExactly) {
  const Context context = Context::Cpu();
  const Tensor x = TensorOf(context, DType::kF32, {4}, {1.00390625, 1.01171875, -2.5, INFINITY});
  const Tensor bf16 = Cast(context, x, DType::kBF16);
  EXPECT_EQ(ToDoubles(bf16), (Doubles{1, 1.015625, -2.5, INFINITY}));
  EXPECT_EQ(ToDoubles(Cast(context, bf16, DType::kF64)), ToDoubles(bf16));
  EXPECT_EQ(ToDoubles(Cast(context, bf16, DType::kF32)), ToDoubles(bf16));
  const Tensor third = TensorOf(context, DType::kF64, {1}, {1.0 / 3});
  EXPECT_EQ(ToDoubles(Cast(context, third, DType::kF32)), Doubles{static_cast<float>(1.0 / 3)});
  EXPECT_EQ(ToDoubles(Cast(context, third, DType::kF64)), Doubles{1.0 / 3});
  EXPECT_EQ(ToDoubles(Cast(context, third, DType::kBF16)), Doubles{0.333984375});
}

TEST(Elementwise, JoinsColumnsAndSlicesThemBack) {
  const Context context = Context::Cpu();
  const Tensor a = RandomTensor(context, DType::kF32, {3, 5}, 1);
  const Tensor b = RandomTensor(context, DType::kF32, {3, 2}, 2);
  const Tensor joined = ConcatColumns(context, a, b);
  EXPECT_EQ(joined.shape(), (Shape{3, 7}));
  EXPECT_EQ(ToDoubles(joined)[7 + 4], ToDoubles(a)[5 + 4]);
  EXPECT_EQ(ToDoubles(joined)[7 + 5], ToDoubles(b)[2]);
  EXPECT_TRUE(SameBits(SliceColumns(context, joined, 0, 5), a));
  EXPECT_TRUE(SameBits(SliceColumns(context, joined, 5, 2), b));
  EXPECT_EQ(SliceColumns(context, joined, 7, 0).shape(), (Shape{3, 0}));
  const Tensor none = context.Empty(DType::kF32, {3, 0});
  EXPECT_TRUE(SameBits(ConcatColumns(context, none, a), a));
}

TEST(ElementwiseDeathTest, NamesTheShapesThatDoNotFit) {
  const Context context = Context::Cpu();
  const Tensor a = context.Zeros(DType::kF32, {2, 3}), b = context.Zeros(DType::kF32, {3, 2});
  EXPECT_DEATH(Add(context, a, b), "b is F32\\[3, 2\\], expected F32\\[2, 3\\]");
  EXPECT_DEATH(SliceColumns(context, a, 2, 2), "2 \\+ 2 of F32\\[2, 3\\]");
  EXPECT_DEATH(Copy(context, a, context.Zeros(DType::kF64, {2, 3})), "to F64\\[2, 3\\]");
  EXPECT_DEATH(Cast(context, a, DType::kI32), "not I32");
}

}  // namespace
}  // namespace baleen
