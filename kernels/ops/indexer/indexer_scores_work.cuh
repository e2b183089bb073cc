// Who computes which scores: blocks, runs and visits. See indexer_scores_cuda.cu.
//
// A visit is one block of queries beside some tiles of keys in a row. What all windows ask for, in
// a row, is cut into runs of equal cost, one for each block of threads.
#pragma once

#include <cuda_runtime.h>

#include <climits>
#include <cstdint>

#include "kernels/ops/indexer/indexer_scores_cuda.h"

namespace baleen::indexer_scores {

constexpr int kTileKeys = 64;

struct Params {
  IndexerScoresArgs args;
  int num_query_blocks;
};

// Key tiles [begin, end) that the windows of one block of queries touch.
struct TileRange {
  int begin, end;
};

struct KeyRange {
  int begin, end;
};

__device__ __forceinline__ KeyRange RowWindow(const IndexerScoresArgs& args, int row) {
  if (row >= args.num_rows) return {0, 0};
  const int begin = args.key_begin_T != nullptr ? max(0, __ldg(args.key_begin_T + row)) : 0;
  const int end =
      args.key_end_T != nullptr ? min(args.num_keys, __ldg(args.key_end_T + row)) : args.num_keys;
  return {begin, end};
}

template <int kQueries>
__device__ __forceinline__ TileRange TilesOf(const IndexerScoresArgs& args, int block) {
  int begin = args.num_keys, end = 0;
#pragma unroll
  for (int u = 0; u < kQueries; ++u) {
    const KeyRange window = RowWindow(args, block * kQueries + u);
    if (window.begin < window.end) {
      begin = min(begin, window.begin);
      end = max(end, window.end);
    }
  }
  if (begin >= end) return {0, 0};
  return {begin / kTileKeys, (end + kTileKeys - 1) / kTileKeys};
}

// A run of work: costs [begin, end) of all blocks' costs in a row. In a query block's cost its
// changes of queries come first, then its tiles.
struct Run {
  int begin, end;
};

template <class L>
__device__ __forceinline__ int VisitCosts(int tiles) {
  return L::kVisitCost * ((tiles + L::kChunkTiles - 1) / L::kChunkTiles);
}

// The part of a query block's tiles that lies in the run; `before` is the cost of all query blocks
// before it.
template <class L>
__device__ __forceinline__ TileRange TilesInRun(TileRange tiles, Run run, int before) {
  const int count = tiles.end - tiles.begin, first = before + VisitCosts<L>(count);
  return {tiles.begin + min(count, max(0, run.begin - first)),
          tiles.begin + min(count, max(0, run.end - first))};
}

// Finds this block's run, where it starts and which chunks of keys it touches. By all threads; ends
// with a barrier.
template <int kQueries, class L, class Shared>
__device__ Run FindRun(const Params& params, Shared& sh) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int per_thread = (params.num_query_blocks + L::kThreads - 1) / L::kThreads;
  const int from = min(params.num_query_blocks, static_cast<int>(threadIdx.x) * per_thread);
  const int to = min(params.num_query_blocks, from + per_thread);
  int sum = 0;
  for (int b = from; b < to; ++b) {
    const TileRange tiles = TilesOf<kQueries>(params.args, b);
    sum += tiles.end - tiles.begin + VisitCosts<L>(tiles.end - tiles.begin);
  }
  int inclusive = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) sh.warp_sums[warp] = inclusive;
  if (threadIdx.x == 0) {
    sh.first_chunk = INT_MAX;
    sh.last_chunk = -1;
  }
  __syncthreads();
  int before = inclusive - sum, total = 0;
  for (int w = 0; w < L::kThreads / 32; ++w) {
    if (w < warp) before += sh.warp_sums[w];
    total += sh.warp_sums[w];
  }
  const Run run = {static_cast<int>(static_cast<int64_t>(total) * blockIdx.x / gridDim.x),
                   static_cast<int>(static_cast<int64_t>(total) * (blockIdx.x + 1) / gridDim.x)};
  if (before < run.end && run.begin < before + sum) {
    for (int b = from; b < to; ++b) {
      const TileRange tiles = TilesOf<kQueries>(params.args, b),
                      own = TilesInRun<L>(tiles, run, before);
      if (own.begin < own.end) {
        atomicMin(&sh.first_chunk, own.begin / L::kChunkTiles);
        atomicMax(&sh.last_chunk, (own.end - 1) / L::kChunkTiles);
      }
      const int cost = tiles.end - tiles.begin + VisitCosts<L>(tiles.end - tiles.begin);
      if (before <= run.begin && run.begin < before + cost) {
        sh.first_block = b;
        sh.cost_before_first = before;
      }
      before += cost;
    }
  }
  __syncthreads();
  return run;
}

// Walks a run: for each chunk of keys and each query block calls visit(block, first tile, number of
// tiles > 0).
template <int kQueries, class L, class Shared, class Visit>
__device__ __forceinline__ void ForEachVisit(const Params& params, const Shared& sh, Run run,
                                             Visit visit) {
  for (int chunk = sh.first_chunk; chunk <= sh.last_chunk; ++chunk) {
    int before = sh.cost_before_first;
    for (int block = sh.first_block; before < run.end; ++block) {
      const TileRange tiles = TilesOf<kQueries>(params.args, block),
                      own = TilesInRun<L>(tiles, run, before);
      const int first = max(own.begin, chunk * L::kChunkTiles),
                end = min(own.end, (chunk + 1) * L::kChunkTiles);
      if (first < end) visit(block, first, end - first);
      before += tiles.end - tiles.begin + VisitCosts<L>(tiles.end - tiles.begin);
    }
  }
}

}  // namespace baleen::indexer_scores
