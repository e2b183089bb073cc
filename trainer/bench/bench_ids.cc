#include "trainer/bench/bench_ids.h"

#include <algorithm>
#include <numeric>
#include <thread>

#include "kernels/core/check.h"
#include "kernels/core/random.h"

namespace baleen {
namespace {

constexpr int64_t kNearRows = 32;

// SplitMix64: one multiplication chain a number; Philox would take most of a second a gigabyte.
class FastRandom {
 public:
  explicit FastRandom(uint64_t seed) : state_(seed) {}
  // Uniform in [0, below), below < 2^32.
  uint64_t Below(uint64_t below) { return ((Next() >> 32) * below) >> 32; }

 private:
  uint64_t Next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint64_t state_;
};

// `count` of `from`, each subset equally likely, in their order (Knuth's algorithm S).
template <typename Output>
void Draw(FastRandom& random, const std::vector<int32_t>& from, int64_t count, Output to) {
  auto left = static_cast<int64_t>(from.size());
  CHECK_GE(left, count);
  for (const int32_t key : from) {
    if (static_cast<int64_t>(random.Below(static_cast<uint64_t>(left--))) >= count) continue;
    *to++ = key;
    if (--count == 0) return;
  }
}

std::vector<int32_t> Range(int64_t begin, int64_t end) {
  std::vector<int32_t> keys(end - begin);
  std::iota(keys.begin(), keys.end(), static_cast<int32_t>(begin));
  return keys;
}

// The keys that the rows of one group of neighbours draw from.
std::vector<int32_t> PoolOf(int64_t group, int64_t begin, int64_t end, int64_t topk,
                            uint64_t seed) {
  const int64_t size = std::min(end - begin, topk + topk / 2);
  FastRandom random(seed ^ (static_cast<uint64_t>(group) << 20));
  std::vector<int32_t> pool(size);
  Draw(random, Range(begin, end), size, pool.begin());
  return pool;
}

}  // namespace

absl::string_view Name(BenchIds ids) {
  return ids == BenchIds::kIndexer ? "indexer" : ids == BenchIds::kNear ? "near" : "random";
}

absl::StatusOr<BenchIds> ParseBenchIds(absl::string_view text) {
  for (const BenchIds ids : {BenchIds::kIndexer, BenchIds::kNear, BenchIds::kRandom}) {
    if (text == Name(ids)) return ids;
  }
  return ConfigError("baleen bench: --ids ", text, ": known are indexer, near and random");
}

std::vector<int32_t> MakeBenchIds(BenchIds kind, const std::vector<int32_t>& rows,
                                  int64_t seq_length, int64_t topk, int64_t seed, bool causal) {
  CHECK(kind != BenchIds::kIndexer);
  const auto count = static_cast<int64_t>(rows.size());
  std::vector<int32_t> ids(count * topk, -1);
  const uint64_t key = NameStream("bench ids") ^ static_cast<uint64_t>(seed);
  const auto fill = [&](int64_t first, int64_t step) {
    std::vector<int32_t> pool;
    int64_t pool_group = -1;
    // Blocks of neighbours go to the threads in turn: later rows have more keys to draw from.
    for (int64_t block = first; block * kNearRows < count; block += step) {
      for (int64_t r = block * kNearRows; r < std::min(count, (block + 1) * kNearRows); ++r) {
        const int64_t row = rows[r], begin = row / seq_length * seq_length;
        const int64_t end = causal ? row + 1 : begin + seq_length;
        int32_t* const out = ids.data() + r * topk;
        if (end - begin <= topk) {
          std::iota(out, out + (end - begin), static_cast<int32_t>(begin));
          continue;
        }
        FastRandom random(key + static_cast<uint64_t>(row) * 0xD1B54A32D192ED03u);
        if (kind == BenchIds::kRandom) {
          Draw(random, Range(begin, end), topk, out);
          continue;
        }
        // Keys that every row of the group may see; in the group where rows first have a choice,
        // each row's own.
        const int64_t group = row / kNearRows;
        const int64_t seen = causal ? std::max(group * kNearRows + 1, begin + 1) : end;
        if (seen - begin < topk) {
          Draw(random, Range(begin, end), topk, out);
          continue;
        }
        if (group != pool_group) {
          pool = PoolOf(group, begin, seen, topk, key);
          pool_group = group;
        }
        Draw(random, pool, topk, out);
      }
    }
  };
  const int64_t threads = std::max(1u, std::min(64u, std::thread::hardware_concurrency()));
  std::vector<std::thread> workers;
  for (int64_t t = 1; t < threads; ++t) workers.emplace_back(fill, t, threads);
  fill(0, threads);
  for (std::thread& worker : workers) worker.join();
  return ids;
}

}  // namespace baleen
