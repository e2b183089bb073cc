// Bench of the backward of sparse attention with 16 and 32 heads: packs of queries
// (sparse_attention_packs_cuda.h) against single queries padded to 64 rows. Checked against the
// double reference (fresh inputs, rows of all kinds, poisoned outputs and workspace, equal bits
// over repeats, rings with and without slack), also where the device must choose single queries;
// then both are timed in turns. FLOPs: useful ones, 2 T H K (3 x 576 + 2 x 512).
//
//   packed_backward_bench [--check] [--quick] [--heads=H] [--keys=S] [--json=PATH]
#include <cstdio>
#include <cstring>

#include "kernels/bench/harness.cuh"
#include "kernels/bench/sparse_attention_checks.cuh"
#include "kernels/ops/attention/sparse_attention_backward_cuda.h"
#include "kernels/ops/attention/sparse_attention_backward_schedule_cuda.h"
#include "kernels/ops/attention/sparse_attention_packs_cuda.h"

namespace baleen::bench {
namespace {

constexpr double kBackwardFlopsPerPair = 2.0 * (3 * kC + 2 * kV);
constexpr size_t kBudget = size_t{5} << 29;  // the op's

struct Case {
  int tokens, heads, keys, selected;
  int Queries() const { return 64 / heads; }
};

// Rows of all kinds: full, one key, empty, half; ascending or not, padded with -1 at the end. A
// half of the keys comes from the first quarter, so that neighbours share some.
std::vector<int32_t> MixedIds(const Case& c, bool ascending, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> ids(size_t(c.tokens) * c.selected, -1), keys(c.keys);
  for (int t = 0; t < c.tokens; ++t) {
    const int most = std::min(c.selected, c.keys);
    const int wanted = t % 5 == 0 ? most : t % 5 == 1 ? 1 : t % 10 == 2 ? 0 : most / 2 + t % 3;
    const int count = std::min(most, t / 4 % 9 == 7 ? 0 : wanted);  // some packs have no key
    for (int i = 0; i < c.keys; ++i) keys[i] = i;
    std::shuffle(keys.begin(), keys.begin() + c.keys / 4, random);
    std::shuffle(keys.begin() + c.keys / 8, keys.end(), random);
    const int begin = static_cast<int>(random() % (c.keys - count + 1));
    const auto row = ids.begin() + size_t(t) * c.selected;
    std::copy_n(keys.begin() + begin, count, row);
    if (ascending) std::sort(row, row + count);
  }
  return ids;
}

struct Buffers {
  explicit Buffers(const Case& c)
      : q(size_t(c.tokens) * c.heads * kC),
        kv(size_t(c.keys) * kC),
        o(size_t(c.tokens) * c.heads * kV),
        d_o(o.size()),
        dq(q.size()),
        lse(size_t(c.tokens) * c.heads),
        dkv(kv.size()),
        target(size_t(c.tokens) * c.selected),
        ids(target.size()),
        entries(size_t(c.tokens + 3) * c.selected),
        counts(c.tokens),
        choice(c.tokens + 3) {
    args.q_THC = q.get();
    args.kv_SC = kv.get();
    args.o_THV = o.get();
    args.do_THV = d_o.get();
    args.lse_TH = lse.get();
    args.ids_TK = ids.get();
    args.dq_THC = dq.get();
    args.dkv_SC = dkv.get();
    args.target_TK = target.get();
    args.num_tokens = c.tokens;
    args.num_keys = c.keys;
    args.num_heads = c.heads;
    args.num_selected = c.selected;
    args.scale = kScale;
    packs.ids_TK = ids.get();
    packs.entries_IU = entries.get();
    packs.counts_I = counts.get();
    packs.num_tokens = c.tokens;
    packs.num_keys = c.keys;
    packs.num_selected = c.selected;
    packs.queries = c.Queries();
    args.entries_IU = reinterpret_cast<const int32_t*>(entries.get());
    args.counts_I = counts.get();
    args.choice = choice.get();
  }
  void Run(const SparseAttentionBackwardPlan& plan, void* workspace) const {
    if (args.packs.queries > 1) LaunchPackSelectedKeys(packs, nullptr);
    LaunchSparseAttentionBackward(args, plan, workspace, nullptr);
  }
  int Chosen() const { return choice.Download()[0]; }  // the chunk

