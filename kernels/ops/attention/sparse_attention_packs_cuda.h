// Packs of queries for sparse attention with few heads (16 or 32 on a rank of tensor parallelism).
//
// The matrix unit multiplies 64 rows at a time. A query of 16 heads fills a quarter of them, so
// neighbouring queries go together: 4 of 16 heads, or 2 of 32, are 64 rows that walk over the union
// of their lists, and a bit per (key, query) tells which scores count. A union is never longer than
// the lists behind each other, so a pack never multiplies more than its queries padded to 64 rows;
// with neighbours that share keys it multiplies much less (lists of 2048 from a pool of 3072: 3035
// keys for four queries instead of 8192, 2731 for two instead of 4096).
//
// Legend: T queries, K keys a list, I = ceil(T / n) packs of n queries (the last may have fewer),
// U = n K rounded up to 64s: the longest union.
#pragma once

#include <cstdint>

namespace baleen {

// An entry of a union: the key and who selected it. Bit 28 + j is set if the pack's query j did;
// entries without bits (0) fill the last 64.
inline constexpr int kPackedKeyBits = 28;
inline constexpr uint32_t kPackedKeyMask = (uint32_t{1} << kPackedKeyBits) - 1;
inline constexpr int kMostPackedQueries = 4;

// How many consecutive queries share the rows of the matrix unit: 4, 2 or 1 (no packs). By shapes
// alone, so that every run of a shape takes the same way. Fewer packs than twice the
// multiprocessors of a large GPU would leave some of them idle.
inline constexpr int kPackedRows = 64;
inline int SparseAttentionQueriesAPack(int64_t num_tokens, int64_t num_heads) {
  constexpr int64_t kFewestPacks = 264;
  for (int queries = kMostPackedQueries; queries > 1; queries /= 2) {
    if (queries * num_heads <= kPackedRows && num_tokens >= queries * kFewestPacks) return queries;
  }
  return 1;
}

struct SparseAttentionPacks {
  const int32_t* ids_TK = nullptr;  // distinct in a row, any order; -1 = none, anywhere
  uint32_t* entries_IU = nullptr;   // keys ascending; written up to the next 64 of each count
  int32_t* counts_I = nullptr;      // keys of each union
  int num_tokens = 0;               // T
  int num_keys = 0;                 // S, at most 2^28
  int num_selected = 0;             // K, at most 2048
  int queries = 0;                  // n: 2 or 4

  int NumPacks() const { return (num_tokens + queries - 1) / queries; }
  int Width() const { return (queries * num_selected + 63) / 64 * 64; }
};

// Fills entries and counts. Same lists, same bits.
void LaunchPackSelectedKeys(const SparseAttentionPacks& packs, void* stream);

}  // namespace baleen
