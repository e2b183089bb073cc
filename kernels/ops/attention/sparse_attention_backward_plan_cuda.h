// Backward of sparse attention on tensor cores: how many queries go in a chunk and a launch, and
// how the workspace is divided. Plain host code, so that a plan of a run, made without a GPU,
// counts the bytes that the run takes.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace baleen {

struct SparseAttentionBackwardShape {
  int num_tokens = 0;    // T
  int num_keys = 0;      // S
  int num_heads = 0;     // 1..128, padded to tiles of 64
  int num_selected = 0;  // K, a multiple of 64, at most 2048
};

// Chunks whose rows of dkv lie in memory at a time.
inline constexpr int kSparseAttentionBackwardRing = 3;

// A thread block adds up the rows of at least so many queries.
inline constexpr int kFewestQueriesASum = 8;

// How many queries' rows of dkv lie in one sorted buffer, and how many queries go in one launch.
// The bits of dkv depend on it, and on nothing else that may change between runs.
struct SparseAttentionBackwardPlan {
  int chunk = 0;  // a multiple of 32
  int span = 0;   // a multiple of chunk
};

// The same for packs of queries (sparse_attention_packs_cuda.h), which look like queries of 64
// heads with a longer list. How many rows they make is known on the device only, from the unions
// of their lists: there the chunk is chosen, the largest whose rows find room, or none.
struct SparseAttentionBackwardPacksPlan {
  static constexpr int kChoices = 6, kSpanStep = 768;
  int queries = 1;                                      // of a pack; 1 = none
  int chunks[kChoices] = {384, 256, 192, 128, 96, 64};  // of packs; each divides kSpanStep
  SparseAttentionBackwardShape shape;
  int span = 0;
  int ring_rows = 0;  // that the ring holds
  int packs_a_sum = 0, lag = 0;
  int most_percent = 0;  // blocks of keys in a hundred of single queries' up to which packs pay

  int LargestChunk() const { return chunks[0]; }
  int SmallestChunk() const { return chunks[kChoices - 1]; }
};

// Byte offsets in the workspace, each a multiple of 256 (W words of 32 queries, C chunks of a
// span).
struct SparseAttentionBackwardLayout {
  size_t masks_WS = 0, ranks_WS = 0;    // int32
  size_t starts_CS = 0, counts_CS = 0;  // int32
  size_t counters_C = 0;                // three of int32, and one a block of a chunk's sums
  size_t rows = 0;                      // the ring: rows of C = 576
  size_t counter_bytes = 0;
  size_t bytes = 0;  // of all
};

inline int SparseAttentionHeadTiles(const SparseAttentionBackwardShape& shape) {
  return (shape.num_heads + 63) / 64;
}
// A row of dkv in the ring: packed to less than bf16 where one tile of heads makes it and memory
// limits (sparse_scatter_row_cuda.h).
inline constexpr int kScatterRowBytesBf16 = 1152, kScatterRowBytesShort = 896;
// Bytes of the rows that one query adds to the ring.
inline size_t SparseAttentionBackwardQueryBytes(const SparseAttentionBackwardShape& shape) {
  const size_t row =
      SparseAttentionHeadTiles(shape) == 1 ? kScatterRowBytesShort : kScatterRowBytesBf16;
  return kSparseAttentionBackwardRing * row * shape.num_selected;
}

// Chunks as large as a workspace of about `budget_bytes` allows, up to the size from which on they
// gain nothing (at least 32 queries, 0.2 GB).
inline SparseAttentionBackwardPlan PlanSparseAttentionBackward(
    const SparseAttentionBackwardShape& shape, size_t budget_bytes) {
  // Each chunk reads and writes dkv once, which tells where memory limits: 64 heads, or many keys.
  // Else the sums of the last chunk, which nothing hides, cost more (measured, 288 against 512).
  constexpr int kStep = 32, kMostSpan = 8192;
  const int most_chunk =
      SparseAttentionHeadTiles(shape) == 2 && shape.num_keys <= 32768 ? 288 : 1024;
  // More than all queries would only be memory.
  const int all = std::max(1, (shape.num_tokens + kStep - 1) / kStep);
  // The index of a span (masks, ranks; starts and counts) takes up to a fifth, the rows the rest.
  const size_t step_bytes = SparseAttentionBackwardQueryBytes(shape) * kStep;
  const int chunk =
      kStep * static_cast<int>(std::clamp<size_t>(budget_bytes / 5 * 4 / step_bytes, 1,
                                                  std::min(most_chunk / kStep, all)));
  const size_t index_bytes = std::max<size_t>(1, size_t(shape.num_keys) * (chunk / 32 * 8 + 8));
  const int most = (std::min(shape.num_tokens, kMostSpan) + chunk - 1) / chunk;
  const size_t chunks = std::clamp<size_t>(budget_bytes / 5 / index_bytes, 1, std::max(most, 1));
  return {chunk, chunk * static_cast<int>(chunks)};
}

