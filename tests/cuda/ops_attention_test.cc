// Attention on the GPU against its CPU definition in fp64: the general kernels on windows and lists
// of every kind, and what goes to cuDNN. The kernels for 192/128 heads in bf16 have tests of their
// own in ops_masked_attention_test.cc.
//
// Tolerances. The general kernels compute in fp32: those of ops_support.h, with the Q products of a
// logit, the V of dP, and the S keys (T rows) of an output as terms; a logit's absolute error is
// its probability's relative one. The backward definition gets the GPU's own o and lse. On tensor
// cores the probabilities and dS are rounded to bf16 between the products, and cuDNN's gradients at
// the end: three roundings of 2^-9 at most in each output, dk and dv included.
#include <gmock/gmock.h>

#include <cmath>
#include <limits>
#include <string>

#include "kernels/ops/attention/attention.h"
#include "kernels/ops/attention/attention_cudnn.h"
#include "kernels/ops/attention/attention_segments.h"
#include "kernels/ops/attention/masked_attention_gpu.h"
#include "tests/cuda/ops_support.h"
#include "tests/cuda/racecheck.h"

namespace baleen {
namespace {

using testing::Cpu;
using testing::ExpectClose;
using testing::ExpectSameBits;
using testing::Gpu;
using testing::kGpuDtypes;
using testing::OnBoth;
using testing::OnGpu;
using testing::OnHost;
using testing::RandomOnBoth;
using testing::ToDoubles;

struct Sizes {
  int64_t T, S, H, Q, V;
};
std::ostream& operator<<(std::ostream& out, const Sizes& sizes) {
  return out << sizes.T << " rows, " << sizes.S << " keys, " << sizes.H << " heads of " << sizes.Q
             << "/" << sizes.V;
}

// Head widths: of full and tiny models, odd ones (no 16-byte rows), more than one block holds.
const Sizes kSizes[] = {{70, 70, 3, 24, 16},   {130, 300, 2, 160, 64}, {100, 65, 2, 192, 128},
                        {200, 200, 2, 13, 5},  {65, 130, 1, 300, 270}, {1, 1, 1, 8, 8},
                        {64, 64, 4, 256, 256}, {3, 257, 2, 192, 128}};

struct Case {
  Case(DType dtype, const Sizes& sizes)
      : q(RandomOnBoth(dtype, {sizes.T, sizes.H, sizes.Q}, 1)),
        k(RandomOnBoth(dtype, {sizes.S, sizes.H, sizes.Q}, 2)),
        v(RandomOnBoth(dtype, {sizes.S, sizes.H, sizes.V}, 3)),
        d_out(RandomOnBoth(dtype, {sizes.T, sizes.H, sizes.V}, 4)),
        dk(RandomOnBoth(DType::kF32, {sizes.S, sizes.H, sizes.Q}, 5)),
        dv(RandomOnBoth(DType::kF32, {sizes.S, sizes.H, sizes.V}, 6)),
        terms(sizes.Q + sizes.V + sizes.S + sizes.T),
        scale(1 / std::sqrt(static_cast<double>(sizes.Q))) {}
  OnBoth q, k, v, d_out;
  OnBoth dk, dv;  // not zero: gradients are added
  int64_t terms;
  double scale;
};

struct WindowsOnBoth {
  KeyWindows gpu, cpu;
};

KeyWindows WindowsOf(const std::vector<int32_t>& begin, const std::vector<int32_t>& end) {
  const Shape shape = {static_cast<int64_t>(begin.size())};
  return {
      testing::IntTensorOf(Cpu(), shape, begin), testing::IntTensorOf(Cpu(), shape, end), {}, {}};
}

// Up to K distinct keys of [0, t + offset] for row t, far apart and in no order; -1 behind them.
// Every ninth row stays empty.
Tensor ScatteredIds(int64_t T, int64_t K, int64_t offset) {
  std::vector<int32_t> ids(T * K, -1);
  for (int64_t t = 0; t < T; ++t) {
    if (t % 9 == 8) continue;
    const int64_t size = t + offset + 1;
    const int64_t step = size % 7 == 0 ? 5 : 7;  // visits every residue unless both divide size
    std::vector<bool> taken(size, false);
    int64_t count = 0;
    for (int64_t i = 0; i < size && count < K; ++i) {
      const int64_t s = (3 + i * step) % size;
      if (taken[s]) continue;
      taken[s] = true;
      ids[t * K + count++] = static_cast<int32_t>(s);
    }
  }
  return testing::IntTensorOf(Cpu(), {T, K}, ids);
}

// `host_copies`: what lets the op send causal triangles to cuDNN.
WindowsOnBoth OnBothSides(const KeyWindows& host, bool host_copies = false) {
  KeyWindows gpu = {OnGpu(host.begin_T), OnGpu(host.end_T), {}, {}};
  if (host_copies) {
    gpu.host_begin_T = host.begin_T;
    gpu.host_end_T = host.end_T;
  }
  return {gpu, host};
}

// Windows of every kind at once: causal, a document that begins late, one key, none.
KeyWindows MixedWindows(int64_t T, int64_t S) {
  std::vector<int32_t> begin(T), end(T);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t place = t * S / T;
    begin[t] = static_cast<int32_t>(t < T / 2 ? 0 : std::max<int64_t>(0, S / 2 - 3));
    end[t] = static_cast<int32_t>(std::max<int64_t>(begin[t], place + 1));
    if (t % 11 == 3) begin[t] = end[t] - (end[t] > begin[t] ? 1 : 0);
    if (t % 11 == 5) begin[t] = end[t];
  }
  return WindowsOf(begin, end);
}

// Causal within documents that begin at the given rows (and keys).
KeyWindows DocumentWindows(int64_t T, const std::vector<int64_t>& begins) {
  std::vector<int32_t> begin(T), end(T);
  for (const int64_t first : begins) {
    for (int64_t t = first; t < T; ++t) begin[t] = static_cast<int32_t>(first);
  }
  for (int64_t t = 0; t < T; ++t) end[t] = static_cast<int32_t>(t + 1);
  return WindowsOf(begin, end);
}

// The rows of context-parallel rank 0 of `size`: the first and the last of 2 * size chunks of S.
KeyWindows ZigzagWindows(int64_t S, int64_t size) {
  const int64_t chunk = S / (2 * size);
  std::vector<int32_t> begin(2 * chunk, 0), end;
  for (int64_t t = 0; t < chunk; ++t) end.push_back(static_cast<int32_t>(t + 1));
  for (int64_t t = S - chunk; t < S; ++t) end.push_back(static_cast<int32_t>(t + 1));
  return WindowsOf(begin, end);
}

// The last T rows of a sequence of S.
KeyWindows LastRows(int64_t T, int64_t S) {
  std::vector<int32_t> begin(T, 0), end(T);
  for (int64_t t = 0; t < T; ++t) end[t] = static_cast<int32_t>(S - T + t + 1);
  return WindowsOf(begin, end);
}

// lse: rows without keys have -inf on both sides; the others agree.
void ExpectCloseLse(const Tensor& gpu, const Tensor& cpu, int64_t terms) {
  std::vector<double> a = ToDoubles(OnHost(gpu)), b = ToDoubles(cpu);
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isinf(b[i])) {
      EXPECT_EQ(a[i], b[i]) << "row and head " << i;
    } else {
      EXPECT_NEAR(a[i], b[i], testing::RelativeTolerance(DType::kF32, terms)) << i;
    }
  }
}

