// How the forward of sparse attention deals its work to thread blocks.
//
// A work is 64 rows of q with one list of keys: a tile of a query's heads, or a pack of queries.
// The thread blocks, one a multiprocessor, take works in turns. The last turn seldom has one for
// each: 4096 queries of 64 heads on 132 multiprocessors leave 4, which would take as long as the
// 132 of the turn before. So the works of the last turn are divided by blocks of keys: part p of n
// takes blocks p, p + n, ..., and a second kernel adds the parts.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace baleen {

struct SparseAttentionForwardPlan {
  int whole = 0;    // works that one thread block does
  int divided = 0;  // works behind them
  int parts = 1;    // of each of those
  int turns = 0;    // whole works and parts
};

inline int SparseAttentionForwardWorks(int num_tokens, int num_heads, int queries_a_pack) {
  if (queries_a_pack > 1) return (num_tokens + queries_a_pack - 1) / queries_a_pack;
  return num_tokens * ((num_heads + 63) / 64);
}

// `num_selected` as in SparseAttentionForwardArgs. By shapes alone, so that the same run has the
// same bits on every card: 132 are the multiprocessors of an H100. Up to 16 parts, so that their
// 128 KB each stay a small matter; none in calls of less than one turn, whose rows therefore have
// the same bits in every such call.
inline SparseAttentionForwardPlan PlanSparseAttentionForward(int num_work, int num_selected) {
  constexpr int kMultiprocessors = 132, kMostParts = 16;
  const int rest = num_work % kMultiprocessors;
  const int parts = rest == 0 || rest == num_work
                        ? 1
                        : std::min({kMultiprocessors / rest, kMostParts, num_selected / 64});
  if (parts < 2) return {num_work, 0, 1, num_work};
  return {num_work - rest, rest, parts, num_work - rest + rest * parts};
}

// The fp32 numbers that parts leave: o (64 x 512) and lse of each.
inline int64_t SparseAttentionForwardPartFloats(const SparseAttentionForwardPlan& plan) {
  return int64_t{plan.divided} * plan.parts * (64 * 512 + 64);
}

}  // namespace baleen
