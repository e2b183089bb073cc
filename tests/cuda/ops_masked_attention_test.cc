// Dense attention of 192/128 heads on tensor cores against the CPU definition in fp64, over windows
// and lists of every kind.
//
// Tolerances. P and dS are rounded to bf16 between the products, and o and dq at the end: two or
// three roundings of 2^-9 at most in each result, dk and dv included. lse and the target are fp32
// throughout. The backward definition gets the GPU's own o and lse.
#include <cmath>
#include <string>
#include <vector>

#include "kernels/ops/attention/attention.h"
#include "kernels/ops/attention/masked_attention_backward_cuda.h"
#include "kernels/ops/attention/masked_attention_gpu.h"
#include "kernels/ops/elementwise.h"
#include "tests/cuda/ops_support.h"
#include "tests/cuda/racecheck.h"

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
using testing::ToDoubles;

constexpr int64_t kQ = 192, kV = 128;

struct Case {
  Case(int64_t T, int64_t S, int64_t H)
      : T(T),
        S(S),
        q(RandomOnBoth(DType::kBF16, {T, H, kQ}, 1)),
        k(RandomOnBoth(DType::kBF16, {S, H, kQ}, 2)),
        v(RandomOnBoth(DType::kBF16, {S, H, kV}, 3)),
        d_out(RandomOnBoth(DType::kBF16, {T, H, kV}, 4)),
        dk(RandomOnBoth(DType::kF32, {S, H, kQ}, 5)),
        dv(RandomOnBoth(DType::kF32, {S, H, kV}, 6)) {}
  int64_t T, S;
  OnBoth q, k, v, d_out;
  OnBoth dk, dv;  // not zero: gradients are added
  double scale = 1 / std::sqrt(static_cast<double>(kQ));
};

// Windows on the CPU; `seen` has the same on the GPU.
struct Seen {
  KeyWindows windows;
  Tensor ids;

  SeenKeys OnTheGpu() const {
    SeenKeys seen;
    if (!windows.begin_T.empty())
      seen.windows = {OnGpu(windows.begin_T), OnGpu(windows.end_T), {}, {}};
    if (!ids.empty()) seen.ids_TK = OnGpu(ids);
    return seen;
  }
};

Seen WindowsOf(const std::vector<int32_t>& begin, const std::vector<int32_t>& end) {
  const Shape shape = {static_cast<int64_t>(begin.size())};
  return {
      {testing::IntTensorOf(Cpu(), shape, begin), testing::IntTensorOf(Cpu(), shape, end), {}, {}},
      {}};
}

// The last T rows of S keys, causal.
Seen Causal(int64_t T, int64_t S) {
  std::vector<int32_t> begin(T, 0), end(T);
  for (int64_t t = 0; t < T; ++t) end[t] = static_cast<int32_t>(S - T + t + 1);
  return WindowsOf(begin, end);
}

// Causal documents of 150 rows, single keys, rows without keys, and 260 rows (two whole tiles)
// without any.
Seen Mixed(int64_t T, int64_t S) {
  std::vector<int32_t> begin(T, 0), end(T, 0);
  for (int64_t t = 0; t < T; ++t) {
    const int64_t place = t * S / T;
    begin[t] = static_cast<int32_t>(place / 150 * 150);
    end[t] = static_cast<int32_t>(place + 1);
    if (t % 11 == 3) begin[t] = end[t] - 1;
    if (t % 11 == 5 || t < 260) begin[t] = end[t] = static_cast<int32_t>(S / 2);
  }
  return WindowsOf(begin, end);
}

// Up to K distinct keys of [0, t + S - T] in no order; -1 among them and behind; every ninth row
// and the rows of [first_empty, end_empty) have none.
Seen Lists(int64_t T, int64_t S, int64_t K, int64_t first_empty = 0, int64_t end_empty = 0) {
  std::vector<int32_t> ids(T * K, -1);
  for (int64_t t = 0; t < T; ++t) {
    if (t % 9 == 8 || (t >= first_empty && t < end_empty)) continue;
    const int64_t size = t + S - T + 1;
    std::vector<bool> taken(size, false);
    for (int64_t i = 0, place = 0; i < size && place < K; ++i) {
      const int64_t s = (3 + t + i * 37) % size;
      if (taken[s]) continue;
      taken[s] = true;
      if (place % 5 != 4) ids[t * K + place] = static_cast<int32_t>(s);
      ++place;
    }
  }
  return {{}, testing::IntTensorOf(Cpu(), {T, K}, ids)};
}

