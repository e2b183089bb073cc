// AdamW on the GPU: ranges with their own decay, the bf16 copy beside the master, clipping,
// skipping.
#include "kernels/ops/adamw.h"
#include "tests/cuda/ops_support.h"

namespace baleen {
namespace {

using testing::Cpu;
using testing::ExpectClose;
using testing::ExpectSameBits;
using testing::Gpu;
using testing::OnBoth;
using testing::OnGpu;
using testing::OnHost;
using testing::RandomOnBoth;
using testing::TensorOf;
using testing::ToDoubles;
using testing::ValuesOnBoth;

constexpr AdamwParams kParams = {
    .lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .eps = 1e-8, .weight_decay = 0.1, .step = 3};

struct State {
  OnBoth param, grad, m, v;
};
State SomeState(int64_t count) {
  State s{RandomOnBoth(DType::kF32, {count}, 1), RandomOnBoth(DType::kF32, {count}, 2),
          RandomOnBoth(DType::kF32, {count}, 3), RandomOnBoth(DType::kF32, {count}, 4)};
  // v is a mean of squares.
  const Tensor v = OnHost(s.v.gpu);
  for (int64_t i = 0; i < count; ++i) v.data<float>()[i] = std::abs(v.data<float>()[i]) + 1e-3f;
  s.v = {OnGpu(v), Cast(Cpu(), v, DType::kF64)};
  return s;
}
AdamwTensors OnGpuSide(const State& s) {
  return {.param = s.param.gpu, .grad = s.grad.gpu, .m = s.m.gpu, .v = s.v.gpu};
}
AdamwTensors OnCpuSide(const State& s) {
  return {.param = s.param.cpu, .grad = s.grad.cpu, .m = s.m.cpu, .v = s.v.cpu};
}
void ExpectSameState(const State& s) {
  ExpectClose(s.param.gpu, s.param.cpu, 4);
  ExpectClose(s.m.gpu, s.m.cpu, 4);
  ExpectClose(s.v.gpu, s.v.cpu, 4);
}

TEST(CudaAdamw, FollowsTheDefinition) {
  for (const int64_t count : {0, 1, 3, 4, 2048, 100003}) {
    const State s = SomeState(count);
    const OnBoth control = ValuesOnBoth(DType::kF32, {2}, {0.25, 0});
    AdamwUpdate(Gpu(), kParams, OnGpuSide(s), control.gpu);
    AdamwUpdate(Cpu(), kParams, OnCpuSide(s), control.cpu);
    ExpectSameState(s);
  }
}

// The update takes the moments before they are rounded, so only what is stored has bf16's error.
TEST(CudaAdamw, KeepsMomentsInBf16) {
  for (const int64_t count : {1, 4, 2048, 100003}) {
    const State s = SomeState(count);
    AdamwTensors gpu = OnGpuSide(s), cpu = OnCpuSide(s);
    gpu.m = Cast(Gpu(), s.m.gpu, DType::kBF16);
    gpu.v = Cast(Gpu(), s.v.gpu, DType::kBF16);
    cpu.m = OnHost(gpu.m);
    cpu.v = OnHost(gpu.v);
    const OnBoth control = ValuesOnBoth(DType::kF32, {2}, {0.25, 0});
    AdamwUpdate(Gpu(), kParams, gpu, control.gpu);
    AdamwUpdate(Cpu(), kParams, cpu, control.cpu);
    ExpectClose(s.param.gpu, s.param.cpu, 4);
    ExpectClose(gpu.m, Cast(Cpu(), cpu.m, DType::kF64));
    ExpectClose(gpu.v, Cast(Cpu(), cpu.v, DType::kF64));
  }
}

TEST(CudaAdamw, TakesRangesThatAreNotAligned) {
  const State s = SomeState(1000);
  const OnBoth control = ValuesOnBoth(DType::kF32, {2}, {1, 0});
  AdamwUpdate(Gpu(), kParams, s.param.gpu.Flat(3, 900), s.grad.gpu.Flat(3, 900),
              s.m.gpu.Flat(0, 900), s.v.gpu.Flat(0, 900), control.gpu);
  AdamwUpdate(Cpu(), kParams, s.param.cpu.Flat(3, 900), s.grad.cpu.Flat(3, 900),
              s.m.cpu.Flat(0, 900), s.v.cpu.Flat(0, 900), control.cpu);
  ExpectSameState(s);
}

TEST(CudaAdamw, WritesTheWorkingCopyAndDecaysByRange) {
  const int64_t count = 5003;
  const State s = SomeState(count);
  // Ranges that straddle vectors, and an empty one.
  const Tensor begin = Cpu().Empty(DType::kI64, {6});
  const int64_t begins[] = {0, 1, 2050, 2050, 4001, count};
  std::copy(std::begin(begins), std::end(begins), begin.data<int64_t>());
  const OnBoth decay = ValuesOnBoth(DType::kF32, {5}, {0.5, 0, 100, 0.1, 0.25});
  AdamwTensors gpu = OnGpuSide(s), cpu = OnCpuSide(s);
  gpu.working = Gpu().Zeros(DType::kBF16, {count});
  cpu.working = Cpu().Zeros(DType::kBF16, {count});
  gpu.decay_begin_N1 = OnGpu(begin);
  cpu.decay_begin_N1 = begin;
  gpu.decay_N = decay.gpu;
  cpu.decay_N = decay.cpu;
  const OnBoth control = ValuesOnBoth(DType::kF32, {2}, {0.5, 0});
  AdamwUpdate(Gpu(), kParams, gpu, control.gpu);
  AdamwUpdate(Cpu(), kParams, cpu, control.cpu);
  ExpectSameState(s);
  ExpectSameBits(gpu.working, Cast(Cpu(), OnHost(gpu.param), DType::kBF16));
  ExpectClose(gpu.working, Cast(Cpu(), cpu.working, DType::kF64));
}

TEST(CudaAdamw, ASkippedStepLeavesEveryBit) {
  const State s = SomeState(777);
  const Tensor before[] = {Clone(Gpu(), s.param.gpu), Clone(Gpu(), s.m.gpu), Clone(Gpu(), s.v.gpu)};
  AdamwTensors tensors = OnGpuSide(s);
  tensors.working = Gpu().Zeros(DType::kBF16, {777});
  AdamwUpdate(Gpu(), kParams, tensors, OnGpu(TensorOf(Cpu(), DType::kF32, {2}, {0, 1})));
  ExpectSameBits(s.param.gpu, OnHost(before[0]));
  ExpectSameBits(s.m.gpu, OnHost(before[1]));
  ExpectSameBits(s.v.gpu, OnHost(before[2]));
  EXPECT_EQ(ToDoubles(OnHost(tensors.working)), std::vector<double>(777, 0.0));
}

TEST(CudaAdamw, ClipsAndSharesTheSkipFlagLikeTheCpu) {
  for (const double sum : {0.0, 0.25, 16.0, 1e300, double(INFINITY), double(NAN)}) {
    for (const double max_norm : {0.0, 1.0}) {
      const Tensor host_sum = TensorOf(Cpu(), DType::kF64, {1}, {sum});
      const Tensor gpu = Gpu().Zeros(DType::kF32, {2}), cpu = Cpu().Zeros(DType::kF32, {2});
      ClipControl(Gpu(), OnGpu(host_sum), max_norm, gpu);
      ClipControl(Cpu(), host_sum, max_norm, cpu);
      ExpectSameBits(gpu, cpu);
    }
  }
  for (const auto& [a, b] : {std::pair<double, double>{0, 0}, {1, 0}, {0, 1}, {1, 1}}) {
    const OnBoth first = ValuesOnBoth(DType::kF32, {2}, {0.5, a});
    const OnBoth second = ValuesOnBoth(DType::kF32, {2}, {0.25, b});
    ShareSkipFlag(Gpu(), first.gpu, second.gpu);
    ShareSkipFlag(Cpu(), first.cpu, second.cpu);
    EXPECT_EQ(ToDoubles(OnHost(first.gpu)), ToDoubles(first.cpu));
    EXPECT_EQ(ToDoubles(OnHost(second.gpu)), ToDoubles(second.cpu));
  }
}

}  // namespace
}  // namespace baleen
