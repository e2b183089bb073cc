// SwiGLU, RoPE, Hadamard and FP8 rounding on the GPU.
#include "kernels/ops/hadamard.h"
#include "kernels/ops/indexer/fp8_simulate.h"
#include "kernels/ops/rope.h"
#include "kernels/ops/swiglu.h"
#include "tests/cuda/ops_support.h"

namespace baleen {
namespace {

using testing::Cpu;
using testing::ExpectClose;
using testing::ExpectSameBits;
using testing::Gpu;
using testing::IntsOnBoth;
using testing::kGpuDtypes;
using testing::Misaligned;
using testing::OnBoth;
using testing::OnHost;
using testing::RandomOnBoth;

TEST(CudaSwiglu, MatchesTheDefinitionForwardAndBackward) {
  for (const DType dtype : kGpuDtypes) {
    for (const int64_t count : {0, 1, 9, 2048 * 3, 100003}) {
      const OnBoth gate = RandomOnBoth(dtype, {count}, 1, 3), up = RandomOnBoth(dtype, {count}, 2);
      const OnBoth dy = RandomOnBoth(dtype, {count}, 3);
      // A handful of fp32 roundings; bf16's fast exponential is 2^-20.
      ExpectClose(Swiglu(Gpu(), gate.gpu, up.gpu), Swiglu(Cpu(), gate.cpu, up.cpu), 4);
      ExpectClose(Swiglu(Gpu(), Misaligned(gate.gpu), up.gpu), Swiglu(Cpu(), gate.cpu, up.cpu), 4);
      const SwigluGradients gpu = SwigluBackward(Gpu(), dy.gpu, gate.gpu, up.gpu);
      const SwigluGradients cpu = SwigluBackward(Cpu(), dy.cpu, gate.cpu, up.cpu);
      ExpectClose(gpu.dgate, cpu.dgate, 4);
      ExpectClose(gpu.dup, cpu.dup, 4);
    }
  }
}

TEST(CudaSwiglu, HasTheLimitsOfTheFormula) {
  for (const DType dtype : kGpuDtypes) {
    const OnBoth gate = testing::ValuesOnBoth(dtype, {4}, {-1e4, -100, 100, 1e4});
    const OnBoth up = testing::ValuesOnBoth(dtype, {4}, {1, 1, 2, 2});
    const std::vector<double> y = testing::ToDoubles(OnHost(Swiglu(Gpu(), gate.gpu, up.gpu)));
    EXPECT_EQ(y[0], 0);
    EXPECT_NEAR(y[1], 0, 1e-38);
    EXPECT_EQ(y[2], 200);
    EXPECT_EQ(y[3], testing::ToDoubles(up.cpu)[3] * testing::ToDoubles(gate.cpu)[3]);
  }
}

struct RopeCase {
  int64_t tokens, heads, width, begin, R;
};
// The model's query, key row and indexer, then odd sizes.
constexpr RopeCase kRopes[] = {{37, 5, 192, 128, 64}, {129, 1, 64, 0, 64}, {11, 3, 128, 0, 64},
                               {1, 1, 6, 1, 4},       {5, 2, 7, 3, 2},     {0, 2, 64, 0, 64}};

TEST(CudaRope, RotatesViewsInBothLayoutsAndBack) {
  for (const DType dtype : kGpuDtypes) {
    for (const RopeCase& c : kRopes) {
      const std::vector<double> frequencies = RopeFrequencies({.dim = c.R, .factor = 40});
      const RopeTable gpu_table = MakeRopeTable(Gpu(), dtype, frequencies, 5000);
      const RopeTable cpu_table = MakeRopeTable(Cpu(), DType::kF64, frequencies, 5000);
      std::vector<int32_t> positions(c.tokens);
      for (int64_t t = 0; t < c.tokens; ++t) positions[t] = static_cast<int32_t>(4999 - 37 * t);
      const OnBoth positions_T = IntsOnBoth({c.tokens}, positions);
      for (const RopeLayout layout : {RopeLayout::kInterleaved, RopeLayout::kHalfSplit}) {
        for (const RopeDirection direction : {RopeDirection::kForward, RopeDirection::kBackward}) {
          const OnBoth x = RandomOnBoth(dtype, {c.tokens, c.heads, c.width}, 1);
          ApplyRope(Gpu(), PerHead(x.gpu).Columns(c.begin, c.R), positions_T.gpu, gpu_table, layout,
                    direction);
          ApplyRope(Cpu(), PerHead(x.cpu).Columns(c.begin, c.R), positions_T.cpu, cpu_table, layout,
                    direction);
          ExpectClose(x.gpu, x.cpu, 2);
        }
      }
    }
  }
}

TEST(CudaRope, TablesKeepTheirBitsAtFarPositions) {
  const std::vector<double> frequencies = RopeFrequencies({.dim = 64, .factor = 40});
  const RopeTable gpu = MakeRopeTable(Gpu(), DType::kBF16, frequencies, 131072);
  const RopeTable cpu = MakeRopeTable(Cpu(), DType::kF32, frequencies, 131072);
  const std::vector<double> cos = testing::ToDoubles(OnHost(gpu.cos));
  const std::vector<double> sin = testing::ToDoubles(OnHost(gpu.sin));
  for (int64_t i = 131000 * 32; i < 131072 * 32; ++i) {
    // The same fp64 angle; the two libraries round its sine within an ulp of fp64.
    ASSERT_NEAR(cos[i], cpu.cos.data<float>()[i], 0x1p-24);
    ASSERT_NEAR(sin[i], cpu.sin.data<float>()[i], 0x1p-24);
  }
}

TEST(CudaHadamard, TransformsRowsOfEveryPowerOfTwo) {
  for (const DType dtype : kGpuDtypes) {
    for (const int64_t dim : {1, 2, 4, 8, 16, 64, 128, 256, 512, 8192}) {
      const OnBoth x = RandomOnBoth(dtype, {dim > 1000 ? 3 : 37, dim}, 1);
      const Tensor y = HadamardTransform(Gpu(), x.gpu);
      ExpectClose(y, HadamardTransform(Cpu(), x.cpu), dim);
      ExpectClose(HadamardTransform(Gpu(), Misaligned(x.gpu)), HadamardTransform(Cpu(), x.cpu),
                  dim);
    }
    EXPECT_EQ(HadamardTransform(Gpu(), Gpu().Empty(dtype, {0, 128})).shape(), (Shape{0, 128}));
  }
}

TEST(CudaSimulateFp8, HasTheBitsOfTheDefinition) {
  for (const int64_t group : {1, 4, 24, 32, 128, 256, 1024}) {
    for (const double scale : {1e-6, 1.0, 300.0, 1e6}) {
      const Tensor f32 = testing::RandomTensor(Cpu(), DType::kF32, {13, group * 2}, 1, scale);
      ExpectSameBits(SimulateFp8(Gpu(), testing::OnGpu(f32), group),
                     SimulateFp8(Cpu(), f32, group));
      // bf16: the definition on the same values, whose results a bf16 holds.
      const Tensor bf16 = Cast(Cpu(), f32, DType::kBF16);
      const Tensor expected = SimulateFp8(Cpu(), Cast(Cpu(), bf16, DType::kF32), group);
      const Tensor y = SimulateFp8(Gpu(), testing::OnGpu(bf16), group);
      ExpectSameBits(y, Cast(Cpu(), expected, DType::kBF16));
      ExpectSameBits(SimulateFp8(Gpu(), Misaligned(testing::OnGpu(bf16)), group), OnHost(y));
    }
  }
}

TEST(CudaSimulateFp8, TakesBordersOfTheFormat) {
  // 448 and its neighbours (the scale's step), ties between codes, subnormal codes, zero.
  const std::vector<double> values = {448, 1, 0.0009765625, 0.001953125, 448.00003, 2, 17, 19,
                                      896, 0, -0.0,         1e-30,       1e-4,      0, 0,  -1e-4};
  const Tensor f32 = testing::TensorOf(Cpu(), DType::kF32, {16}, values);
  ExpectSameBits(SimulateFp8(Gpu(), testing::OnGpu(f32), 4), SimulateFp8(Cpu(), f32, 4));
  const Tensor infinite = testing::TensorOf(Cpu(), DType::kF32, {4}, {1, INFINITY, 2, -3});
  for (const double y :
       testing::ToDoubles(OnHost(SimulateFp8(Gpu(), testing::OnGpu(infinite), 4)))) {
    EXPECT_TRUE(std::isnan(y));
  }
}

}  // namespace
}  // namespace baleen