AttentionResult Forward(const Case& c, const SeenKeys& seen) {
  return AttentionForwardOnTensorCores(Gpu(), c.q.gpu, c.k.gpu, c.v.gpu, seen, c.scale);
}
Tensor Backward(const Case& c, const AttentionResult& forward, const SeenKeys& seen,
                const Tensor& target = Tensor()) {
  return AttentionBackwardOnTensorCores(Gpu(), c.d_out.gpu, c.q.gpu, c.k.gpu, c.v.gpu, forward,
                                        seen, c.scale, c.dk.gpu, c.dv.gpu, target);
}

// `cancelled`: what results are differences of, where they may vanish.
void ExpectCloseInBf16(const char* what, const Tensor& gpu, const Tensor& cpu,
                       double cancelled = 0) {
  const std::vector<double> a = ToDoubles(OnHost(gpu)), b = ToDoubles(cpu);
  ASSERT_EQ(a.size(), b.size());
  const double tolerance = 3 * 0x1p-9;
  double error = 0, squares = 0;
  for (size_t i = 0; i < b.size(); ++i) {
    error += (a[i] - b[i]) * (a[i] - b[i]);
    squares += b[i] * b[i];
  }
  const double count = static_cast<double>(b.size());
  const double rms = std::sqrt(squares / count) + cancelled;
  EXPECT_LE(std::sqrt(error / count), tolerance * rms) << what;
  for (size_t i = 0; i < b.size(); ++i) {
    // NaN fails this too.
    if (std::abs(a[i] - b[i]) <= 8 * tolerance * (std::abs(b[i]) + rms)) continue;
    ADD_FAILURE() << what << " element " << i << " is " << a[i] << ", expected " << b[i] << " (rms "
                  << rms << ")";
    return;
  }
}

void ExpectCloseLse(const Tensor& gpu, const Tensor& cpu) {
  const std::vector<double> a = ToDoubles(OnHost(gpu)), b = ToDoubles(cpu);
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::isinf(b[i])) {
      EXPECT_EQ(a[i], b[i]) << "row and head " << i;
    } else {
      EXPECT_NEAR(a[i], b[i], 2e-5) << "row and head " << i;
    }
  }
}

AttentionResult AsDefinition(const AttentionResult& gpu) {
  return {Cast(Cpu(), OnHost(gpu.o_THV), DType::kF64),
          Cast(Cpu(), OnHost(gpu.lse_TH), DType::kF64)};
}

void ExpectDefinition(Case c, const Seen& keys) {
  const SeenKeys seen = keys.OnTheGpu();
  const bool listed = !keys.ids.empty();
  const AttentionResult gpu = Forward(c, seen);
  const AttentionResult cpu =
      listed ? MaskedAttention(Cpu(), c.q.cpu, c.k.cpu, c.v.cpu, keys.ids, c.scale)
             : Attention(Cpu(), c.q.cpu, c.k.cpu, c.v.cpu, keys.windows, c.scale);
  ExpectCloseInBf16("o", gpu.o_THV, cpu.o_THV);
  ExpectCloseLse(gpu.lse_TH, cpu.lse_TH);
  OnBoth target;
  if (listed) target = RandomOnBoth(DType::kF32, keys.ids.shape(), 9);  // overwritten
  const Tensor dq = Backward(c, gpu, seen, target.gpu);
  const AttentionResult same = AsDefinition(gpu);
  const Tensor expected_dq =
      listed ? MaskedAttentionBackward(Cpu(), c.d_out.cpu, c.q.cpu, c.k.cpu, c.v.cpu, same,
                                       keys.ids, c.scale, c.dk.cpu, c.dv.cpu, target.cpu)
             : AttentionBackward(Cpu(), c.d_out.cpu, c.q.cpu, c.k.cpu, c.v.cpu, same, keys.windows,
                                 c.scale, c.dk.cpu, c.dv.cpu);
  // dS = P (dP - D): a row of one key has none, but for the rounding of two sums of V products in
  // fp32.
  const double cancelled = c.scale * std::sqrt(static_cast<double>(kV)) * 0x1p-10;
  ExpectCloseInBf16("dq", dq, expected_dq, cancelled);
  ExpectCloseInBf16("dk", c.dk.gpu, c.dk.cpu, cancelled);
  ExpectCloseInBf16("dv", c.dv.gpu, c.dv.cpu);
  if (listed) ExpectClose(target.gpu, target.cpu, 64 * kQ);
}

