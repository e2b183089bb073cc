// Sparse attention on the GPU against its CPU definition in fp64: the kernels on tensor cores and
// the general ones, chosen by shape.
//
// Tolerances, relative in L2. Unit roundings: bf16 u = 2^-9, fp32 e = 2^-24; rounding errors of the
// terms of a sum have random signs, so the sum's relative error is that of its terms. The backward
// of both sides starts from the same o and lse, the GPU's.
//
//   result     tensor cores (P and dS are bf16 operands)              general
//   o          P, the result: 2 u                                     the result: u
//   dq         P (in dS), dS, the result: 3 u                         the result: u
//   dkv        P, dS, the stored row, the exchange of two tiles: 4 u  fp32
//   target     P: u                                                   fp32
//   lse        fp32, absolute (below)                                 fp32, absolute
//
// fp32 sums add 8 e sqrt(terms) as in ops_support.h, times what the exponential makes of its
// argument's error: |x| <= 16 in these cases, so P has up to 16 e sqrt(C) beside e.
#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "kernels/ops/attention/sparse_attention.h"
#include "kernels/ops/attention/sparse_attention_forward_plan_cuda.h"
#include "kernels/ops/attention/sparse_attention_packs_cuda.h"
#include "tests/cuda/ops_support.h"
#include "tests/cuda/racecheck.h"

namespace baleen {
namespace {

using testing::Both;
using testing::Cpu;
using testing::ExpectSameBits;
using testing::Gpu;
using testing::IntsOnBoth;
using testing::kGpuDtypes;
using testing::OnBoth;
using testing::OnGpu;
using testing::OnHost;
using testing::RandomOnBoth;
using testing::ToDoubles;
using testing::UnderRacecheck;

struct Shape5 {
  int64_t T, S, H, C, V, K;
};
std::ostream& operator<<(std::ostream& out, const Shape5& s) {
  return out << "T " << s.T << " S " << s.S << " H " << s.H << " C " << s.C << " V " << s.V << " K "
             << s.K;
}

enum class Holes : uint8_t { kAtTheEnd, kAnywhere };

// Rows with all keys there are room for, with one, with none, with about half; keys in random
// order.
std::vector<int32_t> MixedLists(const Shape5& s, Holes holes, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> ids(s.T * s.K, -1), keys(s.S), slots(s.K);
  for (int64_t t = 0; t < s.T; ++t) {
    const int64_t most = std::min(s.K, s.S);
    const int64_t wanted = t % 4 == 0 ? most : t % 4 == 1 ? 1 : t % 8 == 2 ? 0 : most / 2 + t % 3;
    const int64_t count = std::min(most, wanted);
    for (int64_t i = 0; i < s.S; ++i) keys[i] = static_cast<int32_t>(i);
    for (int64_t i = 0; i < s.K; ++i) slots[i] = static_cast<int32_t>(i);
    std::shuffle(keys.begin(), keys.end(), random);
    if (holes == Holes::kAnywhere) std::shuffle(slots.begin(), slots.end(), random);
    for (int64_t i = 0; i < count; ++i) ids[t * s.K + slots[i]] = keys[i];
  }
  return ids;
}

// The inputs, with scores of about N(0, 2^2).
struct Operands {
  Operands(DType dtype, const Shape5& s, Holes holes = Holes::kAtTheEnd)
      : shape(s),
        on_tensor_cores(SparseAttentionKernelName(dtype, s.H, s.C, s.V, s.K)
                            .starts_with("bf16 on tensor cores")),
        scale(2 / std::sqrt(static_cast<double>(s.C))),
        q(RandomOnBoth(dtype, {s.T, s.H, s.C}, 1)),
        kv(RandomOnBoth(dtype, {s.S, s.C}, 2)),
        d_out(RandomOnBoth(dtype, {s.T, s.H, s.V}, 3)),
        ids(IntsOnBoth({s.T, s.K}, MixedLists(s, holes, 5))) {}