  DeviceBuffer<__nv_bfloat16> q, kv, o, d_o, dq;
  DeviceBuffer<float> lse, dkv, target;
  DeviceBuffer<int32_t> ids;
  DeviceBuffer<uint32_t> entries;
  DeviceBuffer<int32_t> counts, choice;
  SparseAttentionPacks packs;
  SparseAttentionBackwardArgs args;
};

std::vector<float> ToFloat(const std::vector<double>& values) {
  return std::vector<float>(values.begin(), values.end());
}

// The fewest rows of a ring that holds the packs of these lists.
int FewestRingRows(const Case& c, const SparseAttentionBackwardPacksPlan& plan,
                   const std::vector<int32_t>& ids) {
  const int chunk = plan.LargestChunk();
  std::vector<int> rows(plan.shape.num_tokens / chunk + 1);
  for (int i = 0; i < plan.shape.num_tokens; ++i) {
    const auto first = ids.begin() + size_t(i) * plan.queries * c.selected;
    const int lists = std::min(plan.queries, c.tokens - i * plan.queries);
    std::vector<int32_t> keys(first, first + size_t(lists) * c.selected);
    std::sort(keys.begin(), keys.end());
    keys.erase(std::unique(keys.begin(), keys.end()), keys.end());
    rows[i / chunk] += int(keys.size()) - int(keys.front() < 0);
  }
  return FewestSlotsOfPacks(chunk, plan.lag) * *std::max_element(rows.begin(), rows.end());
}

// The ring has the fewest rows and `slack`; below zero the device must choose single queries.
bool CheckBackward(const Case& c, int lag, int slack, bool ascending, uint64_t seed) {
  SparseAttentionProblem p = {c.tokens, c.heads, c.keys, c.selected, kScale, {}, {}, {}, {}};
  p.q_THC = RandomBf16(size_t(c.tokens) * c.heads * kC, seed);
  p.kv_SC = RandomBf16(size_t(c.keys) * kC, seed + 1);
  p.do_THV = RandomBf16(size_t(c.tokens) * c.heads * kV, seed + 2);
  p.ids_TK = MixedIds(c, ascending, seed + 3);
  SparseAttentionForwardResult forward = ReferenceForward(p);
  for (double& value : forward.o_THV) value = __bfloat162float(__float2bfloat16(float(value)));
  const SparseAttentionGradients expected = ReferenceBackward(p, forward);

  Buffers b(c);
  b.q.Upload(ToBf16(p.q_THC));
  b.kv.Upload(ToBf16(p.kv_SC));
  b.o.Upload(ToBf16(forward.o_THV));
  b.d_o.Upload(ToBf16(p.do_THV));
  b.lse.Upload(ToFloat(forward.lse_TH));
  b.ids.Upload(p.ids_TK);
  const SparseAttentionBackwardPlan plan = {32, 64};
  b.args.packs = PlanSparseAttentionBackwardPacks(b.args, plan, c.Queries(), kBudget);
  std::fill_n(b.args.packs.chunks, b.args.packs.kChoices, 32);
  b.args.packs.span = 32 * 7;
  b.args.packs.lag = lag;
  b.args.packs.most_percent = 1000;
  b.args.packs.ring_rows = FewestRingRows(c, b.args.packs, p.ids_TK) + slack;
  DeviceBuffer<uint8_t> workspace(SparseAttentionBackwardWorkspace(b.args, plan, b.args.packs));
  bool good = true;
  std::vector<float> first_dkv;
  std::vector<__nv_bfloat16> first_dq;
  for (int repeat = 0; repeat < 3; ++repeat) {
    workspace.Poison();
    b.dq.Poison();
    b.target.Poison();
    b.entries.Poison();
    b.counts.Poison();
    b.choice.Poison();
    const std::vector<double> before = RandomBf16(p.kv_SC.size(), seed + 4);
    b.dkv.Upload(ToFloat(before));
    b.Run(plan, workspace.get());
    CheckLaunch("packed backward");
    const std::vector<float> dkv = b.dkv.Download();
    std::vector<double> added = ToDouble(dkv);
    for (size_t i = 0; i < added.size(); ++i) added[i] -= before[i];
    const std::vector<__nv_bfloat16> dq = b.dq.Download();
    const double dq_error = RelativeError(ToDouble(dq), expected.dq_THC);
    const double dkv_error = RelativeError(added, expected.dkv_SC);
    const double target_error = RelativeError(ToDouble(b.target.Download()), expected.target_TK);
    const bool same =
        repeat == 0 || (std::memcmp(dkv.data(), first_dkv.data(), dkv.size() * 4) == 0 &&
                        std::memcmp(dq.data(), first_dq.data(), dq.size() * 2) == 0);
    if (repeat == 0) first_dkv = dkv, first_dq = dq;
    const bool chosen = b.Chosen() != 0;
    const bool pass = dq_error < 8e-3 && dkv_error < 8e-3 && target_error < 3e-3 && same &&
                      chosen == (slack >= 0);
    if (repeat == 0 || !pass) {
      std::printf(
          "check T %3d H %2d S %4d K %4d lag %2d ring %d: dq %.2e dkv %.2e target %.2e "
          "%s %s%s\n",
          c.tokens, c.heads, c.keys, c.selected, lag, b.args.packs.ring_rows, dq_error, dkv_error,
          target_error, chosen ? "packs" : "single", pass ? "ok" : "FAILED",
          same ? "" : " (not reproducible)");
    }
    good = good && pass;
  }
  return good;
}

void TimeBackward(Timer& timer, const Case& c, IdPattern pattern, double gemm, int repeats,
                  Report& report) {
  Buffers b(c);
  FillNormal(b.q, 1, 11);
  FillNormal(b.kv, 1, 12);
  FillNormal(b.o, 0.1f, 13);
  FillNormal(b.d_o, 1, 14);
  b.lse.Upload(std::vector<float>(b.lse.size(), 12.7f));
  b.ids.Upload(MakeIds(pattern, c.tokens, c.keys, c.selected, 15));
  const SparseAttentionBackwardPlan plan = PlanSparseAttentionBackward(b.args, kBudget);
  const SparseAttentionBackwardPacksPlan packs =
      PlanSparseAttentionBackwardPacks(b.args, plan, c.Queries(), kBudget);
  DeviceBuffer<uint8_t> workspace(SparseAttentionBackwardWorkspace(b.args, plan, packs));
  const auto work = [&] { b.Run(plan, workspace.get()); };
  double single_ms = 0, ms = 0;
  constexpr int kTurns = 3;
  for (int turn = 0; turn < kTurns; ++turn) {
    b.args.packs = {};
    single_ms += timer.MedianMs(work, repeats) / kTurns;
    b.args.packs = packs;
    ms += timer.MedianMs(work, repeats) / kTurns;
  }
  std::vector<float> results[2];
  for (std::vector<float>& result : results) {
    b.dkv.Zero();
    work();
    CheckLaunch("backward");
    result = b.dkv.Download();
  }
  const bool same =
      std::memcmp(results[0].data(), results[1].data(), results[0].size() * sizeof(float)) == 0;
  const std::vector<int32_t> counts = b.counts.Download();
  double mean = 0;
  for (int i = 0; i < b.packs.NumPacks(); ++i) mean += counts[i];
  const double tflops =
      double(c.tokens) * c.heads * c.selected * kBackwardFlopsPerPair / (ms * 1e9);
  report.Add({{"kernel", "sparse_bwd"},
              {"heads", std::to_string(c.heads)},
              {"queries", std::to_string(c.tokens)},
              {"keys", std::to_string(c.keys)},
              {"ids", Name(pattern)},
              {"union", Number(mean / b.packs.NumPacks(), 0)},
              {"chunk", b.Chosen() == 0 ? "single" : std::to_string(b.Chosen())},
              {"padded ms", Number(single_ms, 3)},
              {"ms", Number(ms, 3)},
              {"TF", Number(tflops)},
              {"% GEMM", Number(100 * tflops / gemm)},
              {"x padded", Number(single_ms / ms, 2)},
              {"same bits", same ? "yes" : "no"}});
}

int Run(const Options& options) {
  if (options.check) {
    bool good = true;
    const uint64_t seed = std::random_device()();
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
    for (const auto& [c, lag, slack, ascending] : {std::tuple{Case{7, 16, 300, 128}, 7, 0, true},
                                                   {Case{387, 32, 150, 128}, 7, 0, false},
                                                   {Case{515, 16, 260, 64}, 32, 0, true},
                                                   {Case{1030, 16, 200, 64}, 40, 0, false},
                                                   {Case{1030, 16, 200, 64}, 40, 777, false},
                                                   {Case{26, 16, 2300, 2048}, 7, 0, false},
                                                   {Case{17, 32, 2100, 2048}, 32, 0, true},
                                                   {Case{515, 16, 260, 64}, 32, -1, true},
                                                   {Case{387, 32, 150, 128}, 7, -1, false}}) {
      good = CheckBackward(c, lag, slack, ascending, seed + c.keys) && good;
    }
    if (!good) {
      std::printf("CHECK FAILED\n");
      return 1;
    }
  }
  Timer timer;
  Report report;
  const double gemm = GemmTflops(timer);
  std::printf("GEMM %.1f TF\n", gemm);
  const int repeats = options.quick ? 3 : 7;
  for (const int heads : {16, 32}) {
    for (const int keys : {8192, 32768, 131072}) {
      if ((options.heads && heads != options.heads) || (options.keys && keys != options.keys))
        continue;
      for (const IdPattern pattern : {IdPattern::kNear, IdPattern::kRandom}) {
        TimeBackward(timer, {4096, heads, keys, 2048}, pattern, gemm, repeats, report);
      }
    }
  }
  Finish(timer, report, options.json);
  return 0;
}

}  // namespace
}  // namespace baleen::bench

int main(int argc, char** argv) {
  return baleen::bench::Run(baleen::bench::ReadOptions(argc, argv));
}