TEST(CudaAttentionOnTensorCores, IsTheDefinitionOnWindows) {
  ExpectDefinition(Case(300, 300, 3), Causal(300, 300));
  ExpectDefinition(Case(129, 517, 2), Causal(129, 517));
  ExpectDefinition(Case(700, 650, 2), Mixed(700, 650));
  ExpectDefinition(Case(2, 3, 5), WindowsOf({1, 0}, {3, 1}));
  // More tiles than multiprocessors: a thread block goes from one to the next.
  ExpectDefinition(Case(129, 130, 140), Causal(129, 130));
}

TEST(CudaAttentionOnTensorCores, IsTheDefinitionOnListsAndGivesTheTarget) {
  ExpectDefinition(Case(300, 300, 3), Lists(300, 300, 40));
  ExpectDefinition(Case(140, 600, 2), Lists(140, 600, 600));
  ExpectDefinition(Case(520, 700, 2), Lists(520, 700, 33, /*first_empty=*/128, /*end_empty=*/400));
  ExpectDefinition(Case(1, 70, 16), Lists(1, 70, 1));
}

TEST(CudaAttentionOnTensorCores, RowsWithoutKeysAreZeroAndChangeNothing) {
  const Case c(290, 66, 2);
  const std::vector<int32_t> none(c.T, 30);
  for (const Seen& keys : {WindowsOf(none, none), Lists(c.T, c.T, 3, 0, c.T)}) {
    const SeenKeys seen = keys.OnTheGpu();
    const AttentionResult result = Forward(c, seen);
    const Tensor dk = OnHost(c.dk.gpu), dv = OnHost(c.dv.gpu);
    Tensor target;
    if (!keys.ids.empty())
      target = OnGpu(testing::RandomTensor(Cpu(), DType::kF32, {c.T, 3}, 8, 1));
    const Tensor dq = Backward(c, result, seen, target);
    for (const double o : ToDoubles(OnHost(result.o_THV))) ASSERT_EQ(o, 0);
    for (const double lse : ToDoubles(OnHost(result.lse_TH))) ASSERT_EQ(lse, -INFINITY);
    for (const double gradient : ToDoubles(OnHost(dq))) ASSERT_EQ(gradient, 0);
    if (!keys.ids.empty()) {
      for (const double sum : ToDoubles(OnHost(target))) ASSERT_EQ(sum, 0);
    }
    ExpectSameBits(c.dk.gpu, dk);
    ExpectSameBits(c.dv.gpu, dv);
  }
}

// Of rows so few that no call keeps dS: whether one does is the only thing about a chunk that dq's
// bits depend on.
TEST(CudaAttentionOnTensorCores, ARowHasTheSameBitsInEveryChunkOfRows) {
  const Case c(300, 800, 2);
  const SeenKeys seen = Causal(c.T, c.S).OnTheGpu();
  const AttentionResult whole = Forward(c, seen);
  const Tensor whole_dq = Backward(c, whole, seen);
  for (const auto& [first, last] :
       {std::pair<int64_t, int64_t>{0, 1}, {1, 38}, {38, 171}, {171, 300}}) {
    SCOPED_TRACE(::testing::Message() << "rows " << first << ".." << last);
    Case part = c;
    part.q.gpu = c.q.gpu.Rows(first, last);
    part.d_out.gpu = c.d_out.gpu.Rows(first, last);
    const SeenKeys part_seen = {seen.windows.Rows(first, last), {}};
    const AttentionResult rows = Forward(part, part_seen);
    ExpectSameBits(rows.o_THV, OnHost(whole.o_THV.Rows(first, last)));
    ExpectSameBits(rows.lse_TH, OnHost(whole.lse_TH.Rows(first, last)));
    ExpectSameBits(Backward(part, rows, part_seen), OnHost(whole_dq.Rows(first, last)));
  }
}

