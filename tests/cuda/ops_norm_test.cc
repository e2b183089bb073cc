// RMSNorm and LayerNorm on the GPU: forward, both gradients, rows of any length.
#include "kernels/ops/layer_norm.h"
#include "kernels/ops/rms_norm.h"
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
using testing::OnHost;
using testing::RandomOnBoth;
using testing::ZerosOnBoth;

struct RowsOf {
  int64_t rows, D;
};
// The model's widths, odd ones, a row longer than the registers of its block, no rows.
constexpr RowsOf kCases[] = {{3, 7168}, {67, 1536}, {33, 512},  {131, 128}, {1, 5},
                             {5, 7},    {9, 33},    {2, 40000}, {0, 64},    {700, 24}};

TEST(CudaRmsNorm, MatchesTheDefinitionForwardAndBackward) {
  for (const DType dtype : kGpuDtypes) {
    for (const auto& [rows, D] : kCases) {
      SCOPED_TRACE(::testing::Message() << rows << " x " << D << " " << dtype);
      const OnBoth x = RandomOnBoth(dtype, {rows, D}, 1, 3.0);
      const OnBoth dy = RandomOnBoth(dtype, {rows, D}, 2), weight = RandomOnBoth(dtype, {D}, 3);
      const RmsNormResult gpu = RmsNorm(Gpu(), x.gpu, weight.gpu, 1e-6);
      const RmsNormResult cpu = RmsNorm(Cpu(), x.cpu, weight.cpu, 1e-6);
      ExpectClose(gpu.y, cpu.y);
      ExpectClose(gpu.rstd, cpu.rstd);
      ExpectClose(RmsNormBackwardInput(Gpu(), dy.gpu, x.gpu, weight.gpu, gpu.rstd),
                  RmsNormBackwardInput(Cpu(), dy.cpu, x.cpu, weight.cpu, cpu.rstd), 4);
      const OnBoth dweight = RandomOnBoth(DType::kF32, {D}, 4);
      RmsNormBackwardWeight(Gpu(), dy.gpu, x.gpu, gpu.rstd, dweight.gpu);
      RmsNormBackwardWeight(Cpu(), dy.cpu, x.cpu, cpu.rstd, dweight.cpu);
      ExpectClose(dweight.gpu, dweight.cpu, rows);
    }
  }
}

TEST(CudaRmsNorm, TakesRowsThatAreNotAligned) {
  for (const DType dtype : kGpuDtypes) {
    const OnBoth x = RandomOnBoth(dtype, {5, 256}, 1), weight = RandomOnBoth(dtype, {256}, 2);
    const RmsNormResult cpu = RmsNorm(Cpu(), x.cpu, weight.cpu, 1e-6);
    ExpectClose(RmsNorm(Gpu(), Misaligned(x.gpu), weight.gpu, 1e-6).y, cpu.y);
    ExpectClose(RmsNorm(Gpu(), x.gpu, Misaligned(weight.gpu), 1e-6).y, cpu.y);
  }
}

TEST(CudaRmsNorm, GivesTheSameBitsAgain) {
  const OnBoth x = RandomOnBoth(DType::kBF16, {1500, 512}, 1);
  const OnBoth dy = RandomOnBoth(DType::kBF16, {1500, 512}, 2);
  const OnBoth weight = RandomOnBoth(DType::kBF16, {512}, 3);
  const RmsNormResult norm = RmsNorm(Gpu(), x.gpu, weight.gpu, 1e-6);
  const OnBoth first = ZerosOnBoth(DType::kF32, {512}), second = ZerosOnBoth(DType::kF32, {512});
  RmsNormBackwardWeight(Gpu(), dy.gpu, x.gpu, norm.rstd, first.gpu);
  RmsNormBackwardWeight(Gpu(), dy.gpu, x.gpu, norm.rstd, second.gpu);
  ExpectSameBits(first.gpu, OnHost(second.gpu));
}

TEST(CudaLayerNorm, MatchesTheDefinitionForwardAndBackward) {
  for (const DType dtype : kGpuDtypes) {
    for (const auto& [rows, D] : kCases) {
      SCOPED_TRACE(::testing::Message() << rows << " x " << D << " " << dtype);
      const OnBoth x = RandomOnBoth(dtype, {rows, D}, 1, 3.0);
      const OnBoth dy = RandomOnBoth(dtype, {rows, D}, 2), weight = RandomOnBoth(dtype, {D}, 3);
      const OnBoth bias = RandomOnBoth(dtype, {D}, 4);
      const LayerNormResult gpu = LayerNorm(Gpu(), x.gpu, weight.gpu, bias.gpu, 1e-6);
      const LayerNormResult cpu = LayerNorm(Cpu(), x.cpu, weight.cpu, bias.cpu, 1e-6);
      ExpectClose(gpu.y, cpu.y, 4);
      ExpectClose(gpu.rstd, cpu.rstd, 4);
      // A mean is a sum of D terms of size 3 that cancel: its error is of the terms' size.
      const std::vector<double> mean = testing::ToDoubles(OnHost(gpu.mean));
      for (int64_t r = 0; r < rows; ++r) {
        EXPECT_NEAR(mean[r], cpu.mean.data<double>()[r], 3e-6);
      }
      ExpectClose(LayerNormBackwardInput(Gpu(), dy.gpu, x.gpu, weight.gpu, gpu.mean, gpu.rstd),
                  LayerNormBackwardInput(Cpu(), dy.cpu, x.cpu, weight.cpu, cpu.mean, cpu.rstd), 16);
      const OnBoth dweight = RandomOnBoth(DType::kF32, {D}, 5);
      const OnBoth dbias = RandomOnBoth(DType::kF32, {D}, 6);
      LayerNormBackwardWeight(Gpu(), dy.gpu, x.gpu, gpu.mean, gpu.rstd, dweight.gpu, dbias.gpu);
      LayerNormBackwardWeight(Cpu(), dy.cpu, x.cpu, cpu.mean, cpu.rstd, dweight.cpu, dbias.cpu);
      ExpectClose(dweight.gpu, dweight.cpu, rows);
      ExpectClose(dbias.gpu, dbias.cpu, rows);
    }
  }
}

TEST(CudaLayerNorm, KeepsItsBitsBesideALargeMean) {
  const int64_t D = 128;
  std::vector<double> values(D);
  for (int64_t d = 0; d < D; ++d) values[d] = 4096 + (d % 3 == 0 ? 1 : -0.5);
  const OnBoth x = testing::ValuesOnBoth(DType::kF32, {1, D}, values);
  const OnBoth one = testing::ValuesOnBoth(DType::kF32, {D}, std::vector<double>(D, 1.0));
  const OnBoth zero = ZerosOnBoth(DType::kF32, {D});
  // The mean is rounded at 4096: 2^-12 of deviations of 1.
  const std::vector<double> y =
      testing::ToDoubles(OnHost(LayerNorm(Gpu(), x.gpu, one.gpu, zero.gpu, 1e-6).y));
  const std::vector<double> expected =
      testing::ToDoubles(LayerNorm(Cpu(), x.cpu, one.cpu, zero.cpu, 1e-6).y);
  for (int64_t d = 0; d < D; ++d) EXPECT_NEAR(y[d], expected[d], 1e-3);
}

}  // namespace
}  // namespace baleen