// dq and dk: dS = P (dP - delta), so that their rounding errors are those of a product of V terms,
// scale * sqrt(V) large, even where the two cancel (a row of one key has dq = 0). A sixteenth of
// that size counts beside the result's own.
void ExpectCloseGradient(const Tensor& gpu, const Tensor& cpu, const Case& c) {
  const std::vector<double> a = ToDoubles(OnHost(gpu)), b = ToDoubles(cpu);
  ASSERT_EQ(a.size(), b.size());
  const double tolerance = testing::RelativeTolerance(gpu.dtype(), c.terms);
  const double cancelled = c.scale * std::sqrt(static_cast<double>(c.v.cpu.dim(2))) / 16;
  double error = 0, squares = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    squares += b[i] * b[i];
  }
  const double count = static_cast<double>(b.size()), rms = std::sqrt(squares / count);
  EXPECT_LE(std::sqrt(error / count), tolerance * (rms + cancelled)) << gpu.DebugString();
  for (size_t i = 0; i < b.size(); ++i) {
    // NaN fails this too.
    if (std::abs(a[i] - b[i]) <= 8 * tolerance * (std::abs(b[i]) + rms + cancelled)) continue;
    ADD_FAILURE() << gpu.DebugString() << " element " << i << " is " << a[i] << ", expected "
                  << b[i] << " (rms " << rms << ")";
    return;
  }
}

