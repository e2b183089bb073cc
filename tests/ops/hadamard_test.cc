// Hadamard rotation: small matrices by hand, Sylvester order, orthogonality, its own inverse.
#include "kernels/ops/hadamard.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>

#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the helpers of tests/support

TEST(HadamardTransform, TwoAndFourElementsByHand) {
  const Context context = Context::Cpu();
  const double r = std::sqrt(0.5);
  const Tensor two = HadamardTransform(context, TensorOf(context, DType::kF64, {1, 2}, {3, 1}));
  EXPECT_LT(RelativeError(ToDoubles(two), {4 * r, 2 * r}), 1e-15);
  // H_4 in Sylvester order: ++++, +-+-, ++--, +--+; divided by 2.
  const Tensor four =
      HadamardTransform(context, TensorOf(context, DType::kF32, {1, 4}, {1, 2, 4, 8}));
  EXPECT_EQ(ToDoubles(four), (std::vector<double>{7.5, -2.5, -4.5, 1.5}));
  const Tensor one = HadamardTransform(context, TensorOf(context, DType::kF32, {2, 1}, {5, -6}));
  EXPECT_EQ(ToDoubles(one), (std::vector<double>{5, -6}));
}

TEST(HadamardTransform, HasTheFactorOfTheIndexerAndTheSignsOfSylvester) {
  const Context context = Context::Cpu();
  const int64_t D = 128;
  const Tensor x = context.Zeros(DType::kF64, {D, D});
  for (int64_t i = 0; i < D; ++i) x.data<double>()[i * D + i] = 1;
  const Tensor h = HadamardTransform(context, x);
  for (int64_t i = 0; i < D; ++i) {
    for (int64_t j = 0; j < D; ++j) {
      // Entry (i, j) of the Sylvester matrix is (-1)^popcount(i & j).
      const double sign = std::popcount(static_cast<uint64_t>(i & j)) % 2 == 0 ? 1 : -1;
      EXPECT_NEAR(h.data<double>()[i * D + j], sign * 0.0883883476483184, 1e-15);
    }
  }
}

TEST(HadamardTransform, KeepsScalarProductsAndIsItsOwnInverse) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    // Seven rounds of additions and one product: each within half a unit of the row's norm.
    const double tolerance = (dtype == DType::kF32 ? 0x1p-24 : 0x1p-53) * 8;
    const Tensor x = RandomTensor(context, dtype, {3, 5, 128}, 1);
    const Tensor y = HadamardTransform(context, x);
    ASSERT_EQ(y.shape(), x.shape());
    EXPECT_GT(RelativeError(y, x), 0.5);
    EXPECT_LT(RelativeError(HadamardTransform(context, y), x), 2 * tolerance);
    const std::vector<double> a = ToDoubles(x), b = ToDoubles(y);
    for (int64_t row = 1; row < 15; ++row) {
      double before = 0, after = 0;
      for (int64_t i = 0; i < 128; ++i) {
        before += a[row * 128 + i] * a[(row - 1) * 128 + i];
        after += b[row * 128 + i] * b[(row - 1) * 128 + i];
      }
      EXPECT_NEAR(after, before, tolerance * 2 * 128);  // 128: the product of the rows' norms
    }
  }
}

TEST(HadamardTransformDeathTest, RefusesOtherLengths) {
  const Context context = Context::Cpu();
  EXPECT_DEATH(HadamardTransform(context, context.Zeros(DType::kF32, {2, 12})),
               "F32\\[2, 12\\], its last dimension is no power of two");
}

}  // namespace
}  // namespace baleen
