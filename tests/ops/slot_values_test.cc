// A number a slot at its row and back.
#include "kernels/ops/moe/slot_values.h"

#include <gtest/gtest.h>

#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::IntTensorOf;
using testing::TensorOf;
using testing::ToDoubles;
using Doubles = std::vector<double>;

TEST(SlotValues, StandAtTheRowsOfTheirSlotsAndComeBack) {
  const Context context = Context::Cpu();
  const Tensor row_of_slot = IntTensorOf(context, {3, 2}, {2, -1, 0, 3, -1, 1});
  const Tensor values = TensorOf(context, DType::kF64, {3, 2}, {10, 11, 12, 13, 14, 15});
  const Tensor rows = RowsOfSlots(context, values, row_of_slot, 4);
  EXPECT_EQ(ToDoubles(rows), (Doubles{12, 15, 10, 13}));
  const Tensor back = SlotsOfRows(context, rows, row_of_slot);
  EXPECT_EQ(back.shape(), (Shape{3, 2}));
  EXPECT_EQ(ToDoubles(back), (Doubles{10, 0, 12, 13, 0, 15}));
}

TEST(SlotValues, OfNoTokensAreNoRows) {
  const Context context = Context::Cpu();
  const Tensor row_of_slot = context.Empty(DType::kI32, {0, 2});
  const Tensor rows =
      RowsOfSlots(context, context.Empty(DType::kF32, {0, 2}), row_of_slot, /*num_rows=*/0);
  EXPECT_EQ(rows.shape(), (Shape{0}));
  EXPECT_EQ(SlotsOfRows(context, rows, row_of_slot).shape(), (Shape{0, 2}));
}

TEST(SlotValuesDeathTest, NameShapesAndRowsThatDoNotFit) {
  const Context context = Context::Cpu();
  const Tensor row_of_slot = IntTensorOf(context, {1, 2}, {0, 2});
  const Tensor values = TensorOf(context, DType::kF32, {1, 2}, {1, 2});
  EXPECT_DEATH(RowsOfSlots(context, values, row_of_slot, 2), "slot values: row 2 of 2");
  EXPECT_DEATH(SlotsOfRows(context, TensorOf(context, DType::kF32, {1}, {1}), row_of_slot),
               "row 2 of 1");
  EXPECT_DEATH(RowsOfSlots(context, TensorOf(context, DType::kF32, {2}, {1, 2}), row_of_slot, 3),
               "values is F32\\[2\\], expected F32\\[1, 2\\]");
  EXPECT_DEATH(SlotsOfRows(context, context.Zeros(DType::kI32, {3}), row_of_slot), "expected F32");
}

}  // namespace
}  // namespace baleen