AttentionResult AsDefinition(const AttentionResult& gpu) {
  return {Cast(Cpu(), OnHost(gpu.o_THV), DType::kF64),
          Cast(Cpu(), OnHost(gpu.lse_TH), DType::kF64)};
}

// As ExpectClose, with the roundings to bf16 between products on tensor cores.
void ExpectCloseInBf16(const Tensor& gpu, const Tensor& cpu) {
  const std::vector<double> a = ToDoubles(OnHost(gpu)), b = ToDoubles(cpu);
  ASSERT_EQ(a.size(), b.size());
  const double tolerance = 3 * 0x1p-9;
  EXPECT_LE(testing::RelativeError(a, b), tolerance) << gpu.DebugString();
  double squares = 0;
  for (const double value : b) squares += value * value;
  const double rms = std::sqrt(squares / static_cast<double>(b.size()));
  for (size_t i = 0; i < b.size(); ++i) {
    if (std::abs(a[i] - b[i]) <= 8 * tolerance * (std::abs(b[i]) + rms)) continue;
    ADD_FAILURE() << gpu.DebugString() << " element " << i << " is " << a[i] << ", expected "
                  << b[i] << " (rms " << rms << ")";
    return;
  }
}

// What the op computes with.
enum class Arithmetic { kFp32, kTensorCores };

Arithmetic ArithmeticOf(DType dtype, const Sizes& sizes) {
  return MaskedAttentionOnTensorCores(dtype, sizes.Q, sizes.V) ? Arithmetic::kTensorCores
                                                               : Arithmetic::kFp32;
}

void ExpectAttention(Case& c, const WindowsOnBoth& windows, Arithmetic arithmetic) {
  const bool exact = arithmetic == Arithmetic::kFp32;
  const AttentionResult gpu = Attention(Gpu(), c.q.gpu, c.k.gpu, c.v.gpu, windows.gpu, c.scale);
  const AttentionResult cpu = Attention(Cpu(), c.q.cpu, c.k.cpu, c.v.cpu, windows.cpu, c.scale);
  exact ? ExpectClose(gpu.o_THV, cpu.o_THV, c.terms) : ExpectCloseInBf16(gpu.o_THV, cpu.o_THV);
  // Logits are fp32 sums of the tensor cores too: 2^-23 a product of 16.
  ExpectCloseLse(gpu.lse_TH, cpu.lse_TH, exact ? c.terms : 4 * c.terms);
  const Tensor dq = AttentionBackward(Gpu(), c.d_out.gpu, c.q.gpu, c.k.gpu, c.v.gpu, gpu,
                                      windows.gpu, c.scale, c.dk.gpu, c.dv.gpu);
  const Tensor expected_dq =
      AttentionBackward(Cpu(), c.d_out.cpu, c.q.cpu, c.k.cpu, c.v.cpu, AsDefinition(gpu),
                        windows.cpu, c.scale, c.dk.cpu, c.dv.cpu);
  if (exact) {
    ExpectCloseGradient(dq, expected_dq, c);
    ExpectCloseGradient(c.dk.gpu, c.dk.cpu, c);
    ExpectClose(c.dv.gpu, c.dv.cpu, c.terms);
  } else {
    ExpectCloseInBf16(dq, expected_dq);
    ExpectCloseInBf16(c.dk.gpu, c.dk.cpu);
    ExpectCloseInBf16(c.dv.gpu, c.dv.cpu);
  }
}

