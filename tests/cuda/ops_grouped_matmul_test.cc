// Grouped linear layers on the GPU against the CPU definition in fp64: groups of any size, widths
// with and without tensor cores.
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "kernels/ops/linear/grouped_matmul.h"
#include "kernels/ops/linear/grouped_matmul_cuda.h"
#include "tests/cuda/operand_pair.h"

namespace baleen {
namespace {

using testing::ErrorOf;
using testing::Gpu;
using testing::IntTensorOf;
using testing::OnGpu;
using testing::OnHost;
using testing::OperandPair;
using testing::ProductTolerance;
using testing::RandomPair;
using testing::SameBits;
using testing::ToDoubles;

// Around the tile's 128 rows and the stage's 64, empty experts first, in the middle and last, all
// rows at one expert, no row at all.
const std::vector<std::vector<int32_t>>& OffsetCases() {
  static const std::vector<std::vector<int32_t>> cases = {
      {0, 1},
      {0, 0, 4, 4, 5, 5},
      {0, 128, 256, 320},
      {0, 63, 128, 257, 257},
      {0, 0, 300, 300},
      {0, 1, 2, 3, 4, 5, 6, 7, 8, 9},
      {0, 600, 1201},  // enough rows an expert for two blocks to share B
      {0, 0, 0},
  };
  return cases;
}

struct Widths {
  int64_t in, out;
};
// Whole tiles; multiples of 8 that are not of 64, the last for pairs of blocks; one vector; rows
// that TMA cannot address.
constexpr Widths kWidths[] = {{128, 256}, {72, 328}, {264, 520}, {8, 8}, {19, 37}};

struct Layer {
  Layer(DType dtype, const std::vector<int32_t>& offsets, Widths widths)
      : experts(static_cast<int64_t>(offsets.size()) - 1),
        rows(offsets.back()),
        x(RandomPair(dtype, {rows, widths.in}, 1)),
        dy(RandomPair(dtype, {rows, widths.out}, 2)),
        weight(RandomPair(dtype, {experts, widths.out, widths.in}, 3)),
        dweight(RandomPair(DType::kF32, {experts, widths.out, widths.in}, 4)),
        host_offsets(IntTensorOf(Context::Cpu(), {experts + 1}, offsets)),
        gpu_offsets(OnGpu(host_offsets)) {}
  int64_t experts, rows;
  OperandPair x, dy, weight, dweight;
  Tensor host_offsets, gpu_offsets;
};

TEST(CudaGroupedMatmul, AgreesWithTheDefinitionForGroupsOfAnySize) {
  const Context host = Context::Cpu();
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const Widths widths : kWidths) {
      for (const std::vector<int32_t>& offsets : OffsetCases()) {
        const Layer layer(dtype, offsets, widths);
        SCOPED_TRACE(::testing::Message()
                     << DTypeName(dtype) << " in " << widths.in << " out " << widths.out
                     << " offsets " << ::testing::PrintToString(offsets));
        const Tensor y = GroupedLinear(Gpu(), layer.x.gpu, layer.weight.gpu, layer.gpu_offsets);
        EXPECT_LE(
            ErrorOf(y, GroupedLinear(host, layer.x.host, layer.weight.host, layer.host_offsets)),
            ProductTolerance(dtype, dtype, widths.in));
        const Tensor dx =
            GroupedLinearBackwardInput(Gpu(), layer.dy.gpu, layer.weight.gpu, layer.gpu_offsets);
        EXPECT_LE(ErrorOf(dx, GroupedLinearBackwardInput(host, layer.dy.host, layer.weight.host,
                                                         layer.host_offsets)),
                  ProductTolerance(dtype, dtype, widths.out));
        GroupedLinearBackwardWeight(Gpu(), layer.dy.gpu, layer.x.gpu, layer.gpu_offsets,
                                    layer.dweight.gpu);
        GroupedLinearBackwardWeight(host, layer.dy.host, layer.x.host, layer.host_offsets,
                                    layer.dweight.host);
        EXPECT_LE(ErrorOf(layer.dweight.gpu, layer.dweight.host),
                  ProductTolerance(dtype, DType::kF32, layer.rows));
      }
    }
  }
}

