// Grouped linear layers on the GPU against the CPU definition in fp64: groups of any size, widths
// with and without tensor cores.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/ops/linear/grouped_matmul.h"
#include "kernels/ops/linear/grouped_matmul_cuda.h"
#include "tests/cuda/operand_pair.h"
#include "tests/cuda/racecheck.h"

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
        second_dy(RandomPair(dtype, {rows, widths.out}, 5)),
        weight(RandomPair(dtype, {experts, widths.out, widths.in}, 3)),
        second_weight(RandomPair(dtype, {experts, widths.out, widths.in}, 6)),
        dweight(RandomPair(DType::kF32, {experts, widths.out, widths.in}, 4)),
        host_offsets(IntTensorOf(Context::Cpu(), {experts + 1}, offsets)),
        gpu_offsets(OnGpu(host_offsets)) {}
  // dx of the two layers on the GPU.
  Tensor OfTwo() const {
    return GroupedLinearBackwardInputOfTwo(Gpu(), dy.gpu, weight.gpu, second_dy.gpu,
                                           second_weight.gpu, gpu_offsets);
  }
  int64_t experts, rows;
  OperandPair x, dy, second_dy, weight, second_weight, dweight;
  Tensor host_offsets, gpu_offsets;
};

// The kernels that `cluster` chooses between, into memory full of NaN.
Tensor OfTwoIntoNaN(const Layer& layer, Widths widths, int cluster) {
  const DType dtype = layer.dy.gpu.dtype();
  const Tensor dx = Gpu().Empty(dtype, {layer.rows, widths.in});
  GroupedMatmulCudaArgs args;
  args.element = dtype == DType::kBF16 ? CudaElement::kBF16 : CudaElement::kF32;
  args.num_rows = layer.rows;
  args.num_experts = layer.experts;
  args.in = widths.in;
  args.out = widths.out;
  args.offsets_L1 = layer.gpu_offsets.data<int32_t>();
  args.left = layer.dy.gpu.raw();
  args.right = layer.weight.gpu.raw();
  args.second_left = layer.second_dy.gpu.raw();
  args.second_right = layer.second_weight.gpu.raw();
  args.result = dx.raw();
  const auto stream = static_cast<cudaStream_t>(Gpu().stream());
  CHECK(cudaMemsetAsync(dx.raw(), 0xFF, static_cast<size_t>(dx.bytes()), stream) == cudaSuccess);
  const GroupedProduct product = GroupedProduct::kBackwardInputOfTwo;
  LaunchGroupedMatmul(product, args, PlanGroupedMatmul(product, args, 132, cluster), stream);
  return dx;
}

void ExpectSumOfTwo(const Layer& layer, Widths widths) {
  const DType dtype = layer.dy.gpu.dtype();
  const Tensor expected = GroupedLinearBackwardInputOfTwo(
      Context::Cpu(), layer.dy.host, layer.weight.host, layer.second_dy.host,
      layer.second_weight.host, layer.host_offsets);
  const Tensor dx = layer.OfTwo();
  EXPECT_EQ(dx.shape(), expected.shape());
  EXPECT_LE(ErrorOf(dx, expected), ProductTolerance(dtype, dtype, 2 * widths.out));
  if (layer.rows == 0) return;
  for (const int cluster : {1, 2}) {
    EXPECT_TRUE(SameBits(OnHost(OfTwoIntoNaN(layer, widths, cluster)), OnHost(dx)))
        << cluster << " blocks share the weights";
  }
}

// A dW that is written over NaN is that which is added to zeros, of experts without rows too.
void ExpectWrittenAsAddedToZero(const Layer& layer) {
  const Shape shape = layer.dweight.gpu.shape();
  const Tensor added = Gpu().Zeros(DType::kF32, shape), written = Gpu().Empty(DType::kF32, shape);
  const auto stream = static_cast<cudaStream_t>(Gpu().stream());
  CHECK(cudaMemsetAsync(written.raw(), 0xFF, static_cast<size_t>(written.bytes()), stream) ==
        cudaSuccess);
  GroupedLinearBackwardWeight(Gpu(), layer.dy.gpu, layer.x.gpu, layer.gpu_offsets, added);
  GroupedLinearBackwardWeight(Gpu(), layer.dy.gpu, layer.x.gpu, layer.gpu_offsets, written,
                              Accumulate::kOverwrite);
  EXPECT_EQ(ToDoubles(OnHost(written)), ToDoubles(OnHost(added)));
}

