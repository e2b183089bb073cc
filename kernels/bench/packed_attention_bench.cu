// Bench of sparse attention with few heads: packs of queries (sparse_attention_packs_cuda.h)
// against single queries padded to 64 rows. Unions are checked entry by entry against std::map, o
// and lse against the double reference (fresh inputs, rows of all kinds, poisoned outputs, equal
// bits over repeats), then both forms are timed. FLOPs: useful ones, 2 T H K (576 + 512).
//
//   packed_attention_bench [--check] [--quick] [--heads=H] [--keys=S] [--json=PATH]
#include <cstdio>
#include <map>

#include "kernels/bench/harness.cuh"
#include "kernels/bench/sparse_attention_checks.cuh"
#include "kernels/ops/attention/sparse_attention_forward_cuda.h"
#include "kernels/ops/attention/sparse_attention_packs_cuda.h"

namespace baleen::bench {
namespace {

struct Case {
  int tokens, heads, keys, selected, queries;  // of a pack
};

// Rows of all kinds: full, one key, empty, half; shuffled, padded with -1 at the end. Half of a
// row's keys come from the first quarter, so that neighbours share some.
std::vector<int32_t> MixedIds(const Case& c, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::vector<int32_t> ids(size_t(c.tokens) * c.selected, -1), keys(c.keys);
  for (int t = 0; t < c.tokens; ++t) {
    const int most = std::min(c.selected, c.keys);
    const int count = t % 5 == 0 ? most : t % 5 == 1 ? 1 : t % 10 == 2 ? 0 : most / 2 + t % 3;
    for (int i = 0; i < c.keys; ++i) keys[i] = i;
    std::shuffle(keys.begin(), keys.begin() + c.keys / 4, random);
    std::shuffle(keys.begin() + c.keys / 8, keys.end(), random);
    const int begin = random() % (c.keys - std::min(most, count) + 1);
    std::copy_n(keys.begin() + begin, std::min(most, count), ids.begin() + size_t(t) * c.selected);
  }
  return ids;
}

struct Buffers {
  explicit Buffers(const Case& c)
      : q(size_t(c.tokens) * c.heads * kC),
        kv(size_t(c.keys) * kC),
        o(size_t(c.tokens) * c.heads * kV),
        lse(size_t(c.tokens) * c.heads),
        ids(size_t(c.tokens) * c.selected),
        entries(size_t(c.tokens + 3) * (c.selected + 63)),
        counts(c.tokens),
        parts(ForwardPartFloats(
            c.tokens, c.heads, c.queries,
            c.queries > 1 ? (c.queries * c.selected + 63) / 64 * 64 : c.selected)) {
    packs.ids_TK = ids.get();
    packs.entries_IU = entries.get();
    packs.counts_I = counts.get();
    packs.num_tokens = c.tokens;
    packs.num_keys = c.keys;
    packs.num_selected = c.selected;
    packs.queries = c.queries;
    args.q_THC = q.get();
    args.kv_SC = kv.get();
    args.ids_TK = ids.get();
    args.o_THV = o.get();
    args.lse_TH = lse.get();
    args.parts = parts.get();
    args.num_tokens = c.tokens;
    args.num_heads = c.heads;
    args.num_selected = c.selected;
    args.scale = kScale;
    if (c.queries > 1) {
      args.ids_TK = reinterpret_cast<const int32_t*>(entries.get());
      args.counts_I = counts.get();
      args.num_selected = packs.Width();
      args.queries_a_pack = c.queries;
    }
  }
  void Forward() const {
    if (packs.queries > 1) LaunchPackSelectedKeys(packs, nullptr);
    LaunchSparseAttentionForward(args, nullptr);
  }
  DeviceBuffer<__nv_bfloat16> q, kv, o;
  DeviceBuffer<float> lse;
  DeviceBuffer<int32_t> ids;
  DeviceBuffer<uint32_t> entries;
  DeviceBuffer<int32_t> counts;
  DeviceBuffer<float> parts;
  SparseAttentionPacks packs;
  SparseAttentionForwardArgs args;
};

bool CheckUnions(const Case& c, const std::vector<int32_t>& ids) {
  Buffers b(c);
  b.ids.Upload(ids);
  b.entries.Poison();
  b.counts.Poison();
  LaunchPackSelectedKeys(b.packs, nullptr);
  CheckLaunch("packs");
  const std::vector<uint32_t> entries = b.entries.Download();
  const std::vector<int32_t> counts = b.counts.Download();
  double sum = 0;
  for (int i = 0; i < b.packs.NumPacks(); ++i) {
    std::map<int, uint32_t> expected;
    for (int t = i * c.queries; t < std::min(c.tokens, (i + 1) * c.queries); ++t) {
      for (int k = 0; k < c.selected; ++k) {
        const int s = ids[size_t(t) * c.selected + k];
        if (s >= 0) expected[s] |= 1u << (t - i * c.queries);
      }
    }
    sum += double(expected.size());
    std::vector<uint32_t> want;
    for (const auto& [key, bits] : expected) want.push_back(uint32_t(key) | bits << 28);
    while (want.size() % 64 != 0) want.push_back(0);
    if (counts[i] != int(expected.size()) ||
        !std::equal(want.begin(), want.end(), entries.begin() + size_t(i) * b.packs.Width())) {
      std::printf("UNION %d of T %d S %d K %d n %d FAILED: %d keys, expected %zu\n", i, c.tokens,
                  c.keys, c.selected, c.queries, counts[i], expected.size());
      return false;
    }
  }
  std::printf("check unions T %d S %d K %d n %d: mean %.1f keys ok\n", c.tokens, c.keys, c.selected,
              c.queries, sum / b.packs.NumPacks());
  return true;
}

bool CheckForward(const Case& c, uint64_t seed) {
  SparseAttentionProblem p = {c.tokens, c.heads, c.keys, c.selected, kScale, {}, {}, {}, {}};
  p.q_THC = RandomBf16(size_t(c.tokens) * c.heads * kC, seed);
  p.kv_SC = RandomBf16(size_t(c.keys) * kC, seed + 1);
  p.ids_TK = MixedIds(c, seed + 3);
  if (c.queries > 1 && !CheckUnions(c, p.ids_TK)) return false;
  const SparseAttentionForwardResult expected = ReferenceForward(p);
  Buffers b(c);
  b.q.Upload(ToBf16(p.q_THC));
  b.kv.Upload(ToBf16(p.kv_SC));
  b.ids.Upload(p.ids_TK);
  char label[96];
  std::snprintf(label, sizeof label, "forward T %3d H %3d S %4d K %4d n %d", c.tokens, c.heads,
                c.keys, c.selected, c.queries);
  return CheckForwardThrice(label, b.o, b.lse, expected, [&] {
    b.entries.Poison();
    b.parts.Poison();
    b.Forward();
  });
}

void TimeForward(Timer& timer, Case c, IdPattern pattern, double gemm, int repeats,
                 Report& report) {
  const std::vector<int32_t> ids = MakeIds(pattern, c.tokens, c.keys, c.selected, 15);
  double padded_ms = 0;
  const int pack = c.queries;
  for (const int queries : {1, pack}) {
    if (queries == 1 && pack == 1 && padded_ms > 0) break;  // nothing to pack
    c.queries = queries;
    Buffers b(c);
    FillNormal(b.q, 1, 11);
    FillNormal(b.kv, 1, 12);
    b.ids.Upload(ids);
    const double ms = timer.MedianMs([&] { b.Forward(); }, repeats);
    if (queries == 1) padded_ms = ms;
    const double union_ms =
        queries == 1 ? 0
                     : timer.MedianMs([&] { LaunchPackSelectedKeys(b.packs, nullptr); }, repeats);
    double mean = c.selected;
    if (queries > 1) {
      mean = 0;
      const std::vector<int32_t> counts = b.counts.Download();
      for (int i = 0; i < b.packs.NumPacks(); ++i) mean += counts[i];
      mean /= b.packs.NumPacks();
    }
    const double tflops =
        double(c.tokens) * c.heads * c.selected * kForwardFlopsPerPair / (ms * 1e9);
    report.Add({{"kernel", "sparse_fwd"},
                {"heads", std::to_string(c.heads)},
                {"queries", std::to_string(c.tokens)},
                {"keys", std::to_string(c.keys)},
                {"ids", Name(pattern)},
                {"a pack", std::to_string(queries)},
                {"union", Number(mean, 0)},
                {"ms", Number(ms, 3)},
                {"union ms", Number(union_ms, 3)},
                {"TF", Number(tflops)},
                {"% GEMM", Number(100 * tflops / gemm)},
                {"x padded", Number(padded_ms / ms, 2)}});
  }
}

int Run(const Options& options) {
  bool good = true;
  if (options.check) {
    const uint64_t seed = std::random_device()();
    std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
    for (const Case& c :
         {Case{1093, 16, 300, 128, 4}, Case{23, 16, 300, 128, 4}, Case{18, 32, 777, 192, 2},
          Case{13, 16, 2300, 2048, 4}, Case{21, 3, 90, 64, 4}, Case{9, 11, 1500, 1024, 4},
          Case{7, 32, 3000, 2048, 2}, Case{31, 20, 150, 70, 2}, Case{10, 16, 64, 64, 2},
          Case{9, 64, 300, 128, 1}, Case{7, 128, 777, 192, 1}}) {
      good = CheckForward(c, seed + c.keys) && good;
    }
    for (const Case& c :
         {Case{37, 16, 300000, 2048, 4}, Case{41, 16, 131073, 63, 4}, Case{39, 32, 70001, 2048, 2},
          Case{6, 16, 5, 3, 2}, Case{5, 16, 9000, 2047, 2}}) {
      good = CheckUnions(c, MixedIds(c, seed + c.keys)) && good;
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
  const int repeats = options.quick ? 5 : 10;
  for (const auto& [heads, queries] : {std::pair{16, 4}, std::pair{32, 2}, std::pair{64, 1}}) {
    for (const int keys : {8192, 32768, 131072}) {
      if ((options.heads && heads != options.heads) || (options.keys && keys != options.keys))
        continue;
      for (const IdPattern pattern : {IdPattern::kRandom, IdPattern::kNear}) {
        if (keys == 8192 && pattern == IdPattern::kNear) continue;
        TimeForward(timer, {4096, heads, keys, 2048, queries}, pattern, gemm, repeats, report);
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