// dS of all heads kept for dq, of one or two at a time, and none: dk and dv do not depend on it, dq
// only on whether.
TEST(CudaAttentionOnTensorCores, KeepsScoreGradientsOfAnyNumberOfHeads) {
  const int64_t T = testing::UnderRacecheck() ? 390 : 700;
  const Case c(T, T, 5);
  for (const Seen& keys : {Mixed(T, T), Lists(T, T, 90), Causal(T, T)}) {
    const SeenKeys seen = keys.OnTheGpu();
    const AttentionResult forward = Forward(c, seen);
    MaskedAttentionBackwardArgs args;
    args.keys.num_rows = args.keys.num_keys = static_cast<int>(T);
    if (keys.ids.empty()) {
      args.keys.key_begin_T = seen.windows.begin_T.data<int32_t>();
      args.keys.key_end_T = seen.windows.end_T.data<int32_t>();
    } else {
      args.keys.num_selected = static_cast<int>(seen.ids_TK.dim(1));
      args.keys.ids_TK = seen.ids_TK.data<int32_t>();
    }
    args.q_THQ = c.q.gpu.raw();
    args.k_SHQ = c.k.gpu.raw();
    args.v_SHV = c.v.gpu.raw();
    args.o_THV = forward.o_THV.raw();
    args.lse_TH = forward.lse_TH.data<float>();
    args.do_THV = c.d_out.gpu.raw();
    args.num_heads = 5;
    args.scale = static_cast<float>(c.scale);
    args.writes_keys = true;
    const int64_t head = MaskedTilesOfHead(args.keys) * kMaskedTileBytes;
    Tensor dq[4], dk[4], dv[4];
    for (const int heads : {5, 2, 1, 0}) {
      if (heads == 1 && testing::UnderRacecheck()) continue;
      const int i = heads == 5 ? 3 : heads;
      SCOPED_TRACE(::testing::Message() << heads << " heads of dS kept");
      args.keys.ds_bytes = heads * head;
      EXPECT_EQ(KeepsScoreGradients(args.keys), heads > 0);
      const size_t bytes =
          LayOutMaskedAttention(args.keys, MaskedAttentionPass::kBackward, 5).bytes;
      const Tensor workspace = Gpu().Empty(DType::kU8, {static_cast<int64_t>(bytes)});
      dq[i] = RandomOnBoth(DType::kBF16, c.q.gpu.shape(), 7).gpu;
      dk[i] = RandomOnBoth(DType::kBF16, c.k.gpu.shape(), 7).gpu;
      dv[i] = RandomOnBoth(DType::kBF16, c.v.gpu.shape(), 8).gpu;
      args.dq_THQ = dq[i].raw();
      args.dk_SHQ = dk[i].raw();
      args.dv_SHV = dv[i].raw();
      args.workspace = workspace.raw();
      LaunchMaskedAttentionBackward(args, Gpu().stream());
      ExpectSameBits(dk[i], OnHost(dk[3]));
      ExpectSameBits(dv[i], OnHost(dv[3]));
      if (heads > 0) ExpectSameBits(dq[i], OnHost(dq[3]));
    }
    ExpectCloseInBf16("dq", dq[0], OnHost(dq[3]),
                      c.scale * std::sqrt(static_cast<double>(kV)) * 0x1p-10);
  }
}