TEST(CudaGroupedMatmul, AgreesWithTheDefinitionForGroupsOfAnySize) {
  const Context host = Context::Cpu();
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const Widths widths : kWidths) {
      for (const std::vector<int32_t>& offsets : OffsetCases()) {
        // The plain kernel reads shared memory for each product: one width of vectors there.
        if (testing::UnderRacecheck() && dtype == DType::kF32 &&
            (widths.in > 100 || offsets.back() > 1000)) {
          continue;
        }
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
        ExpectSumOfTwo(layer, widths);
        ExpectWrittenAsAddedToZero(layer);
      }
    }
  }
}

TEST(CudaGroupedMatmul, RoundsTheSumOfTwoLayersOnce) {
  // Whole numbers. The second pair takes back all of the first but row 0 of W, so dx is that row;
  // either product alone has sums beyond 256, which bf16 rounds.
  constexpr Widths kWide = {136, 328};
  const std::vector<int32_t> offsets = {0, 70, 70, 333};
  Layer layer(DType::kBF16, offsets, kWide);
  const auto whole = [](const Tensor& like, int64_t factor) {
    std::vector<double> values;
    for (int64_t i = 0; i < like.num_elements(); ++i) {
      values.push_back(static_cast<double>(i * factor % 1009 % 17 - 8));
    }
    return values;
  };
  const auto pair = [](OperandPair& to, const std::vector<double>& values) {
    const Context host = Context::Cpu();
    to.host = testing::TensorOf(host, DType::kF64, to.host.shape(), values);
    const Tensor rounded = host.Empty(DType::kBF16, to.host.shape());
    for (size_t i = 0; i < values.size(); ++i) {
      rounded.data<BFloat16>()[i] = BFloat16::FromFloat(static_cast<float>(values[i]));
    }
    to.gpu = OnGpu(rounded);
  };
  std::vector<double> dy = whole(layer.dy.host, 7), weight = whole(layer.weight.host, 13);
  pair(layer.dy, dy);
  pair(layer.weight, weight);
  for (size_t i = 0; i < dy.size(); i += kWide.out) dy[i] -= 1;
  for (double& w : weight) w = -w;
  pair(layer.second_dy, dy);
  pair(layer.second_weight, weight);
  const std::vector<double> dx = ToDoubles(OnHost(layer.OfTwo()));
  for (size_t i = 0; i < dx.size(); ++i) {
    const size_t expert = i / kWide.in < 70 ? 0 : 2;
    ASSERT_EQ(dx[i], -weight[expert * kWide.in * kWide.out + i % kWide.in]) << i;
  }
  const Tensor one =
      GroupedLinearBackwardInput(Gpu(), layer.dy.gpu, layer.weight.gpu, layer.gpu_offsets);
  double largest = 0;
  for (const double value : ToDoubles(OnHost(one))) largest = std::max(largest, std::abs(value));
  EXPECT_GT(largest, 256);
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
  const Tensor dx = OnHost(all.OfTwo());
  EXPECT_TRUE(SameBits(dx, OnHost(all.OfTwo())));
  const Tensor dx_alone = OnHost(GroupedLinearBackwardInputOfTwo(
      Gpu(), all.dy.gpu.Rows(70, 333), all.weight.gpu, all.second_dy.gpu.Rows(70, 333),
      all.second_weight.gpu, offsets));
  EXPECT_TRUE(SameBits(dx.Rows(70, 333), dx_alone));
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
  EXPECT_EQ(not_numbers(OnHost(layer.OfTwo())), 37 * 136);
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