  SparseAttentionResult Forward() const {
    return SparseAttention(Gpu(), q.gpu, kv.gpu, ids.gpu, shape.V, scale);
  }
  OnBoth BeginningOfDkv() const { return RandomOnBoth(DType::kF32, kv.cpu.shape(), 4, 0.1); }
  // dkv begins as the same random values each time; the target as NaN.
  struct Gradients {
    Tensor dq, dkv, target;
  };
  Gradients Backward(const SparseAttentionResult& forward) const {
    const Tensor nan = testing::TensorOf(
        Cpu(), DType::kF32, ids.cpu.shape(),
        std::vector<double>(ids.cpu.num_elements(), std::numeric_limits<double>::quiet_NaN()));
    Gradients g{{}, BeginningOfDkv().gpu, OnGpu(nan)};
    g.dq = SparseAttentionBackward(Gpu(), d_out.gpu, q.gpu, kv.gpu, forward, ids.gpu, scale, g.dkv,
                                   g.target);
    return g;
  }
  Gradients Expected(const SparseAttentionResult& forward) const {
    const SparseAttentionResult same = {Cast(Cpu(), OnHost(forward.o_THV), DType::kF64),
                                        Cast(Cpu(), OnHost(forward.lse_TH), DType::kF64)};
    Gradients g{{}, BeginningOfDkv().cpu, Cpu().Empty(DType::kF64, ids.cpu.shape())};
    g.dq = SparseAttentionBackward(Cpu(), d_out.cpu, q.cpu, kv.cpu, same, ids.cpu, scale, g.dkv,
                                   g.target);
    return g;
  }

  Shape5 shape;
  bool on_tensor_cores;
  double scale;
  OnBoth q, kv, d_out, ids;
};

constexpr double kBf16 = 0x1p-9, kFp32 = 0x1p-24;

// What fp32 arithmetic leaves: sums of `terms`, and P's error through its argument.
double Fp32Error(const Shape5& s, int64_t terms) {
  return 8 * kFp32 * std::sqrt(static_cast<double>(std::max<int64_t>(1, terms))) +
         16 * kFp32 * std::sqrt(static_cast<double>(s.C));
}

// Relative error in L2, and element by element beside |b| + rms(b). `absolute`: an element's error
// from what cancels in it.
void ExpectWithin(const char* name, const Tensor& gpu, const Tensor& cpu, double tolerance,
                  double absolute = 0) {
  ASSERT_EQ(gpu.shape(), cpu.shape()) << name;
  const std::vector<double> a = ToDoubles(OnHost(gpu)), b = ToDoubles(cpu);
  double squares = 0, error_squares = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    squares += b[i] * b[i];
    error_squares += (a[i] - b[i]) * (a[i] - b[i]);
  }
  const double count = std::max<double>(1, static_cast<double>(b.size()));
  const double rms = std::sqrt(squares / count);
  EXPECT_LE(std::sqrt(error_squares / count), tolerance * rms + absolute) << name;
  for (size_t i = 0; i < b.size(); ++i) {
    // NaN fails this too.
    if (std::abs(a[i] - b[i]) <= 8 * (tolerance * (std::abs(b[i]) + rms) + absolute)) continue;
    ADD_FAILURE() << name << " element " << i << " is " << a[i] << ", expected " << b[i] << " (rms "
                  << rms << ")";
    return;
  }
}

// -inf exactly in empty rows. Else the error of the largest score and of a logarithm: the matrix
// units cut their running sums off at each of C / 16 steps, by up to 2^-23 of them.
void ExpectLse(const Operands& x, const Tensor& gpu, const Tensor& cpu) {
  const std::vector<double> a = ToDoubles(OnHost(gpu)), b = ToDoubles(cpu);
  ASSERT_EQ(a.size(), b.size());
  const double steps = x.on_tensor_cores ? static_cast<double>(x.shape.C) / 16
                                         : std::sqrt(static_cast<double>(x.shape.C));
  for (size_t i = 0; i < b.size(); ++i) {
    if (std::isinf(b[i])) {
      ASSERT_EQ(a[i], b[i]) << "lse " << i;
    } else {
      ASSERT_NEAR(a[i], b[i], 16 * 2 * kFp32 * (4 + steps)) << "lse " << i;
    }
  }
}

// What was added to dkv: both less the values it began with, whose sum with it is rounded to fp32.
void ExpectAdded(const Operands& x, const Tensor& gpu, const Tensor& cpu, double tolerance) {
  const std::vector<double> begun = ToDoubles(x.BeginningOfDkv().cpu);
  std::vector<double> a = ToDoubles(OnHost(gpu)), b = ToDoubles(cpu);
  double squares = 0, begun_squares = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    a[i] -= begun[i];
    b[i] -= begun[i];
    squares += b[i] * b[i];
    begun_squares += begun[i] * begun[i];
  }
  ASSERT_GT(squares, 0);
  EXPECT_LE(testing::RelativeError(a, b),
            tolerance + 2 * kFp32 * std::sqrt(begun_squares / squares))
      << "dkv";
}