namespace internal {
inline SparseAttentionBackwardLayout LayOut(size_t keys, size_t words, size_t chunks, size_t sums,
                                            size_t row_bytes) {
  SparseAttentionBackwardLayout layout;
  const auto take = [&](size_t bytes) {
    const size_t at = layout.bytes;
    layout.bytes += (bytes + 255) / 256 * 256;
    return at;
  };
  layout.counter_bytes = (3 * chunks + sums) * 4;
  layout.masks_WS = take(words * keys * 4);
  layout.ranks_WS = take(words * keys * 4);
  layout.starts_CS = take(chunks * keys * 4);
  layout.counts_CS = take(chunks * keys * 4);
  layout.counters_C = take(layout.counter_bytes);
  layout.rows = take(row_bytes);
  return layout;
}
}  // namespace internal

inline SparseAttentionBackwardLayout LayOutSparseAttentionBackward(
    const SparseAttentionBackwardShape& shape, const SparseAttentionBackwardPlan& plan) {
  return internal::LayOut(shape.num_keys, plan.span / 32, plan.span / plan.chunk,
                          plan.chunk / kFewestQueriesASum,
                          SparseAttentionBackwardQueryBytes(shape) * plan.chunk);
}
inline SparseAttentionBackwardLayout LayOutSparseAttentionBackward(
    const SparseAttentionBackwardPacksPlan& plan) {
  return internal::LayOut(plan.shape.num_keys, plan.span / 32, plan.span / plan.SmallestChunk(),
                          plan.LargestChunk() / plan.packs_a_sum,
                          size_t(plan.ring_rows) * kScatterRowBytesShort);
}

// Packs with as many rows in their ring as single queries have, which are what runs where packs are
// not chosen. Not more bytes than those take or `budget_bytes` are.
inline SparseAttentionBackwardPacksPlan PlanSparseAttentionBackwardPacks(
    const SparseAttentionBackwardShape& shape, const SparseAttentionBackwardPlan& single,
    int queries_a_pack, size_t budget_bytes) {
  SparseAttentionBackwardPacksPlan plan;
  if (queries_a_pack == 1) return plan;
  plan.queries = queries_a_pack;
  plan.shape = {(shape.num_tokens + queries_a_pack - 1) / queries_a_pack, shape.num_keys, 64,
                shape.num_selected * queries_a_pack};
  // The sums of the last chunk run alone: four chunks at least.
  const int most = std::max(plan.SmallestChunk(), plan.shape.num_tokens / 4);
  for (int i = plan.kChoices - 1; i-- > 0;) {
    if (plan.chunks[i] > most) plan.chunks[i] = plan.chunks[i + 1];
  }
  // The same keys of the next chunk wait for a sum, so it must be shorter than a chunk's packs.
  plan.packs_a_sum = 2;
  plan.lag = 160;          // a wave of blocks and some
  plan.most_percent = 90;  // at 87 they gain 6 % of the time, at 97 they lose 4
  const SparseAttentionBackwardLayout layout = LayOutSparseAttentionBackward(shape, single);
  plan.ring_rows = static_cast<int>((layout.bytes - layout.rows) / kScatterRowBytesShort);
  const auto steps = [&](int packs) { return (packs + plan.kSpanStep - 1) / plan.kSpanStep; };
  constexpr int kMostQueries = 8192;  // of a launch
  for (int n = steps(std::min(plan.shape.num_tokens, kMostQueries / queries_a_pack)); n > 0; --n) {
    plan.span = n * plan.kSpanStep;
    const size_t bytes = LayOutSparseAttentionBackward(plan).bytes;
    if (bytes <= std::max(layout.bytes, budget_bytes)) return plan;
  }
  return {};  // so many keys that the index is most of the memory
}

// Ints of the device's choice: the chunk (0 = single queries), rows of a slot of the ring, slots;
// behind them, for choosing, rows of each 32 packs.
inline int SparseAttentionBackwardChoiceInts(const SparseAttentionBackwardPacksPlan& plan) {
  return 3 + (plan.shape.num_tokens + 31) / 32;
}

// Of single queries and, in the same memory, of packs.
inline size_t SparseAttentionBackwardWorkspace(const SparseAttentionBackwardShape& shape,
                                               const SparseAttentionBackwardPlan& plan,
                                               const SparseAttentionBackwardPacksPlan& packs = {}) {
  const size_t single = LayOutSparseAttentionBackward(shape, plan).bytes;
  if (packs.queries == 1) return single;
  return std::max(single, LayOutSparseAttentionBackward(packs).bytes);
}

}  // namespace baleen