TEST(CudaAttention, IsTheDefinitionOnMixedWindows) {
  for (const DType dtype : kGpuDtypes) {
    for (const Sizes& sizes : kSizes) {
      SCOPED_TRACE(::testing::Message() << sizes << " " << dtype);
      Case c(dtype, sizes);
      ExpectAttention(c, OnBothSides(MixedWindows(sizes.T, sizes.S)), ArithmeticOf(dtype, sizes));
    }
  }
}

TEST(CudaAttention, IsTheDefinitionOnDocumentsAndZigzagRows) {
  for (const DType dtype : kGpuDtypes) {
    Case documents(dtype, {300, 300, 3, 160, 64});
    ExpectAttention(documents, OnBothSides(DocumentWindows(300, {0, 7, 64, 65, 190})),
                    Arithmetic::kFp32);
    Case zigzag(dtype, {120, 240, 2, 160, 128});
    ExpectAttention(zigzag, OnBothSides(ZigzagWindows(240, 2)), Arithmetic::kFp32);
  }
}

TEST(CudaAttention, RowsWithoutKeysAreZeroAndChangeNothing) {
  for (const DType dtype : kGpuDtypes) {
    const Sizes sizes = {70, 66, 2, 24, 16};
    const Case c(dtype, sizes);
    const std::vector<int32_t> none(sizes.T, 30);
    const WindowsOnBoth windows = OnBothSides(WindowsOf(none, none));
    const AttentionResult result =
        Attention(Gpu(), c.q.gpu, c.k.gpu, c.v.gpu, windows.gpu, c.scale);
    const Tensor dk = OnHost(c.dk.gpu), dv = OnHost(c.dv.gpu);
    const Tensor dq = AttentionBackward(Gpu(), c.d_out.gpu, c.q.gpu, c.k.gpu, c.v.gpu, result,
                                        windows.gpu, c.scale, c.dk.gpu, c.dv.gpu);
    for (const double o : ToDoubles(OnHost(result.o_THV))) ASSERT_EQ(o, 0);
    for (const double lse : ToDoubles(OnHost(result.lse_TH))) ASSERT_EQ(lse, -INFINITY);
    for (const double gradient : ToDoubles(OnHost(dq))) ASSERT_EQ(gradient, 0);
    ExpectSameBits(c.dk.gpu, dk);
    ExpectSameBits(c.dv.gpu, dv);
  }
}

TEST(CudaAttention, ARowHasTheSameBitsInEveryChunkOfRows) {
  const Sizes sizes = {300, 400, 2, 40, 24};
  for (const DType dtype : kGpuDtypes) {
    const Case c(dtype, sizes);
    const KeyWindows windows = OnBothSides(MixedWindows(sizes.T, sizes.S)).gpu;
    const AttentionResult whole = Attention(Gpu(), c.q.gpu, c.k.gpu, c.v.gpu, windows, c.scale);
    const Tensor whole_dq = AttentionBackward(Gpu(), c.d_out.gpu, c.q.gpu, c.k.gpu, c.v.gpu, whole,
                                              windows, c.scale, c.dk.gpu, c.dv.gpu);
    for (const auto& [first, last] :
         {std::pair<int64_t, int64_t>{0, 1}, {1, 38}, {38, 171}, {171, 300}}) {
      SCOPED_TRACE(::testing::Message() << "rows " << first << ".." << last);
      const KeyWindows part = windows.Rows(first, last);
      const Tensor q = c.q.gpu.Rows(first, last);
      const AttentionResult rows = Attention(Gpu(), q, c.k.gpu, c.v.gpu, part, c.scale);
      ExpectSameBits(rows.o_THV, OnHost(whole.o_THV.Rows(first, last)));
      ExpectSameBits(rows.lse_TH, OnHost(whole.lse_TH.Rows(first, last)));
      const Tensor dq = AttentionBackward(Gpu(), c.d_out.gpu.Rows(first, last), q, c.k.gpu, c.v.gpu,
                                          rows, part, c.scale, c.dk.gpu, c.dv.gpu);
      ExpectSameBits(dq, OnHost(whole_dq.Rows(first, last)));
    }
  }
}