void ExpectTheDefinition(DType dtype, const Operands& x) {
  SCOPED_TRACE(::testing::Message() << dtype << " " << x.shape);
  const Shape5& s = x.shape;
  const double rounding = dtype == DType::kBF16 ? kBf16 : kFp32;
  const double inner = x.on_tensor_cores ? kBf16 : 0;  // of P, of dS
  const SparseAttentionResult gpu = x.Forward();
  const SparseAttentionResult cpu =
      SparseAttention(Cpu(), x.q.cpu, x.kv.cpu, x.ids.cpu, s.V, x.scale);
  EXPECT_EQ(gpu.o_THV.dtype(), dtype);
  ExpectWithin("o", gpu.o_THV, cpu.o_THV, inner + rounding + Fp32Error(s, s.K));
  ExpectLse(x, gpu.lse_TH, cpu.lse_TH);
  const Operands::Gradients found = x.Backward(gpu), expected = x.Expected(gpu);
  EXPECT_EQ(found.dq.dtype(), dtype);
  // In rows of one key dP - D is 0, what is left is the rounding of two sums of V products.
  const double cancels = x.scale * std::sqrt(static_cast<double>(s.V)) * Fp32Error(s, s.V);
  ExpectWithin("dq", found.dq, expected.dq, 2 * inner + rounding + Fp32Error(s, s.K + s.V),
               cancels);
  ExpectAdded(x, found.dkv, expected.dkv, 4 * inner + Fp32Error(s, s.T * s.H + s.V));
  ExpectWithin("target", found.target, expected.target, inner + Fp32Error(s, s.H));
  // Where nothing is listed, nothing at all.
  const std::vector<double> target = ToDoubles(OnHost(found.target));
  for (int64_t i = 0; i < s.T * s.K; ++i) {
    if (x.ids.cpu.data<int32_t>()[i] < 0) ASSERT_EQ(target[i], 0) << "slot " << i;
  }
}

TEST(CudaSparseAttention, OnTensorCoresGivesTheDefinition) {
  for (const Shape5& s : {Shape5{5, 300, 1, 576, 512, 64},
                          {9, 150, 4, 576, 512, 1},
                          {10, 90, 16, 576, 512, 100},
                          {9, 700, 64, 576, 512, 512},
                          {3, 2300, 64, 576, 512, 2048},
                          {9, 777, 96, 576, 512, 192},
                          {6, 600, 128, 576, 512, 512},
                          {2, 2048, 128, 576, 512, 2048},
                          {12, 40, 128, 576, 512, 64},
                          {5, 70, 3, 576, 512, 2048}}) {
    const Operands x(DType::kBF16, s);
    ASSERT_TRUE(x.on_tensor_cores);
    ExpectTheDefinition(DType::kBF16, x);
  }
}

// The works of an incomplete last turn (8 of 140, 4 of 268) are divided by blocks of keys; their
// queries have all, one, no and half of their keys.
TEST(CudaSparseAttention, QueriesDividedByBlocksOfKeysGiveTheDefinition) {
  for (const Shape5& s : {Shape5{140, 600, 64, 576, 512, 448}, {134, 300, 128, 576, 512, 200}}) {
    const SparseAttentionForwardPlan plan = PlanSparseAttentionForward(
        SparseAttentionForwardWorks(static_cast<int>(s.T), static_cast<int>(s.H), 1),
        static_cast<int>((s.K + 63) / 64 * 64));
    ASSERT_GT(plan.divided, 0);
    ExpectTheDefinition(DType::kBF16, Operands(DType::kBF16, s));
  }
}

// Enough queries that those of few heads share the rows of the matrix unit, four or two at a time;
// the last pack is not full.
TEST(CudaSparseAttention, PackedQueriesGiveTheDefinition) {
  std::vector<Shape5> shapes = {{1057, 60, 3, 576, 512, 50},
                                {1059, 200, 16, 576, 512, 30},
                                {531, 300, 32, 576, 512, 64},
                                {530, 40, 21, 576, 512, 33}};
  // Whole packs with few keys, and three blocks of keys a pack.
  if (UnderRacecheck()) shapes = {{1059, 200, 16, 576, 512, 30}, {530, 180, 21, 576, 512, 170}};
  for (const Shape5& s : shapes) {
    const Operands x(DType::kBF16, s);
    ASSERT_TRUE(x.on_tensor_cores);
    ASSERT_GT(SparseAttentionQueriesAPack(s.T, s.H), 1);
    ExpectTheDefinition(DType::kBF16, x);
  }
}