TEST(CudaGroupedMatmul, GivesARowTheSameBitsWhateverSharesTheCall) {
  const Widths widths = {200, 136};
  const Layer all(DType::kBF16, {0, 70, 70, 333}, widths);
  const Tensor y = OnHost(GroupedLinear(Gpu(), all.x.gpu, all.weight.gpu, all.gpu_offsets));
  const Tensor again = OnHost(GroupedLinear(Gpu(), all.x.gpu, all.weight.gpu, all.gpu_offsets));
  EXPECT_TRUE(SameBits(y, again));
  // Rows 70..333 alone, at the last expert.
  const Tensor offsets = OnGpu(IntTensorOf(Context::Cpu(), {4}, {0, 0, 0, 263}));
  const Tensor alone =
      OnHost(GroupedLinear(Gpu(), all.x.gpu.Rows(70, 333), all.weight.gpu, offsets));
  EXPECT_TRUE(SameBits(y.Rows(70, 333), alone));
}

TEST(CudaGroupedMatmul, LeavesTheGradientOfAnEmptyExpertBitForBit) {
  const Layer layer(DType::kBF16, {0, 30, 30, 100}, {64, 72});
  const Tensor before = OnHost(layer.dweight.gpu);
  GroupedLinearBackwardWeight(Gpu(), layer.dy.gpu, layer.x.gpu, layer.gpu_offsets,
                              layer.dweight.gpu);
  const Tensor after = OnHost(layer.dweight.gpu);
  EXPECT_TRUE(SameBits(before.Rows(1, 2), after.Rows(1, 2)));
  EXPECT_FALSE(SameBits(before.Rows(0, 1), after.Rows(0, 1)));
}

TEST(CudaGroupedMatmul, KeepsNotANumberWithItsExpert) {
  const Context host = Context::Cpu();
  const std::vector<int32_t> offsets = {0, 100, 137, 300};
  Layer layer(DType::kBF16, offsets, {136, 264});
  for (OperandPair* pair : {&layer.x, &layer.dy}) {
    const Tensor spoilt = OnHost(pair->gpu);
    const int64_t width = spoilt.dim(1);
    for (int64_t i = 100 * width; i < 137 * width; ++i) {
      spoilt.data<BFloat16>()[i] = BFloat16::FromFloat(std::numeric_limits<float>::quiet_NaN());
    }
    pair->gpu = OnGpu(spoilt);
  }
  GroupedLinearBackwardWeight(Gpu(), layer.dy.gpu, layer.x.gpu, layer.gpu_offsets,
                              layer.dweight.gpu);
  const auto not_numbers = [](const Tensor& tensor) {
    int64_t count = 0;
    for (const double value : ToDoubles(tensor)) count += std::isnan(value);
    return count;
  };
  const Tensor dweight = OnHost(layer.dweight.gpu);
  EXPECT_EQ(not_numbers(dweight.Rows(1, 2)), 136 * 264);
  EXPECT_EQ(not_numbers(dweight), 136 * 264);
  EXPECT_EQ(
      not_numbers(OnHost(GroupedLinear(Gpu(), layer.x.gpu, layer.weight.gpu, layer.gpu_offsets))),
      37 * 264);
}

TEST(GroupedMatmulPlan, TakesTheTensorCoresForWholeVectorsOfBf16AndAtMostOneBlockAMultiprocessor) {
  GroupedMatmulCudaArgs args;
  args.num_rows = 1000;
  args.num_experts = 4;
  args.in = 7168;
  args.out = 2048;
  GroupedMatmulPlan plan = PlanGroupedMatmul(GroupedProduct::kForward, args, 132);
  EXPECT_TRUE(plan.tensor_cores);
  // At most 11 row tiles (1000 rows and three starts within a tile) of 8 columns.
  EXPECT_EQ(plan.num_blocks, 88);
  EXPECT_LE(plan.shared_bytes, 227 * 1024);
  EXPECT_EQ(plan.cluster, 1);
  // 4 x 8 x 28 tiles of 256 x 256, each of two blocks.
  plan = PlanGroupedMatmul(GroupedProduct::kBackwardWeight, args, 132);
  EXPECT_EQ(plan.num_blocks, 132);
  EXPECT_EQ(plan.cluster, 2);
  args.num_rows = 0;
  EXPECT_EQ(PlanGroupedMatmul(GroupedProduct::kForward, args, 132).num_blocks, 0);
  EXPECT_EQ(PlanGroupedMatmul(GroupedProduct::kBackwardWeight, args, 132).num_blocks, 0);
  args.num_rows = 1000;
  args.in = 7164;
  EXPECT_FALSE(PlanGroupedMatmul(GroupedProduct::kForward, args, 132).tensor_cores);
  args.in = 7168;
  args.element = CudaElement::kF32;
  EXPECT_FALSE(PlanGroupedMatmul(GroupedProduct::kForward, args, 132).tensor_cores);
}

}  // namespace
}  // namespace baleen
