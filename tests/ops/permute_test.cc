// Moving rows to experts and back: order, empty experts, one rank's experts, gradients.
#include "kernels/ops/moe/permute.h"

#include <gtest/gtest.h>

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

TEST(Permute, SortsByExpertThenByToken) {
  const Context context = Context::Cpu();
  const Tensor ids = IntTensorOf(context, {3, 2}, {1, 3, 0, 1, 1, 3});
  const Permutation all = BuildPermutation(context, ids, 0, 4);
  EXPECT_EQ(ToDoubles(all.offsets_L1), (Doubles{0, 1, 4, 4, 6}));
  EXPECT_EQ(ToDoubles(all.source_row_N), (Doubles{1, 0, 1, 2, 0, 2}));
  EXPECT_EQ(ToDoubles(all.row_of_slot_TA), (Doubles{1, 4, 0, 2, 3, 5}));
}

TEST(Permute, KeepsOnlyTheExpertsOfTheRange) {
  const Context context = Context::Cpu();
  const Tensor ids = IntTensorOf(context, {3, 2}, {1, 3, 0, 1, 1, 3});
  const Permutation part = BuildPermutation(context, ids, 1, 2);
  EXPECT_EQ(ToDoubles(part.offsets_L1), (Doubles{0, 3, 3}));
  EXPECT_EQ(ToDoubles(part.source_row_N), (Doubles{0, 1, 2}));
  EXPECT_EQ(ToDoubles(part.row_of_slot_TA), (Doubles{0, -1, -1, 1, 2, -1}));
  const Permutation none = BuildPermutation(context, ids, 2, 1);
  EXPECT_EQ(none.source_row_N.shape(), (Shape{0}));
  EXPECT_EQ(ToDoubles(none.row_of_slot_TA), Doubles(6, -1.0));
}

TEST(Permute, TakesAllTokensAtOneExpertAndNoTokens) {
  const Context context = Context::Cpu();
  const Permutation one =
      BuildPermutation(context, IntTensorOf(context, {4, 1}, {2, 2, 2, 2}), 0, 4);
  EXPECT_EQ(ToDoubles(one.offsets_L1), (Doubles{0, 0, 0, 4, 4}));
  EXPECT_EQ(ToDoubles(one.source_row_N), (Doubles{0, 1, 2, 3}));
  const Permutation empty = BuildPermutation(context, context.Empty(DType::kI32, {0, 2}), 0, 2);
  EXPECT_EQ(ToDoubles(empty.offsets_L1), (Doubles{0, 0, 0}));
  const Tensor x = context.Empty(DType::kF32, {0, 3});
  const Tensor gathered = GatherRows(context, x, empty.source_row_N);
  EXPECT_EQ(gathered.shape(), (Shape{0, 3}));
  EXPECT_EQ(GatherRowsBackward(context, gathered, empty.row_of_slot_TA).shape(), (Shape{0, 3}));
}

TEST(Permute, GathersAndSumsThreeRowsByHand) {
  const Context context = Context::Cpu();
  const Tensor ids = IntTensorOf(context, {2, 2}, {0, 1, 1, 5});
  const Permutation p = BuildPermutation(context, ids, 0, 2);
  const Tensor x = TensorOf(context, DType::kF32, {2, 1}, {7, 9});
  EXPECT_EQ(ToDoubles(GatherRows(context, x, p.source_row_N)), (Doubles{7, 7, 9}));
  EXPECT_EQ(ToDoubles(GatherRows(context, x, p)), (Doubles{7, 7, 9}));
  const Tensor rows = TensorOf(context, DType::kF32, {3, 1}, {1, 2, 4});
  EXPECT_EQ(ToDoubles(GatherRowsBackward(context, rows, p.row_of_slot_TA)), (Doubles{3, 4}));
}

// Ids of 7 tokens with 3 different experts each, of 6; expert 4 gets none.
Tensor SomeIds(const Context& context) {
  return IntTensorOf(context, {7, 3},
                     {0, 1, 2, 1, 3, 5, 0, 2, 5, 0, 1, 3, 2, 3, 5, 0, 3, 5, 1, 2, 3});
}

