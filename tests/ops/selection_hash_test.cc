// The hash of selected keys and the NaN flags: what counts and what does not.
#include "kernels/ops/indexer/selection_hash.h"

#include <gtest/gtest.h>

#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::IntTensorOf;

int64_t HashOf(const std::vector<int32_t>& rows, const std::vector<int32_t>& ids) {
  const Context context = Context::Cpu();
  const int64_t R = static_cast<int64_t>(rows.size());
  const Tensor result = context.Zeros(DType::kI64, {1});
  AddSelectionHash(context, IntTensorOf(context, {R}, rows),
                   IntTensorOf(context, {R, static_cast<int64_t>(ids.size()) / R}, ids), result);
  return result.data<int64_t>()[0];
}

TEST(SelectionHash, OrderOfRowsAndIdsDoesNotCount) {
  const int64_t hash = HashOf({5, 9}, {1, 2, 3, 4, 5, -1});
  EXPECT_EQ(HashOf({9, 5}, {4, 5, -1, 1, 2, 3}), hash);
  EXPECT_EQ(HashOf({5, 9}, {3, 1, 2, -1, 5, 4}), hash);
  EXPECT_EQ(HashOf({5}, {1, 2, 3}) + HashOf({9}, {4, 5, -1}), hash);
}

TEST(SelectionHash, EveryKeyAndItsRowCount) {
  const int64_t hash = HashOf({5, 9}, {1, 2, 3, 4, 5, -1});
  EXPECT_NE(HashOf({5, 9}, {1, 2, 3, 4, 6, -1}), hash);
  EXPECT_NE(HashOf({5, 9}, {1, 2, 3, 4, -1, -1}), hash);
  EXPECT_NE(HashOf({5, 8}, {1, 2, 3, 4, 5, -1}), hash);
  EXPECT_NE(HashOf({5, 9}, {1, 2, 4, 3, 5, -1}), hash);  // a key moved to the other row
  EXPECT_EQ(HashOf({5}, {-1, -1}), 0);
}

TEST(SelectionHash, StaysBelowTwoToThe31ARow) {
  for (int32_t row = 0; row < 1000; ++row) {
    const int64_t hash = HashOf({row}, {row, row + 1, 131071});
    EXPECT_GE(hash, 0);
    EXPECT_LT(hash, int64_t{1} << 31);
  }
}

TEST(SelectionHash, KeepsTheFirstNanRowAndCountsIt) {
  const Context context = Context::Cpu();
  const Tensor first = IntTensorOf(context, {1}, {-1}), count = context.Zeros(DType::kI64, {1});
  CountNanRow(context, first, count);
  EXPECT_EQ(count.data<int64_t>()[0], 0);
  for (const int32_t row : {-1, 4, 2}) {
    KeepFirstNanRow(context, IntTensorOf(context, {1}, {row}), 100, first);
  }
  EXPECT_EQ(first.data<int32_t>()[0], 104);
  CountNanRow(context, first, count);
  EXPECT_EQ(count.data<int64_t>()[0], 1);
}

}  // namespace
}  // namespace baleen