TEST(CudaAttention, GivesTheSameBitsTwice) {
  const Sizes sizes = {257, 257, 5, 160, 64};
  for (const DType dtype : kGpuDtypes) {
    const Case one(dtype, sizes), two(dtype, sizes);
    const KeyWindows windows = OnBothSides(MixedWindows(sizes.T, sizes.S)).gpu;
    Tensor dq[2], o[2];
    for (int i = 0; i < 2; ++i) {
      const Case& c = i == 0 ? one : two;
      const AttentionResult result = Attention(Gpu(), c.q.gpu, c.k.gpu, c.v.gpu, windows, c.scale);
      o[i] = OnHost(result.o_THV);
      dq[i] = OnHost(AttentionBackward(Gpu(), c.d_out.gpu, c.q.gpu, c.k.gpu, c.v.gpu, result,
                                       windows, c.scale, c.dk.gpu, c.dv.gpu));
    }
    EXPECT_TRUE(testing::SameBits(o[0], o[1]));
    EXPECT_TRUE(testing::SameBits(dq[0], dq[1]));
    ExpectSameBits(one.dk.gpu, OnHost(two.dk.gpu));
    ExpectSameBits(one.dv.gpu, OnHost(two.dv.gpu));
  }
}

TEST(CudaAttention, LargeLogitsDoNotOverflowAndNotANumberStays) {
  for (const DType dtype : kGpuDtypes) {
    const OnBoth q = testing::ValuesOnBoth(dtype, {3, 1, 1}, {1024, -1024, std::nan("")});
    const OnBoth k = testing::ValuesOnBoth(dtype, {2, 1, 1}, {1, 2});
    const OnBoth v = testing::ValuesOnBoth(dtype, {2, 1, 1}, {3, 4});
    const KeyWindows windows = OnBothSides(WindowsOf({0, 0, 0}, {2, 2, 2})).gpu;
    const AttentionResult result = Attention(Gpu(), q.gpu, k.gpu, v.gpu, windows, 1.0);
    const std::vector<double> o = ToDoubles(OnHost(result.o_THV)),
                              lse = ToDoubles(OnHost(result.lse_TH));
    EXPECT_EQ(o[0], 4);
    EXPECT_EQ(o[1], 3);
    EXPECT_EQ(lse[0], 2048);
    EXPECT_EQ(lse[1], -1024);
    EXPECT_TRUE(std::isnan(o[2]));
    EXPECT_TRUE(std::isnan(lse[2]));
  }
}

// --- Causal segments of other heads, by cuDNN where the machine has it.

bool HaveCudnn() { return CudnnAttention::Of(Gpu()).ok(); }

struct CausalCase {
  const char* name;
  Sizes sizes;
  KeyWindows windows;
  const char* kernel;  // what AttentionKernelName says behind the version
};

std::vector<CausalCase> CausalCases() {
  return {{"whole", {256, 256, 3, 160, 64}, DocumentWindows(256, {0}), " SDPA, 1 segment"},
          {"odd", {333, 333, 2, 160, 64}, DocumentWindows(333, {0}), " SDPA, 1 segment"},
          {"wide", {264, 264, 4, 192, 192}, DocumentWindows(264, {0}), " SDPA, 1 segment"},
          {"small heads", {261, 261, 4, 24, 16}, DocumentWindows(261, {0}), " SDPA, 1 segment"},
          {"documents",
           {900, 900, 2, 160, 64},
           DocumentWindows(900, {0, 300, 310, 570, 571, 890}),
           " SDPA, 3 segments, 21 rows on general kernels"},
          {"zigzag", {512, 1024, 2, 160, 64}, ZigzagWindows(1024, 2), " SDPA, 2 segments"},
          {"last rows", {281, 580, 2, 160, 64}, LastRows(281, 580), " SDPA, 1 segment"}};
}