TEST(CudaAttentionOnTensorCores, GivesTheSameBitsTwice) {
  for (const Seen& keys : {Mixed(700, 650), Lists(700, 700, 90)}) {
    const bool listed = !keys.ids.empty();
    const SeenKeys seen = keys.OnTheGpu();
    const Case one(700, listed ? 700 : 650, 5), two(700, listed ? 700 : 650, 5);
    Tensor o[2], dq[2], target[2];
    for (int i = 0; i < 2; ++i) {
      const Case& c = i == 0 ? one : two;
      const AttentionResult result = Forward(c, seen);
      if (listed) target[i] = Gpu().Empty(DType::kF32, keys.ids.shape());
      o[i] = OnHost(result.o_THV);
      dq[i] = OnHost(Backward(c, result, seen, target[i]));
    }
    EXPECT_TRUE(testing::SameBits(o[0], o[1]));
    EXPECT_TRUE(testing::SameBits(dq[0], dq[1]));
    if (listed) ExpectSameBits(target[0], OnHost(target[1]));
    ExpectSameBits(one.dk.gpu, OnHost(two.dk.gpu));
    ExpectSameBits(one.dv.gpu, OnHost(two.dv.gpu));
  }
}

// Windows of every kind, with or without host copies: what the op runs is what is tested above.
TEST(CudaAttentionOnTensorCores, ServesAttentionOverWindows) {
  std::vector<int32_t> first(512, 0), end(512);  // the first and the last quarter of a sequence
  for (int32_t t = 0; t < 512; ++t) end[t] = t < 256 ? t + 1 : t + 513;
  for (const Seen& keys : {WindowsOf(first, end), Mixed(512, 1024), Causal(512, 1024)}) {
    const Case c(512, 1024, 2), same(512, 1024, 2);
    KeyWindows windows = keys.OnTheGpu().windows;
    const AttentionResult expected = Forward(c, {windows, {}});
    const Tensor expected_dq = Backward(c, expected, {windows, {}});
    windows.host_begin_T = keys.windows.begin_T;
    windows.host_end_T = keys.windows.end_T;
    EXPECT_EQ(AttentionKernelName(Gpu(), DType::kBF16, kQ, kV, windows), "tensor cores");
    const AttentionResult result = Attention(Gpu(), c.q.gpu, c.k.gpu, c.v.gpu, windows, c.scale);
    ExpectSameBits(result.o_THV, OnHost(expected.o_THV));
    ExpectSameBits(result.lse_TH, OnHost(expected.lse_TH));
    ExpectSameBits(AttentionBackward(Gpu(), c.d_out.gpu, c.q.gpu, c.k.gpu, c.v.gpu, result, windows,
                                     c.scale, same.dk.gpu, same.dv.gpu),
                   OnHost(expected_dq));
    ExpectSameBits(same.dk.gpu, OnHost(c.dk.gpu));
    ExpectSameBits(same.dv.gpu, OnHost(c.dv.gpu));
  }
}

// Gradients of keys in bf16 are written, whatever was there: the sums of a call alone, rounded
// once.
TEST(CudaAttentionOnTensorCores, WritesKeyGradientsInBf16) {
  const std::vector<int32_t> begin(300, 20), end(300, 90);  // most keys are seen by no row
  const Case c(300, 700, 2);
  for (const Seen& keys : {WindowsOf(begin, end), Mixed(300, 700), Lists(300, 700, 40)}) {
    const SeenKeys seen = keys.OnTheGpu();
    const AttentionResult result = Forward(c, seen);
    const Tensor dk = Gpu().Zeros(DType::kF32, c.dk.gpu.shape());
    const Tensor dv = Gpu().Zeros(DType::kF32, c.dv.gpu.shape());
    const Tensor dk_written = RandomOnBoth(DType::kBF16, dk.shape(), 7).gpu;
    const Tensor dv_written = RandomOnBoth(DType::kBF16, dv.shape(), 8).gpu;
    const auto backward = [&](const Tensor& to_dk, const Tensor& to_dv) {
      Tensor target;
      if (!keys.ids.empty()) target = Gpu().Empty(DType::kF32, keys.ids.shape());
      return AttentionBackwardOnTensorCores(Gpu(), c.d_out.gpu, c.q.gpu, c.k.gpu, c.v.gpu, result,
                                            seen, c.scale, to_dk, to_dv, target);
    };
    ExpectSameBits(backward(dk_written, dv_written), OnHost(backward(dk, dv)));
    ExpectSameBits(dk_written, OnHost(Cast(Gpu(), dk, DType::kBF16)));
    ExpectSameBits(dv_written, OnHost(Cast(Gpu(), dv, DType::kBF16)));
  }
}