TEST(Permute, HasTheGradientsOfCentralDifferences) {
  const Context context = Context::Cpu();
  for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, 6}, {2, 3}}) {
    const Permutation p = BuildPermutation(context, SomeIds(context), first, count);
    const int64_t N = p.source_row_N.dim(0);
    const Tensor x_TD = RandomTensor(context, DType::kF64, {7, 5}, 1);
    const Tensor dy_ND = RandomTensor(context, DType::kF64, {N, 5}, 2);
    const auto dot = [](const Tensor& a, const Tensor& b) {
      const Doubles x = ToDoubles(a), y = ToDoubles(b);
      double sum = 0;
      for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
      return sum;
    };
    const auto gather_loss = [&] { return dot(GatherRows(context, x_TD, p.source_row_N), dy_ND); };
    EXPECT_LT(
        GradientError(gather_loss, x_TD, GatherRowsBackward(context, dy_ND, p.row_of_slot_TA)),
        1e-8);
  }
}

TEST(Permute, PartsOfTheExpertsAddUpToAll) {
  const Context context = Context::Cpu();
  const Tensor ids = SomeIds(context);
  const Tensor x = RandomTensor(context, DType::kF32, {7, 33}, 1);
  const auto round_trip = [&](int64_t first, int64_t count) {
    const Permutation p = BuildPermutation(context, ids, first, count);
    return GatherRowsBackward(context, GatherRows(context, x, p), p.row_of_slot_TA);
  };
  const Tensor whole = round_trip(0, 6);
  const Tensor sum =
      Add(context, Add(context, round_trip(0, 2), round_trip(2, 1)), round_trip(3, 3));
  EXPECT_LT(RelativeError(sum, whole), 4 * 0x1p-24);
  // fp32 against fp64: A = 3 sums.
  const Permutation p = BuildPermutation(context, ids, 0, 6);
  const Tensor exact = GatherRowsBackward(
      context, GatherRows(context, Cast(context, x, DType::kF64), p), p.row_of_slot_TA);
  EXPECT_LT(RelativeError(whole, exact), 4 * 0x1p-24);
}

TEST(Permute, GathersRowsOfAnyDtypeBitForBit) {
  const Context context = Context::Cpu();
  const Tensor x = IntTensorOf(context, {2, 2}, {1, 2, 3, 4});
  EXPECT_EQ(ToDoubles(GatherRows(context, x, IntTensorOf(context, {3}, {1, 0, 1}))),
            (Doubles{3, 4, 1, 2, 3, 4}));
}

TEST(PermuteDeathTest, NamesRowsThatAreNotThere) {
  const Context context = Context::Cpu();
  const Tensor x = context.Zeros(DType::kF32, {2, 3});
  EXPECT_DEATH(GatherRows(context, x, IntTensorOf(context, {1}, {2})),
               "source_row\\[0\\] is 2, expected 0 .. 1");
  EXPECT_DEATH(GatherRowsBackward(context, x, IntTensorOf(context, {1, 2}, {0, -2})),
               "row_of_slot\\[1\\] is -2, expected -1 .. 1");
}

TEST(Permute, TakesTheNumberOfRowsThatTheCallerKnows) {
  const Context context = Context::Cpu();
  const Tensor ids = IntTensorOf(context, {3, 2}, {1, 3, 0, 1, 1, 3});
  EXPECT_TRUE(SameBits(BuildPermutation(context, ids, 1, 2, 3).source_row_N,
                       BuildPermutation(context, ids, 1, 2).source_row_N));
  EXPECT_DEATH(BuildPermutation(context, ids, 1, 2, 4), "3 slots in range, the caller expected 4");
}

TEST(Permute, NamesTheNodesOfEachToken) {
  const Context context = Context::Cpu();
  const Tensor ids = IntTensorOf(context, {3, 2}, {0, 5, 3, 2, -1, 4});
  EXPECT_EQ(ToDoubles(GroupsOfTokens(context, ids, 3, 2)),
            (Doubles{0, -1, 2, -1, 1, -1, -1, -1, 2}));
}

}  // namespace
}  // namespace baleen
