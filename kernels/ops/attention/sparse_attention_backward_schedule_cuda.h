// The order of work in one launch of the sparse attention backward: which thread block makes the
// gradients of which query, and which adds up the rows that earlier ones stored.
//
// Rows of dkv are stored chunk by chunk of queries into a ring of kRing buffers sorted by key.
// After each group of queries_a_sum queries one item adds up its share of the keys of an earlier
// chunk, so that the sum's memory traffic runs beside the arithmetic. Blocks start in the order of
// their index, and every item waits for earlier items only:
//   query of chunk c  for the sums of chunk c - kRing, whose buffer it writes
//   sum of chunk c    for all queries of chunk c and for the sums of chunk c - 1
// The sums of a chunk begin `lag` queries after its last one, when those have finished anyway.
#pragma once

#include <cuda_runtime.h>

#include "kernels/ops/attention/sparse_attention_backward_plan_cuda.h"

namespace baleen {

struct SparseBackwardItem {
  bool is_sum;
  int index;  // of the query, or of the sum: chunk index / sums_a_chunk
};

struct SparseBackwardSchedule {
  static constexpr int kRing = kSparseAttentionBackwardRing;
  int num_queries = 0;
  int chunk = 0;  // queries, a multiple of queries_a_sum
  int queries_a_sum = 0;
  int lag = 0;  // of single queries at most chunk

  __host__ __device__ int SumsAChunk() const { return chunk / queries_a_sum; }
  __host__ __device__ int NumChunks() const { return (num_queries + chunk - 1) / chunk; }
  __host__ __device__ int QueriesOfChunk(int c) const {
    const int left = num_queries - c * chunk;
    return left < chunk ? left : chunk;
  }
  __host__ __device__ int NumItems() const { return num_queries + NumChunks() * SumsAChunk(); }

  __host__ __device__ SparseBackwardItem Item(int i) const {
    // Queries alone; groups of one sum and its queries; the queries that fill no group; sums alone.
    const int alone = chunk + lag < num_queries ? chunk + lag : num_queries;
    if (i < alone) return {false, i};
    i -= alone;
    const int groups = (num_queries - alone) / queries_a_sum, group = queries_a_sum + 1;
    if (i < groups * group) {
      const int g = i / group, place = i % group;
      if (place == 0) return {true, g};
      return {false, alone + g * queries_a_sum + place - 1};
    }
    i -= groups * group;
    const int rest = (num_queries - alone) % queries_a_sum;
    if (i < rest) return {false, alone + groups * queries_a_sum + i};
    return {true, groups + i - rest};
  }
};

// The rows of a chunk of packs, as many as their unions have, lie in slots of one size, as large as
// the largest chunk: chunk c in slot c % slots, once the sums of chunk c - slots are done. How many
// slots there must be, so that those sums come before in the order of work.
__host__ __device__ constexpr int FewestSlotsOfPacks(int chunk, int lag) {
  return 2 + (lag + chunk - 1) / chunk;
}

}  // namespace baleen
