// Selected keys for a bench in place of the indexer's: what sparse attention costs depends on how
// many keys neighbouring rows share, and random weights select like no trained indexer.
//
//   near    as a trained indexer selects: 32 neighbouring rows draw from one pool of 1.5 x top-k
//   random  every row draws by itself from all its keys
// A row with no more than top-k keys has them all. Ids are ascending, -1 behind them.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/strings/string_view.h"
#include "kernels/core/status.h"

namespace baleen {

enum class BenchIds : uint8_t { kIndexer, kNear, kRandom };
absl::string_view Name(BenchIds ids);
absl::StatusOr<BenchIds> ParseBenchIds(absl::string_view text);

// Keys [rows x topk] of `rows` (numbers in a microbatch of sequences of seq_length); kNear or
// kRandom. By all threads of the host.
// Not causal: every row draws from all keys of its sequence, as published figures of sparse
// attention have it.
std::vector<int32_t> MakeBenchIds(BenchIds kind, const std::vector<int32_t>& rows,
                                  int64_t seq_length, int64_t topk, int64_t seed,
                                  bool causal = true);

}  // namespace baleen
