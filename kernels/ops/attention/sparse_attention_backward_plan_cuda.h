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

// Byte offsets in the workspace, each a multiple of 256 (W words of 32 queries, C chunks of a
// span).
struct SparseAttentionBackwardLayout {
  size_t masks_WS = 0, ranks_WS = 0;    // int32
  size_t starts_CS = 0, counts_CS = 0;  // int32
  size_t counters_C = 0;                // three of int32, and one a block of a chunk's sums
  size_t rows = 0;                      // the ring: rows of C = 576
  size_t mask_bytes = 0, counter_bytes = 0;
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

inline SparseAttentionBackwardLayout LayOutSparseAttentionBackward(
    const SparseAttentionBackwardShape& shape, const SparseAttentionBackwardPlan& plan) {
  SparseAttentionBackwardLayout layout;
  const auto take = [&](size_t bytes) {
    const size_t at = layout.bytes;
    layout.bytes += (bytes + 255) / 256 * 256;
    return at;
  };
  const size_t keys = shape.num_keys, chunks = plan.span / plan.chunk;
  layout.mask_bytes = size_t(plan.span / 32) * keys * 4;
  layout.counter_bytes = (3 * chunks + plan.chunk / kFewestQueriesASum) * 4;
  layout.masks_WS = take(layout.mask_bytes);
  layout.ranks_WS = take(layout.mask_bytes);
  layout.starts_CS = take(chunks * keys * 4);
  layout.counts_CS = take(chunks * keys * 4);
  layout.counters_C = take(layout.counter_bytes);
  layout.rows = take(SparseAttentionBackwardQueryBytes(shape) * plan.chunk);
  return layout;
}

inline size_t SparseAttentionBackwardWorkspace(const SparseAttentionBackwardShape& shape,
                                               const SparseAttentionBackwardPlan& plan) {
  return LayOutSparseAttentionBackward(shape, plan).bytes;
}

}  // namespace baleen
