// Weighted SwiGLU and the numbers of slots on the GPU.
#include "kernels/ops/moe/permute.h"
#include "kernels/ops/moe/slot_values.h"
#include "kernels/ops/moe/weighted_swiglu.h"
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

struct RowsCase {
  int64_t rows, F;
};
// An expert's width, one that no vector divides, one longer than a block keeps, short and no rows.
constexpr RowsCase kRows[] = {{37, 2048}, {5, 1003}, {3, 20000}, {129, 8}, {1, 1}, {0, 64}};

TEST(CudaWeightedSwiglu, MatchesTheDefinitionForwardAndBackward) {
  for (const DType dtype : kGpuDtypes) {
    for (const RowsCase& c : kRows) {
      const OnBoth gate = RandomOnBoth(dtype, {c.rows, c.F}, 1, 3);
      const OnBoth up = RandomOnBoth(dtype, {c.rows, c.F}, 2);
      const OnBoth dy = RandomOnBoth(dtype, {c.rows, c.F}, 3);
      const OnBoth weight = RandomOnBoth(DType::kF32, {c.rows}, 4);
      const Tensor expected = WeightedSwiglu(Cpu(), gate.cpu, up.cpu, weight.cpu);
      // A handful of fp32 roundings; bf16's fast exponential is 2^-20.
      ExpectClose(WeightedSwiglu(Gpu(), gate.gpu, up.gpu, weight.gpu), expected, 4);
      ExpectClose(WeightedSwiglu(Gpu(), Misaligned(gate.gpu), up.gpu, weight.gpu), expected, 4);
      const WeightedSwigluGradients gpu =
          WeightedSwigluBackward(Gpu(), dy.gpu, gate.gpu, up.gpu, weight.gpu);
      const WeightedSwigluGradients cpu =
          WeightedSwigluBackward(Cpu(), dy.cpu, gate.cpu, up.cpu, weight.cpu);
      ExpectClose(gpu.dgate, cpu.dgate, 4);
      ExpectClose(gpu.dup, cpu.dup, 4);
      // Fp32 sums: what 2^-20 is beside fp32's 2^-24 counts as so many more terms.
      ExpectClose(gpu.dweight_N, cpu.dweight_N, dtype == DType::kBF16 ? 16 * c.F : c.F);
      const WeightedSwigluGradients again =
          WeightedSwigluBackward(Gpu(), dy.gpu, gate.gpu, up.gpu, weight.gpu);
      ExpectSameBits(again.dweight_N, OnHost(gpu.dweight_N));
    }
  }
}

TEST(CudaSlotValues, StandAtTheRowsOfTheirSlotsAndComeBack) {
  const Tensor values = testing::RandomTensor(Cpu(), DType::kF32, {3, 2}, 1);
  const OnBoth row_of_slot = IntsOnBoth({3, 2}, {2, -1, 0, 3, -1, 1});
  const Tensor rows = RowsOfSlots(Gpu(), testing::OnGpu(values), row_of_slot.gpu, 4);
  ExpectSameBits(rows, RowsOfSlots(Cpu(), values, row_of_slot.cpu, 4));
  ExpectSameBits(SlotsOfRows(Gpu(), rows, row_of_slot.gpu),
                 SlotsOfRows(Cpu(), OnHost(rows), row_of_slot.cpu));
  // Of a real permutation, with experts that lie elsewhere.
  std::vector<int32_t> ids;
  for (int t = 0; t < 1000; ++t) ids.insert(ids.end(), {t % 5, 5 + t % 3});
  const Tensor many = testing::RandomTensor(Cpu(), DType::kF32, {1000, 2}, 2);
  const Permutation p = BuildPermutation(Cpu(), IntsOnBoth({1000, 2}, ids).cpu, 2, 4);
  const int64_t num_rows = p.source_row_N.num_elements();
  ExpectSameBits(
      RowsOfSlots(Gpu(), testing::OnGpu(many), testing::OnGpu(p.row_of_slot_TA), num_rows),
      RowsOfSlots(Cpu(), many, p.row_of_slot_TA, num_rows));
}

}  // namespace
}  // namespace baleen