TEST(CudaAttention, GivesCausalSegmentsOfOtherHeadsToCudnn) {
  for (const CausalCase& test : CausalCases()) {
    SCOPED_TRACE(test.name);
    Case c(DType::kBF16, test.sizes);
    const WindowsOnBoth windows = OnBothSides(test.windows, /*host_copies=*/true);
    const std::string kernel =
        AttentionKernelName(Gpu(), DType::kBF16, test.sizes.Q, test.sizes.V, windows.gpu);
    if (HaveCudnn()) {
      EXPECT_THAT(kernel, ::testing::StartsWith("cuDNN "));
      EXPECT_THAT(kernel, ::testing::EndsWith(test.kernel));
    } else {
      EXPECT_THAT(kernel, ::testing::StartsWith("general kernels: BF16 heads "));
    }
    ExpectAttention(c, windows, Arithmetic::kTensorCores);
  }
}

TEST(CudaAttention, CudnnGivesTheSameBitsTwiceAndInSmallCalls) {
  if (!HaveCudnn()) GTEST_SKIP() << CudnnAttention::Of(Gpu()).status().message();
  const Sizes sizes = {1024, 1024, 16, 160, 64};
  const KeyWindows windows = OnBothSides(DocumentWindows(sizes.T, {0}), true).gpu;
  const AttentionSegment all = {AttentionSegment::Kind::kCausal, 0, sizes.T, 0, sizes.S};
  const Case first(DType::kBF16, sizes);
  const AttentionResult forward =
      Attention(Gpu(), first.q.gpu, first.k.gpu, first.v.gpu, windows, first.scale);
  const Tensor dq = AttentionBackward(Gpu(), first.d_out.gpu, first.q.gpu, first.k.gpu, first.v.gpu,
                                      forward, windows, first.scale, first.dk.gpu, first.dv.gpu);
  // All heads in a call as above; 8 MiB: 4 heads a call; 1 MiB: 512 rows of one head.
  for (const int64_t budget : {kCudnnBackwardBytes, int64_t{8} << 20, int64_t{1} << 20}) {
    SCOPED_TRACE(budget);
    const Case c(DType::kBF16, sizes);
    const AttentionResult again = Attention(Gpu(), c.q.gpu, c.k.gpu, c.v.gpu, windows, c.scale);
    ExpectSameBits(again.o_THV, OnHost(forward.o_THV));
    ExpectSameBits(again.lse_TH, OnHost(forward.lse_TH));
    const CudnnAttention::Gradients gradients = {Gpu().Empty(DType::kBF16, c.q.gpu.shape()),
                                                 c.dk.gpu, c.dv.gpu};
    ASSERT_TRUE((*CudnnAttention::Of(Gpu()))
                    ->Backward(Gpu(), all, c.d_out.gpu, c.q.gpu, c.k.gpu, c.v.gpu, again.o_THV,
                               again.lse_TH, c.scale, gradients, budget)
                    .ok());
    if (budget == int64_t{1} << 20) {  // other sums of rows and keys
      ExpectCloseInBf16(gradients.dq_THQ, OnHost(dq));
      ExpectCloseInBf16(c.dk.gpu, OnHost(first.dk.gpu));
      ExpectCloseInBf16(c.dv.gpu, OnHost(first.dv.gpu));
    } else {
      ExpectSameBits(gradients.dq_THQ, OnHost(dq));
      ExpectSameBits(c.dk.gpu, OnHost(first.dk.gpu));
      ExpectSameBits(c.dv.gpu, OnHost(first.dv.gpu));
    }
  }
}

// --- Lists of keys.

