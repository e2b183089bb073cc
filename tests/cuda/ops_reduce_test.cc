// Sums and hashes on the GPU: fp64 sums, integer sums exactly, the same bits every time.
#include "kernels/core/random.h"
#include "kernels/ops/indexer/selection_hash.h"
#include "kernels/ops/reduce.h"
#include "tests/cuda/ops_support.h"

namespace baleen {
namespace {

using testing::Cpu;
using testing::ExpectSameBits;
using testing::Gpu;
using testing::IntsOnBoth;
using testing::kGpuDtypes;
using testing::OnBoth;
using testing::OnGpu;
using testing::OnHost;
using testing::RandomOnBoth;
using testing::TensorOf;

constexpr int64_t kCounts[] = {0, 1, 5, 16384, 16385, 3 * 16384 + 7, 1 << 20};

double Value(const Tensor& gpu_1) { return OnHost(gpu_1).data<double>()[0]; }

TEST(CudaReduce, SumsInDoubles) {
  for (const DType dtype : kGpuDtypes) {
    for (const int64_t count : kCounts) {
      const OnBoth x = RandomOnBoth(dtype, {count}, 1), y = RandomOnBoth(dtype, {count}, 2);
      const auto sums = [&](const Context& context, const Tensor& a, const Tensor& b) {
        const Tensor sum = context.Zeros(DType::kF64, {1}),
                     squares = context.Zeros(DType::kF64, {1});
        const Tensor dot = context.Zeros(DType::kF64, {1});
        AddConstant(context, 0.5, sum);
        AddSum(context, a, sum);
        AddSumOfSquares(context, a, squares);
        AddDot(context, a, b, -2.0, dot);
        return std::vector<Tensor>{sum, squares, dot};
      };
      const std::vector<Tensor> gpu = sums(Gpu(), x.gpu, y.gpu), cpu = sums(Cpu(), x.cpu, y.cpu);
      const std::vector<Tensor> again = sums(Gpu(), x.gpu, y.gpu);
      // Two orders of n terms of size 1 (dot: 2): n^0.5 roundings of sums that reach n.
      const double n = static_cast<double>(count + 1);
      const double bound = 8 * 0x1p-53 * std::sqrt(n) * n;
      for (size_t i = 0; i < gpu.size(); ++i) {
        EXPECT_NEAR(Value(gpu[i]), cpu[i].data<double>()[0], bound) << count << " " << i;
        ExpectSameBits(again[i], OnHost(gpu[i]));
      }
    }
  }
}

TEST(CudaReduce, SumsEveryOffset) {
  for (const DType dtype : kGpuDtypes) {
    const OnBoth x = RandomOnBoth(dtype, {1000}, 3);
    for (const int64_t begin : {0, 1, 3, 8}) {
      const Tensor sum = Gpu().Zeros(DType::kF64, {1}), expected = Cpu().Zeros(DType::kF64, {1});
      AddSum(Gpu(), x.gpu.Flat(begin, 900), sum);
      AddSum(Cpu(), x.cpu.Flat(begin, 900), expected);
      EXPECT_NEAR(Value(sum), expected.data<double>()[0], 1e-12);
    }
  }
}

TEST(CudaReduce, NotANumberPropagates) {
  const OnBoth x = testing::ValuesOnBoth(DType::kBF16, {3}, {1, std::nan(""), 2});
  const Tensor sum = Gpu().Zeros(DType::kF64, {1});
  AddSumOfSquares(Gpu(), x.gpu, sum);
  EXPECT_TRUE(std::isnan(Value(sum)));
}

TEST(CudaReduce, SumsIntegersExactly) {
  for (const int64_t count : kCounts) {
    std::vector<int32_t> values(count);
    for (int64_t i = 0; i < count; ++i) values[i] = static_cast<int32_t>((i * 7919) % 2053 - 5);
    const OnBoth x = IntsOnBoth({count}, values);
    const Tensor gpu = OnGpu(TensorOf(Cpu(), DType::kF64, {1}, {3}));
    const Tensor cpu = TensorOf(Cpu(), DType::kF64, {1}, {3});
    AddIntSum(Gpu(), x.gpu, gpu);
    AddIntSum(Cpu(), x.cpu, cpu);
    ExpectSameBits(gpu, cpu);
  }
}

TEST(CudaSelectionHash, IsTheHashOfTheCpu) {
  const RandomStream random(5, 6);
  for (const auto& [rows, K] : {std::pair<int64_t, int64_t>{1, 1}, {0, 4}, {37, 5}, {130, 2048}}) {
    std::vector<int32_t> row(rows), ids(rows * K);
    for (int64_t r = 0; r < rows; ++r) row[r] = static_cast<int32_t>(random.Integer(r) % 100000);
    for (int64_t i = 0; i < rows * K; ++i) {
      ids[i] = static_cast<int32_t>(random.Integer(rows + i) % 131072) - (i % 11 == 0 ? 131072 : 0);
      ids[i] = std::max(ids[i], -1);
    }
    const OnBoth row_R = IntsOnBoth({rows}, row), ids_RK = IntsOnBoth({rows, K}, ids);
    const Tensor gpu = Gpu().Zeros(DType::kI64, {1}), cpu = Cpu().Zeros(DType::kI64, {1});
    for (int repeat = 0; repeat < 2; ++repeat) {
      AddSelectionHash(Gpu(), row_R.gpu, ids_RK.gpu, gpu);
      AddSelectionHash(Cpu(), row_R.cpu, ids_RK.cpu, cpu);
    }
    ExpectSameBits(gpu, cpu);
  }
}

TEST(CudaSelectionHash, KeepsTheFirstNanRowAndCountsIt) {
  for (const int32_t nan_row : {-1, 0, 7}) {
    for (const int32_t first : {-1, 3}) {
      const OnBoth nan_row_1 = IntsOnBoth({1}, {nan_row}), first_1 = IntsOnBoth({1}, {first});
      KeepFirstNanRow(Gpu(), nan_row_1.gpu, 100, first_1.gpu);
      KeepFirstNanRow(Cpu(), nan_row_1.cpu, 100, first_1.cpu);
      ExpectSameBits(first_1.gpu, first_1.cpu);
      const Tensor gpu = Gpu().Zeros(DType::kI64, {1}), cpu = Cpu().Zeros(DType::kI64, {1});
      CountNanRow(Gpu(), first_1.gpu, gpu);
      CountNanRow(Cpu(), first_1.cpu, cpu);
      ExpectSameBits(gpu, cpu);
    }
  }
}

}  // namespace
}  // namespace baleen
