// Bench of the sparse attention kernels: every version is checked against the double reference on
// small odd shapes (fresh random inputs, -1 padding, short and empty rows, poisoned outputs), then
// timed. FLOPs are counted 2 T H K (576 + 512) forward and 2 T H K (3 * 576 + 2 * 512) backward.
//
//   sparse_attention_bench [--check] [--case=N] [--quick] [--heads=H] [--keys=S] [--only=forward]
//                          [--budget=MIB] [--json=PATH]
// --case=N checks the N-th shape alone and times nothing (for the sanitizers).
#include <cstring>

#include "kernels/bench/harness.cuh"
#include "kernels/bench/sparse_attention_checks.cuh"
#include "kernels/ops/attention/sparse_attention_backward_cuda.h"
#include "kernels/ops/attention/sparse_attention_forward_cuda.h"

namespace baleen::bench {
namespace {

constexpr double kBackwardFlopsPerPair = 2.0 * (3 * kC + 2 * kV);

struct Case {
  int tokens, heads, keys, selected;
  SparseAttentionBackwardPlan plan;
};

// Rows of all kinds: full, one key, empty, half; ascending, padded with -1 at the end.
std::vector<int32_t> MixedIds(const Case& c, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> ids(size_t(c.tokens) * c.selected, -1);
  for (int t = 0; t < c.tokens; ++t) {
    const int most = std::min(c.selected, c.keys);
    const int count = t % 4 == 0 ? most : t % 4 == 1 ? t % 2 : t % 8 == 2 ? 0 : most / 2 + t % 3;
    std::vector<uint64_t> bits((c.keys + 63) / 64);
    std::vector<int> picks;
    MarkDistinct(random, c.keys, std::min(count, most), bits);
    AppendMarked(bits, picks);
    std::copy(picks.begin(), picks.end(), ids.begin() + size_t(t) * c.selected);
  }
  return ids;
}

std::vector<float> ToFloat(const std::vector<double>& values) {
  return std::vector<float>(values.begin(), values.end());
}
// Everything one backward call needs on the device.
struct BackwardBuffers {
  BackwardBuffers(int tokens, int heads, int keys, int selected)
      : q(size_t(tokens) * heads * kC),
        kv(size_t(keys) * kC),
        o(size_t(tokens) * heads * kV),
        d_o(size_t(tokens) * heads * kV),
        dq(q.size()),
        lse(size_t(tokens) * heads),
        dkv(kv.size()),
        target(size_t(tokens) * selected),
        parts(ForwardPartFloats(tokens, heads, 1, selected)),
        ids(size_t(tokens) * selected) {
    args.q_THC = q.get();
    args.kv_SC = kv.get();
    args.o_THV = o.get();
    args.do_THV = d_o.get();
    args.lse_TH = lse.get();
    args.ids_TK = ids.get();
    args.dq_THC = dq.get();
    args.dkv_SC = dkv.get();
    args.target_TK = target.get();
    args.num_tokens = tokens;
    args.num_keys = keys;
    args.num_heads = heads;
    args.num_selected = selected;
    args.scale = kScale;
  }
  DeviceBuffer<__nv_bfloat16> q, kv, o, d_o, dq;
  DeviceBuffer<float> lse, dkv, target, parts;
  DeviceBuffer<int32_t> ids;
  SparseAttentionBackwardArgs args;
};

SparseAttentionProblem RandomProblem(const Case& c, uint64_t seed) {
  SparseAttentionProblem p = {c.tokens, c.heads, c.keys, c.selected, kScale, {}, {}, {}, {}};
  p.q_THC = RandomBf16(size_t(c.tokens) * c.heads * kC, seed);
  p.kv_SC = RandomBf16(size_t(c.keys) * kC, seed + 1);
  p.do_THV = RandomBf16(size_t(c.tokens) * c.heads * kV, seed + 2);
  p.ids_TK = MixedIds(c, seed + 3);
  return p;
}

SparseAttentionForwardArgs ForwardArgs(const BackwardBuffers& b) {
  SparseAttentionForwardArgs args;
  args.q_THC = b.q.get();
  args.kv_SC = b.kv.get();
  args.ids_TK = b.ids.get();
  args.o_THV = b.o.get();
  args.lse_TH = b.lse.get();
  args.parts = b.parts.get();
  args.num_tokens = b.args.num_tokens;
  args.num_heads = b.args.num_heads;
  args.num_selected = b.args.num_selected;
  args.scale = kScale;
  return args;
}

bool CheckForward(const Case& c, uint64_t seed) {
  const SparseAttentionProblem p = RandomProblem(c, seed);
  const SparseAttentionForwardResult expected = ReferenceForward(p);
  BackwardBuffers b(c.tokens, c.heads, c.keys, c.selected);
  b.q.Upload(ToBf16(p.q_THC));
  b.kv.Upload(ToBf16(p.kv_SC));
  b.ids.Upload(p.ids_TK);
  char label[96];
  std::snprintf(label, sizeof label, "forward T %3d H %3d S %4d K %4d", c.tokens, c.heads, c.keys,
                c.selected);
  return CheckForwardThrice(label, b.o, b.lse, expected, [&] {
    b.parts.Poison();
    LaunchSparseAttentionForward(ForwardArgs(b), nullptr);
  });
}

bool CheckBackward(const Case& c, uint64_t seed) {
  const SparseAttentionProblem p = RandomProblem(c, seed);
  SparseAttentionForwardResult forward = ReferenceForward(p);
  for (double& value : forward.o_THV) value = __bfloat162float(__float2bfloat16(float(value)));
  const SparseAttentionGradients expected = ReferenceBackward(p, forward);

  BackwardBuffers b(c.tokens, c.heads, c.keys, c.selected);
  b.q.Upload(ToBf16(p.q_THC));
  b.kv.Upload(ToBf16(p.kv_SC));
  b.o.Upload(ToBf16(forward.o_THV));
  b.d_o.Upload(ToBf16(p.do_THV));
  b.lse.Upload(ToFloat(forward.lse_TH));
  b.ids.Upload(p.ids_TK);
  bool good = true;
  DeviceBuffer<uint8_t> workspace(SparseAttentionBackwardWorkspace(b.args, c.plan));
  std::vector<float> first_dkv;
  for (int repeat = 0; repeat < 3; ++repeat) {
    workspace.Poison();
    b.dq.Poison();
    b.target.Poison();
    const std::vector<double> before = RandomBf16(p.kv_SC.size(), seed + 4);
    b.dkv.Upload(ToFloat(before));
    LaunchSparseAttentionBackward(b.args, c.plan, workspace.get(), nullptr);
    CheckLaunch("backward");
    const std::vector<float> dkv = b.dkv.Download();
    std::vector<double> added = ToDouble(dkv);
    for (size_t i = 0; i < added.size(); ++i) added[i] -= before[i];
    const double dq_error = RelativeError(ToDouble(b.dq.Download()), expected.dq_THC);
    const double dkv_error = RelativeError(added, expected.dkv_SC);
    const double target_error = RelativeError(ToDouble(b.target.Download()), expected.target_TK);
    const bool same = repeat == 0 || std::memcmp(dkv.data(), first_dkv.data(), dkv.size() * 4) == 0;
    if (repeat == 0) first_dkv = dkv;
    const bool pass = dq_error < 8e-3 && dkv_error < 8e-3 && target_error < 3e-3 && same;
    if (repeat == 0 || !pass) {
      std::printf(
          "check backward T %3d H %3d S %4d K %4d chunk %3d of %3d: dq %.2e dkv %.2e "
          "target %.2e %s%s\n",
          c.tokens, c.heads, c.keys, c.selected, c.plan.chunk, c.plan.span, dq_error, dkv_error,
          target_error, pass ? "ok" : "FAILED", same ? "" : " (not reproducible)");
    }
    good = good && pass;
  }
  return good;
}

void TimeForward(Timer& timer, const Case& c, IdPattern pattern, double gemm_tflops, int repeats,
                 Report& report) {
  BackwardBuffers b(c.tokens, c.heads, c.keys, c.selected);
  FillNormal(b.q, 1, 11);
  FillNormal(b.kv, 1, 12);
  b.ids.Upload(MakeIds(pattern, c.tokens, c.keys, c.selected, 15));
  const double ms =
      timer.MedianMs([&] { LaunchSparseAttentionForward(ForwardArgs(b), nullptr); }, repeats);
  const double pairs = double(c.tokens) * c.heads * c.selected;
  const double tflops = pairs * kForwardFlopsPerPair / (ms * 1e9);
  report.Add({{"kernel", "sparse_fwd"},
              {"heads", std::to_string(c.heads)},
              {"queries", std::to_string(c.tokens)},
              {"keys", std::to_string(c.keys)},
              {"ids", Name(pattern)},
              {"ms", Number(ms, 3)},
              {"TF", Number(tflops)},
              {"% GEMM", Number(100 * tflops / gemm_tflops)},
              {"gather TB/s", Number(pairs / std::min(c.heads, 64) * kC * 2 / (ms * 1e9), 2)}});
}

// Random data at full size; the statistics need not belong to the data, the work is the same.
void TimeBackward(Timer& timer, const Case& c, IdPattern pattern, size_t budget_bytes,
                  double gemm_tflops, int repeats, Report& report) {
  BackwardBuffers b(c.tokens, c.heads, c.keys, c.selected);
  FillNormal(b.q, 1, 11);
  FillNormal(b.kv, 1, 12);
  FillNormal(b.o, 0.1f, 13);
  FillNormal(b.d_o, 1, 14);
  b.lse.Upload(std::vector<float>(b.lse.size(), 12.7f));
  b.ids.Upload(MakeIds(pattern, c.tokens, c.keys, c.selected, 15));
  const SparseAttentionBackwardPlan plan = PlanSparseAttentionBackward(b.args, budget_bytes);
  DeviceBuffer<uint8_t> workspace(SparseAttentionBackwardWorkspace(b.args, plan));
  const auto work = [&] { LaunchSparseAttentionBackward(b.args, plan, workspace.get(), nullptr); };
  std::vector<float> results[2];
  for (std::vector<float>& result : results) {
    b.dkv.Zero();
    work();
    CheckLaunch("backward");
    result = b.dkv.Download();
  }
  const bool same =
      std::memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(float)) == 0;
  const double ms = timer.MedianMs(work, repeats);
  const double pairs = double(c.tokens) * c.heads * c.selected;
  const double tflops = pairs * kBackwardFlopsPerPair / (ms * 1e9);
  report.Add({{"kernel", "sparse_bwd"},
              {"heads", std::to_string(c.heads)},
              {"queries", std::to_string(c.tokens)},
              {"keys", std::to_string(c.keys)},
              {"ids", Name(pattern)},
              {"chunk", std::to_string(plan.chunk)},
              {"ms", Number(ms, 3)},
              {"TF", Number(tflops)},
              {"% GEMM", Number(100 * tflops / gemm_tflops)},
              {"same bits", same ? "yes" : "no"}});
}

int Run(const Options& options) {
  cudaDeviceProp device;
  Check(cudaGetDeviceProperties(&device, 0), "device");
  std::printf("%s, %d multiprocessors\n", device.name, device.multiProcessorCount);
  if (options.check) {
    bool good = true;
    const uint64_t seed = std::random_device()();
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
    const Case cases[] = {{7, 64, 300, 128, {32, 32}},     {9, 128, 777, 192, {32, 64}},
                          {5, 16, 100, 64, {32, 32}},      {387, 32, 150, 128, {32, 256}},
                          {24, 64, 2300, 2048, {32, 32}},  {6, 1, 70, 128, {64, 128}},
                          {300, 128, 130, 128, {32, 320}}, {140, 128, 1000, 512, {32, 64}},
                          {12, 128, 2048, 2048, {32, 32}}, {40, 64, 1300, 128, {32, 64}},
                          {24, 128, 1300, 64, {32, 32}},   {150, 64, 500, 448, {32, 64}}};
    int number = 0;
    for (const Case& c : cases) {
      if (options.only_case >= 0 && options.only_case != number++) continue;
      if (options.which != "backward") good = CheckForward(c, seed + c.keys) && good;
      if (options.which != "forward") good = CheckBackward(c, seed + c.tokens) && good;
    }
    if (!good) {
      std::printf("CHECK FAILED\n");
      return 1;
    }
  }
  if (options.only_case >= 0) return 0;
  Timer timer;
  Report report;
  const double gemm = GemmTflops(timer);
  std::printf("GEMM %.1f TF, copy %.2f TB/s\n", gemm, CopyTbs(timer));
  const int repeats = options.quick ? 5 : 10;
  const auto for_each_shape = [&](const std::function<void(const Case&, IdPattern)>& time) {
    for (int heads : {64, 128}) {
      for (int keys : {4096, 8192, 16384, 32768, 131072}) {
        if (options.quick && keys != 8192 && keys != 32768) continue;
        if (options.heads && heads != options.heads) continue;
        if (options.keys && keys != options.keys) continue;
        time({4096, heads, keys, 2048, {}}, IdPattern::kRandom);
        if (keys >= 32768) time({4096, heads, keys, 2048, {}}, IdPattern::kNear);
      }
    }
  };
  if (options.which != "backward") {
    for_each_shape([&](const Case& c, IdPattern pattern) {
      TimeForward(timer, c, pattern, gemm, repeats, report);
    });
  }
  if (options.which != "forward") {
    for_each_shape([&](const Case& c, IdPattern pattern) {
      TimeBackward(timer, c, pattern, options.budget_mib << 20, gemm, repeats, report);
    });
  }
  Finish(timer, report, options.json);
  return 0;
}

}  // namespace
}  // namespace baleen::bench

int main(int argc, char** argv) {
  return baleen::bench::Run(baleen::bench::ReadOptions(argc, argv));
}
