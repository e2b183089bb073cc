// Comparing an op on the GPU with its CPU definition in fp64 on the same (rounded) inputs.
//
// Tolerances: eps is what one rounding of the result's dtype costs (bf16 2^-9, fp32 2^-24), and
// every value on the way is fp32 or better. `terms`: how many fp32 terms a result adds up; their
// rounding errors grow like sqrt(terms) at random signs, and a few roundings stand beside each.
//
//   result of dtype   relative error (L2)               element, beside |b| + rms(b)
//   F32               8 * 2^-24 * sqrt(terms)            8 times that
//   BF16              2^-8 + that of F32                 4 times that
//
// What only moves, compares or counts must have the same bits.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <vector>

#include "kernels/ops/elementwise.h"
#include "tests/cuda/gpu.h"
#include "tests/support/random_tensor.h"

namespace baleen::testing {

inline constexpr DType kGpuDtypes[] = {DType::kF32, DType::kBF16};

inline const Context& Cpu() {
  static const Context* const context = new Context(Context::Cpu());
  return *context;
}

// The same values twice.
struct OnBoth {
  Tensor gpu;  // of the dtype under test
  Tensor cpu;  // kF64
};

inline OnBoth Both(DType dtype, const Tensor& host_f32) {
  const Tensor host = dtype == DType::kF32 ? host_f32 : Cast(Cpu(), host_f32, dtype);
  return {OnGpu(host), Cast(Cpu(), host, DType::kF64)};
}
inline OnBoth RandomOnBoth(DType dtype, Shape shape, uint64_t seed, double scale = 1) {
  return Both(dtype, RandomTensor(Cpu(), DType::kF32, std::move(shape), seed, scale));
}
inline OnBoth ValuesOnBoth(DType dtype, Shape shape, const std::vector<double>& values) {
  return Both(dtype, TensorOf(Cpu(), DType::kF32, std::move(shape), values));
}
inline OnBoth ZerosOnBoth(DType dtype, Shape shape) {
  return {Gpu().Zeros(dtype, shape), Cpu().Zeros(DType::kF64, shape)};
}
// Integers: the same tensor on both sides.
inline OnBoth IntsOnBoth(Shape shape, const std::vector<int32_t>& values) {
  const Tensor host = IntTensorOf(Cpu(), std::move(shape), values);
  return {OnGpu(host), host};
}

inline double RelativeTolerance(DType dtype, int64_t terms) {
  const double sums = 8 * 0x1p-24 * std::sqrt(static_cast<double>(std::max<int64_t>(1, terms)));
  return dtype == DType::kBF16 ? 0x1p-8 + sums : sums;
}

// A result on the GPU against the definition in fp64.
inline void ExpectClose(const Tensor& gpu, const Tensor& cpu, int64_t terms = 1) {
  ASSERT_EQ(gpu.shape(), cpu.shape());
  const std::vector<double> a = ToDoubles(OnHost(gpu)), b = ToDoubles(cpu);
  const double tolerance = RelativeTolerance(gpu.dtype(), terms);
  // Results of 0 are of the size of what cancels in them, which is what their neighbours have.
  EXPECT_LE(RelativeError(a, b), tolerance) << gpu.DebugString();
  double squares = 0, dot = 0, a_squares = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    squares += b[i] * b[i];
    a_squares += a[i] * a[i];
    dot += a[i] * b[i];
  }
  if (squares > 0)
    EXPECT_GE(dot / std::sqrt(squares * a_squares), 1 - tolerance * tolerance - 1e-14);
  const double rms = b.empty() ? 0 : std::sqrt(squares / static_cast<double>(b.size()));
  const double element = (gpu.dtype() == DType::kBF16 ? 4 : 8) * tolerance;
  for (size_t i = 0; i < b.size(); ++i) {
    // NaN fails this too.
    if (std::abs(a[i] - b[i]) <= element * (std::abs(b[i]) + rms)) continue;
    ADD_FAILURE() << gpu.DebugString() << " element " << i << " is " << a[i] << ", expected "
                  << b[i] << " (rms " << rms << ")";
    return;
  }
}

inline void ExpectSameBits(const Tensor& gpu, const Tensor& host) {
  EXPECT_TRUE(SameBits(OnHost(gpu), host)) << gpu.DebugString() << " and " << host.DebugString();
}

// A copy of rows whose first byte is not 16-byte aligned: kernels take another path there.
inline Tensor Misaligned(const Tensor& gpu) {
  const Tensor room = Gpu().Empty(gpu.dtype(), {gpu.num_elements() + 1});
  const Tensor moved = room.Flat(1, gpu.num_elements()).Reshaped(gpu.shape());
  Copy(Gpu(), gpu, moved);
  return moved;
}

}  // namespace baleen::testing