// The op does so for every width, by whatever kernels.
TEST(CudaAttentionBackward, WritesKeyGradientsInBf16) {
  for (const auto& [Q, V] : {std::pair<int64_t, int64_t>{192, 128}, {40, 24}}) {
    SCOPED_TRACE(Q);
    const int64_t T = 130, S = 200, H = 2;
    const auto random = [&](int64_t rows, int64_t width, uint64_t seed) {
      return RandomOnBoth(DType::kBF16, {rows, H, width}, seed).gpu;
    };
    const Tensor q = random(T, Q, 1), k = random(S, Q, 2), v = random(S, V, 3);
    const Tensor d_out = random(T, V, 4), dk_written = random(S, Q, 5),
                 dv_written = random(S, V, 6);
    const Tensor dk = Gpu().Zeros(DType::kF32, k.shape()), dv = Gpu().Zeros(DType::kF32, v.shape());
    const KeyWindows windows = Causal(T, S).OnTheGpu().windows;
    const Tensor ids = Lists(T, S, 20).OnTheGpu().ids_TK;
    const Tensor target = Gpu().Empty(DType::kF32, ids.shape());
    const AttentionResult result = Attention(Gpu(), q, k, v, windows, 0.1);
    AttentionBackward(Gpu(), d_out, q, k, v, result, windows, 0.1, dk, dv);
    AttentionBackward(Gpu(), d_out, q, k, v, result, windows, 0.1, dk_written, dv_written);
    ExpectSameBits(dk_written, OnHost(Cast(Gpu(), dk, DType::kBF16)));
    ExpectSameBits(dv_written, OnHost(Cast(Gpu(), dv, DType::kBF16)));
    FillZero(Gpu(), dk);
    FillZero(Gpu(), dv);
    const AttentionResult listed = MaskedAttention(Gpu(), q, k, v, ids, 0.1);
    MaskedAttentionBackward(Gpu(), d_out, q, k, v, listed, ids, 0.1, dk, dv, target);
    MaskedAttentionBackward(Gpu(), d_out, q, k, v, listed, ids, 0.1, dk_written, dv_written,
                            target);
    ExpectSameBits(dk_written, OnHost(Cast(Gpu(), dk, DType::kBF16)));
    ExpectSameBits(dv_written, OnHost(Cast(Gpu(), dv, DType::kBF16)));
  }
}

TEST(CudaAttentionOnTensorCores, LargeScoresDoNotOverflowAndNotANumberStays) {
  Case c(3, 2, 1);
  std::vector<double> q(3 * kQ, 0.0), k(2 * kQ, 0.0), v(2 * kV, 3.0);
  q[0] = 1024;
  q[kQ] = -1024;
  q[2 * kQ] = std::nan("");
  k[0] = 1;
  k[kQ] = 2;
  for (int64_t i = kV; i < 2 * kV; ++i) v[i] = 4;
  c.q = testing::ValuesOnBoth(DType::kBF16, {3, 1, kQ}, q);
  c.k = testing::ValuesOnBoth(DType::kBF16, {2, 1, kQ}, k);
  c.v = testing::ValuesOnBoth(DType::kBF16, {2, 1, kV}, v);
  c.scale = 1;
  const AttentionResult result = Forward(c, WindowsOf({0, 0, 0}, {2, 2, 2}).OnTheGpu());
  const std::vector<double> o = ToDoubles(OnHost(result.o_THV)),
                            lse = ToDoubles(OnHost(result.lse_TH));
  EXPECT_EQ(o[0], 4);
  EXPECT_EQ(o[kV], 3);
  EXPECT_EQ(lse[0], 2048);
  EXPECT_EQ(lse[1], -1024);
  EXPECT_TRUE(std::isnan(o[2 * kV]));
  EXPECT_TRUE(std::isnan(lse[2]));
}

}  // namespace
}  // namespace baleen