// A query gives the same within rounding alone and among its neighbours.
TEST(CudaSparseAttention, PackedQueriesAgreeWithSingleOnes) {
  const Operands x(DType::kBF16, {1060, 3000, 16, 576, 512, 2048});
  const SparseAttentionResult packed = x.Forward();
  for (int64_t begin = 0; begin < x.shape.T; begin += 265) {
    const int64_t end = begin + 265;
    ASSERT_EQ(SparseAttentionQueriesAPack(265, 16), 1);
    const SparseAttentionResult alone = SparseAttention(
        Gpu(), x.q.gpu.Rows(begin, end), x.kv.gpu, x.ids.gpu.Rows(begin, end), x.shape.V, x.scale);
    ExpectWithin("o", packed.o_THV.Rows(begin, end), OnHost(alone.o_THV),
                 2 * (2 * kBf16 + Fp32Error(x.shape, x.shape.K)));
    ExpectLse(x, packed.lse_TH.Rows(begin, end), OnHost(alone.lse_TH));
  }
}

// Neighbours that share no key run one by one, as they do where they are too few for packs: the
// same bits.
TEST(CudaSparseAttention, QueriesThatShareNothingAreNotPackedInTheBackward) {
  const Shape5 s{1056, 512, 16, 576, 512, 64};
  ASSERT_EQ(SparseAttentionQueriesAPack(s.T, s.H), 4);
  ASSERT_LT(SparseAttentionQueriesAPack(s.T / 2, s.H), 4);
  std::vector<int32_t> lists(s.T * s.K);
  for (int64_t i = 0; i < s.T * s.K; ++i) lists[i] = static_cast<int32_t>(i % s.S);
  Operands x(DType::kBF16, s);
  x.ids = IntsOnBoth({s.T, s.K}, lists);
  const SparseAttentionResult forward = x.Forward();
  const Operands::Gradients whole = x.Backward(forward);
  const Tensor dkv = x.BeginningOfDkv().gpu;
  for (const int64_t begin : {int64_t{0}, s.T / 2}) {
    const int64_t end = begin + s.T / 2;
    const Tensor target = Gpu().Empty(DType::kF32, {s.T / 2, s.K});
    const Tensor dq = SparseAttentionBackward(
        Gpu(), x.d_out.gpu.Rows(begin, end), x.q.gpu.Rows(begin, end), x.kv.gpu,
        {forward.o_THV.Rows(begin, end), forward.lse_TH.Rows(begin, end)},
        x.ids.gpu.Rows(begin, end), x.scale, dkv, target);
    ExpectSameBits(whole.dq.Rows(begin, end), OnHost(dq));
    ExpectSameBits(whole.target.Rows(begin, end), OnHost(target));
  }
  ExpectAdded(x, whole.dkv, OnHost(dkv), Fp32Error(s, s.T));
}

// Chunks of 288 queries for two tiles of heads: the sums of the first run beside the second.
TEST(CudaSparseAttention, OnTensorCoresAddsUpChunkAfterChunk) {
  const Operands x(DType::kBF16, {330, 40, 66, 576, 512, 64});
  ASSERT_TRUE(x.on_tensor_cores);
  ExpectTheDefinition(DType::kBF16, x);
}

TEST(CudaSparseAttention, GeneralGivesTheDefinitionWithHolesAnywhere) {
  for (const DType dtype : kGpuDtypes) {
    for (const Shape5& s : {Shape5{70, 60, 4, 256, 128, 64},
                            {9, 33, 1, 24, 16, 1},
                            {13, 50, 7, 25, 17, 100},
                            {5, 2100, 16, 256, 128, 2048},
                            {8, 600, 20, 24, 24, 512},
                            {4, 90, 64, 256, 128, 100},
                            {3, 64, 128, 256, 128, 64},
                            {4, 70, 9, 700, 650, 40},
                            {3, 20, 2, 1300, 900, 30},
                            {3, 50, 130, 576, 512, 33}}) {
      // What is left there has every variant: wide and narrow loads, one and two heads a warp.
      if (UnderRacecheck() && (s.K > 100 || s.H < 4 || s.H == 128)) continue;
      const Operands x(dtype, s, Holes::kAnywhere);
      ASSERT_FALSE(x.on_tensor_cores);
      ExpectTheDefinition(dtype, x);
    }
  }
}

