// Elementwise passes and strided copies on the GPU.
#include "kernels/ops/elementwise.h"
#include "kernels/ops/strided.h"
#include "tests/cuda/ops_support.h"

namespace baleen {
namespace {

using testing::Cpu;
using testing::ExpectClose;
using testing::ExpectSameBits;
using testing::Gpu;
using testing::kGpuDtypes;
using testing::Misaligned;
using testing::OnBoth;
using testing::OnGpu;
using testing::OnHost;
using testing::RandomOnBoth;

constexpr int64_t kCounts[] = {0, 1, 7, 8, 255, 256 * 24 + 3, 100003};

TEST(CudaElementwise, AddsAndScalesLikeTheCpu) {
  for (const DType dtype : kGpuDtypes) {
    for (const int64_t count : kCounts) {
      const OnBoth a = RandomOnBoth(dtype, {count}, 1), b = RandomOnBoth(dtype, {count}, 2);
      ExpectClose(Add(Gpu(), a.gpu, b.gpu), Add(Cpu(), a.cpu, b.cpu));
      ExpectClose(Add(Gpu(), Misaligned(a.gpu), b.gpu), Add(Cpu(), a.cpu, b.cpu));
      AddInPlace(Gpu(), a.gpu, b.gpu);
      AddInPlace(Cpu(), a.cpu, b.cpu);
      ExpectClose(a.gpu, a.cpu);
      ScaleInPlace(Gpu(), b.gpu, -0.3);
      ScaleInPlace(Cpu(), b.cpu, -0.3);
      ExpectClose(b.gpu, b.cpu);
    }
  }
}

TEST(CudaElementwise, CastsWithTheRoundingOfTheHost) {
  for (const int64_t count : kCounts) {
    const Tensor f32 = testing::RandomTensor(Cpu(), DType::kF32, {count}, 3, 1e3);
    const Tensor bf16 = Cast(Cpu(), f32, DType::kBF16);
    ExpectSameBits(Cast(Gpu(), OnGpu(f32), DType::kBF16), bf16);
    ExpectSameBits(Cast(Gpu(), Misaligned(OnGpu(f32)), DType::kBF16), bf16);
    ExpectSameBits(Cast(Gpu(), OnGpu(bf16), DType::kF32), Cast(Cpu(), bf16, DType::kF32));
  }
}

TEST(CudaElementwise, FillsCopiesAndClones) {
  for (const DType dtype : kGpuDtypes) {
    const OnBoth a = RandomOnBoth(dtype, {1001}, 4);
    const Tensor clone = Clone(Gpu(), a.gpu);
    ExpectSameBits(clone, OnHost(a.gpu));
    FillZero(Gpu(), clone.Flat(1, 500));
    const Tensor host = OnHost(a.gpu);
    FillZero(Cpu(), host.Flat(1, 500));
    ExpectSameBits(clone, host);
  }
  const Tensor ints = Gpu().Zeros(DType::kI32, {1003});
  FillInt(Gpu(), ints.Flat(1, 1001), -7);
  const Tensor host = Cpu().Zeros(DType::kI32, {1003});
  FillInt(Cpu(), host.Flat(1, 1001), -7);
  ExpectSameBits(ints, host);
}

TEST(CudaElementwise, JoinsAndSlicesColumns) {
  for (const DType dtype : kGpuDtypes) {
    for (const auto& [rows, A, B] : {std::tuple<int64_t, int64_t, int64_t>{5, 512, 64},
                                     {3, 7, 5},
                                     {0, 8, 8},
                                     {1, 1, 0},
                                     {257, 24, 3}}) {
      const OnBoth a = RandomOnBoth(dtype, {rows, A}, 5), b = RandomOnBoth(dtype, {rows, B}, 6);
      const Tensor joined = ConcatColumns(Gpu(), a.gpu, b.gpu);
      const Tensor host = ConcatColumns(Cpu(), OnHost(a.gpu), OnHost(b.gpu));
      ExpectSameBits(joined, host);
      for (const auto& [begin, count] : {std::pair<int64_t, int64_t>{0, A}, {A, B}, {A / 2, B}}) {
        ExpectSameBits(SliceColumns(Gpu(), joined, begin, count),
                       SliceColumns(Cpu(), host, begin, count));
      }
    }
  }
}

// The columns of heads within rows, as attention uses them.
struct ViewCase {
  int64_t rows, heads, from_width, to_width, from_begin, to_begin, cols;
};
constexpr ViewCase kViews[] = {{19, 4, 192, 576, 128, 512, 64},
                               {7, 3, 5, 9, 1, 2, 3},
                               {1, 1, 8, 8, 0, 0, 8},
                               {0, 2, 8, 8, 0, 0, 8},
                               {33, 2, 24, 16, 8, 4, 12}};

TEST(CudaStrided, CopiesHeadsAndBroadcastsOneRow) {
  for (const DType dtype : kGpuDtypes) {
    for (const ViewCase& c : kViews) {
      const OnBoth from = RandomOnBoth(dtype, {c.rows, c.heads, c.from_width}, 7);
      const OnBoth row = RandomOnBoth(dtype, {c.rows, c.from_width}, 8);
      for (const bool broadcast : {false, true}) {
        const OnBoth to = RandomOnBoth(dtype, {c.rows, c.heads, c.to_width}, 9);
        const auto copy = [&](const Context& context, const Tensor& x, const Tensor& one,
                              const Tensor& y) {
          const MatrixView source = broadcast ? AsMatrix(one) : PerHead(x);
          CopyView(context, source.Columns(c.from_begin, c.cols),
                   PerHead(y).Columns(c.to_begin, c.cols));
        };
        copy(Gpu(), from.gpu, row.gpu, to.gpu);
        copy(Cpu(), from.cpu, row.cpu, to.cpu);
        // Values of the dtype, moved: exactly equal.
        EXPECT_EQ(testing::ToDoubles(OnHost(to.gpu)), testing::ToDoubles(to.cpu));
      }
    }
  }
}

TEST(CudaStrided, SumsTheBatchInOrder) {
  for (const DType dtype : kGpuDtypes) {
    for (const ViewCase& c : kViews) {
      const OnBoth from = RandomOnBoth(dtype, {c.rows, c.heads, c.from_width}, 10);
      const OnBoth to = RandomOnBoth(dtype, {c.rows, c.to_width}, 11);
      AddBatchSum(Gpu(), PerHead(from.gpu).Columns(c.from_begin, c.cols),
                  AsMatrix(to.gpu).Columns(c.to_begin, c.cols));
      AddBatchSum(Cpu(), PerHead(from.cpu).Columns(c.from_begin, c.cols),
                  AsMatrix(to.cpu).Columns(c.to_begin, c.cols));
      ExpectClose(to.gpu, to.cpu, c.heads + 1);
    }
  }
}

TEST(CudaElementwise, RefusesDoubles) {
  const Tensor f64 = OnGpu(testing::RandomTensor(Cpu(), DType::kF64, {3}, 12));
  GTEST_FLAG_SET(death_test_style, "threadsafe");
  EXPECT_DEATH(Add(Gpu(), f64, f64), "add: a is F64\\[3\\], the CUDA kernels take BF16 and F32");
}

}  // namespace
}  // namespace baleen