void ExpectMaskedAttention(Case& c, const OnBoth& ids) {
  const AttentionResult gpu = MaskedAttention(Gpu(), c.q.gpu, c.k.gpu, c.v.gpu, ids.gpu, c.scale);
  const AttentionResult cpu = MaskedAttention(Cpu(), c.q.cpu, c.k.cpu, c.v.cpu, ids.cpu, c.scale);
  ExpectClose(gpu.o_THV, cpu.o_THV, c.terms);
  ExpectCloseLse(gpu.lse_TH, cpu.lse_TH, c.terms);
  const OnBoth target = testing::RandomOnBoth(DType::kF32, ids.cpu.shape(), 9);  // overwritten
  const Tensor dq = MaskedAttentionBackward(Gpu(), c.d_out.gpu, c.q.gpu, c.k.gpu, c.v.gpu, gpu,
                                            ids.gpu, c.scale, c.dk.gpu, c.dv.gpu, target.gpu);
  ExpectCloseGradient(
      dq,
      MaskedAttentionBackward(Cpu(), c.d_out.cpu, c.q.cpu, c.k.cpu, c.v.cpu, AsDefinition(gpu),
                              ids.cpu, c.scale, c.dk.cpu, c.dv.cpu, target.cpu),
      c);
  ExpectCloseGradient(c.dk.gpu, c.dk.cpu, c);
  ExpectClose(c.dv.gpu, c.dv.cpu, c.terms);
  ExpectClose(target.gpu, target.cpu, c.terms);
}

TEST(CudaMaskedAttention, IsTheDefinitionAndGivesTheTarget) {
  for (const DType dtype : kGpuDtypes) {
    for (const Sizes& sizes : kSizes) {
      if (sizes.S < sizes.T) continue;
      if (dtype == DType::kBF16 && sizes.Q == 192) continue;  // ops_masked_attention_test.cc
      for (const int64_t K : {1, 6, 300}) {
        if (K < 300 && testing::UnderRacecheck()) continue;
        SCOPED_TRACE(::testing::Message() << sizes << " K " << K << " " << dtype);
        Case c(dtype, sizes);
        const Tensor ids = ScatteredIds(sizes.T, K, sizes.S - sizes.T);
        ExpectMaskedAttention(c, {OnGpu(ids), ids});
      }
    }
  }
}

TEST(CudaMaskedAttention, PassesOverUnusedPlacesOfTheList) {
  for (const DType dtype : kGpuDtypes) {
    Case c(dtype, {3, 70, 2, 24, 16});
    ExpectMaskedAttention(
        c, testing::IntsOnBoth({3, 4}, {-1, 69, -1, 0, -1, -1, -1, -1, 63, 64, 65, 1}));
  }
}

TEST(CudaMaskedAttention, TakesLongListsInChunksOfRows) {
  // 64 MiB of sums are 64 rows of so many keys.
  const Sizes sizes = {130, 200000, 1, 8, 8};
  Case c(DType::kF32, sizes);
  std::vector<int32_t> values(sizes.T * 3);
  for (int64_t t = 0; t < sizes.T; ++t) {
    values[3 * t] = static_cast<int32_t>(t);
    values[3 * t + 1] = static_cast<int32_t>(sizes.S - 1 - t);
    values[3 * t + 2] = -1;
  }
  c.terms = 64;
  ExpectMaskedAttention(c, testing::IntsOnBoth({sizes.T, 3}, values));
}

TEST(CudaMaskedAttention, GivesTheSameBitsTwice) {
  const Sizes sizes = {130, 150, 3, 160, 64};
  const Tensor ids = OnGpu(ScatteredIds(sizes.T, 40, 20));
  const Case one(DType::kBF16, sizes), two(DType::kBF16, sizes);
  Tensor dq[2], target[2];
  for (int i = 0; i < 2; ++i) {
    const Case& c = i == 0 ? one : two;
    const AttentionResult result = MaskedAttention(Gpu(), c.q.gpu, c.k.gpu, c.v.gpu, ids, c.scale);
    target[i] = Gpu().Empty(DType::kF32, ids.shape());
    dq[i] = MaskedAttentionBackward(Gpu(), c.d_out.gpu, c.q.gpu, c.k.gpu, c.v.gpu, result, ids,
                                    c.scale, c.dk.gpu, c.dv.gpu, target[i]);
  }
  ExpectSameBits(dq[0], OnHost(dq[1]));
  ExpectSameBits(target[0], OnHost(target[1]));
  ExpectSameBits(one.dk.gpu, OnHost(two.dk.gpu));
  ExpectSameBits(one.dv.gpu, OnHost(two.dv.gpu));
}

}  // namespace
}  // namespace baleen