// fp32 of the large model's widths, for runs that want to be exact.
TEST(CudaSparseAttention, GeneralTakesTheLargeWidthsInF32) {
  const Operands x(DType::kF32, {4, 120, 64, 576, 512, 100}, Holes::kAnywhere);
  ExpectTheDefinition(DType::kF32, x);
}

TEST(CudaSparseAttention, RowsThatBeginAnywhereTakeTheNarrowLoads) {
  for (const DType dtype : kGpuDtypes) {
    const Operands x(dtype, {6, 40, 4, 64, 32, 32}, Holes::kAnywhere);
    const SparseAttentionResult a = x.Forward();
    const SparseAttentionResult b =
        SparseAttention(Gpu(), testing::Misaligned(x.q.gpu), testing::Misaligned(x.kv.gpu),
                        x.ids.gpu, x.shape.V, x.scale);
    ExpectSameBits(a.o_THV, OnHost(b.o_THV));
  }
}

TEST(CudaSparseAttention, EmptyRowsAreZeroAndChangeNothing) {
  for (const DType dtype : kGpuDtypes) {
    for (const Shape5& s : {Shape5{3, 8, 2, 576, 512, 64},
                            {3, 8, 2, 24, 16, 5},
                            {0, 8, 2, 576, 512, 64},
                            {0, 8, 2, 24, 16, 5},
                            {2, 0, 70, 576, 512, 64},
                            {2, 0, 2, 24, 16, 5},
                            {3, 8, 2, 24, 16, 0}}) {
      SCOPED_TRACE(::testing::Message() << dtype << " " << s);
      Operands x(dtype, s);
      x.ids = IntsOnBoth({s.T, s.K}, std::vector<int32_t>(s.T * s.K, -1));
      const SparseAttentionResult forward = x.Forward();
      const Operands::Gradients g = x.Backward(forward);
      for (const double lse : ToDoubles(OnHost(forward.lse_TH))) EXPECT_EQ(lse, -INFINITY);
      for (const Tensor& zero : {forward.o_THV, g.dq, g.target}) {
        for (const double value : ToDoubles(OnHost(zero))) ASSERT_EQ(value, 0);
      }
      ExpectSameBits(g.dkv, OnHost(x.BeginningOfDkv().gpu));
    }
  }
}

TEST(CudaSparseAttention, TheSameInputsGiveTheSameBits) {
  for (const DType dtype : kGpuDtypes) {
    for (const Shape5& s : {Shape5{300, 500, 66, 576, 512, 256},
                            {100, 300, 32, 576, 512, 100},
                            {1057, 300, 16, 576, 512, 128},
                            {300, 400, 4, 256, 128, 64}}) {
      SCOPED_TRACE(::testing::Message() << dtype << " " << s);
      const Operands x(dtype, s);
      const SparseAttentionResult a = x.Forward(), b = x.Forward();
      ExpectSameBits(a.o_THV, OnHost(b.o_THV));
      ExpectSameBits(a.lse_TH, OnHost(b.lse_TH));
      const Operands::Gradients g = x.Backward(a), again = x.Backward(a);
      ExpectSameBits(g.dq, OnHost(again.dq));
      ExpectSameBits(g.dkv, OnHost(again.dkv));
      ExpectSameBits(g.target, OnHost(again.target));
    }
  }
}

// 1.2 GiB of contributions in fp32: three chunks of rows (no definition at this size: the parts).
TEST(CudaSparseAttention, GeneralAddsUpChunkAfterChunk) {
  const Shape5 s{260, 2500, 1, 576, 512, 2048};
  const Operands x(DType::kF32, s);
  const SparseAttentionResult forward = x.Forward();
  const Operands::Gradients whole = x.Backward(forward);
  const Tensor dkv = x.BeginningOfDkv().gpu;
  for (int64_t begin = 0; begin < s.T; begin += 26) {
    const int64_t end = begin + 26;
    const Tensor target = Gpu().Empty(DType::kF32, {26, s.K});
    const Tensor dq = SparseAttentionBackward(
        Gpu(), x.d_out.gpu.Rows(begin, end), x.q.gpu.Rows(begin, end), x.kv.gpu,
        {forward.o_THV.Rows(begin, end), forward.lse_TH.Rows(begin, end)},
        x.ids.gpu.Rows(begin, end), x.scale, dkv, target);
    ExpectSameBits(whole.dq.Rows(begin, end), OnHost(dq));
    ExpectSameBits(whole.target.Rows(begin, end), OnHost(target));
  }
  ExpectAdded(x, whole.dkv, OnHost(dkv), Fp32Error(s, s.T));
}

}  // namespace
}  // namespace baleen
