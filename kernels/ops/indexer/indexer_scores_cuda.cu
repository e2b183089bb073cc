// Indexer scores: a GEMM of keys with (query, head) columns; its epilogue is relu, weight, sum.
//
// Roofline: a pair (t, s) costs 64 * 128 * 2 = 16384 FLOP: 4 (bf16) or 2 (fp8) clocks of an SM's
// tensor cores. Its epilogue is 64 maxima at 64 a clock and 64 FMAs at 128 a clock on another
// pipe: 1 clock when both overlap, so it must run beside the next tile's products. Output is 4
// bytes a pair: 0.3 TB/s at 1200 TF. Shared memory feeds wgmma at 128 B a clock; a 64-key tile
// (fp8, 512 clocks) reads 2 x (8 + 16) KB and is written once, 8 KB: 112 B a clock at full rate.
//
// Tile: M = 64 keys, 256 columns = 4 queries x 64 heads (8 x 32), K = 128, as two halves of 128
// columns with an accumulator of 64 registers each. A thread has the columns 2c, 2c + 1 of every
// group of 8 (c = lane % 4), so it keeps its 64 head weights in registers for as long as the
// queries stay, sums its columns privately and shares with 3 lanes only at the end: 3 shuffles
// for 4 sums.
//
// A block has 3 warpgroups and stays on its SM:
//   producer    one thread: queries (2 stages of 256 rows, with their weights), then tile after
//               tile of keys (6 or 12 stages of 64 rows), by tensor copies with 128 B swizzle.
//   2 consumers take alternate tiles. While the products of one half run, the epilogue of the
//               other half is computed; then its accumulator is free for the next tile. So each
//               consumer always has products in flight. In fp8 the epilogue still sets the pace:
//               it shares the register file's ports with the running products.
//
// Work: the list of all (query block, key tile) pairs inside the windows, query blocks outermost,
// is cut into runs of equal cost, one for each block of the grid (cost: tiles, and a few tiles for
// each change of queries); a block counts tiles from the windows to find its run. So full, causal
// and packed windows are balanced, and no two blocks write the same element. Within its run a
// block goes through the keys in chunks of 16K, all its queries for each, so that all blocks read
// the same 4 MB of keys at about the same time and L2 holds them at any length.
#include <cuda_bf16.h>

#include <algorithm>
#include <climits>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/barrier_at.cuh"
#include "kernels/cuda/tensor_map.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/cuda/wgmma_fp8.cuh"
#include "kernels/ops/indexer/indexer_scores_cuda.h"
#include "kernels/ops/indexer/indexer_scores_epilogue.cuh"

namespace baleen {
namespace {

using namespace indexer_scores;  // NOLINT: the epilogue, in a file of its own

constexpr int kHeadDim = 128;
constexpr int kColumns = 256;  // queries of a block x heads
constexpr int kTileKeys = 64;
constexpr int kQueryStages = 2;
constexpr int kThreads = 384;
constexpr int kHalf = kColumns / 2;
constexpr int kChunkTiles = 256;  // keys that stay in L2 while all queries of a run pass over them
constexpr int kVisitCost = 4;     // a change of queries, in tiles: drain, weights, first products

template <IndexerDtype kDtype>
struct Layout {
  static constexpr bool kFp8 = kDtype == IndexerDtype::kE4m3;
  static constexpr int kRowBytes = kFp8 ? kHeadDim : 2 * kHeadDim;
  static constexpr int kRuns = kRowBytes / 128;  // 128-byte columns of swizzled atoms
  static constexpr int kKeyStages = kFp8 ? 12 : 6;
  static constexpr int kQueryBytes = kColumns * kRowBytes;
  static constexpr int kKeyBytes = kTileKeys * kRowBytes;
  static constexpr int kSteps = kRowBytes / 32;  // products of one tile

  // Everything a block shares; queries and keys first: swizzled atoms start at multiples of 1024.
  struct Shared {
    uint8_t queries[kQueryStages][kQueryBytes];
    uint8_t keys[kKeyStages][kKeyBytes];
    float weights[kQueryStages][kColumns];
    uint64_t query_full[kQueryStages], query_empty[kQueryStages];
    uint64_t key_full[kKeyStages], key_empty[kKeyStages];
    int warp_sums[kThreads / 32];
    int first_block, cost_before_first;  // where the run starts
    int first_chunk, last_chunk;         // of its keys
  };
  static constexpr int kSharedBytes = static_cast<int>(sizeof(Shared));
  static_assert(kSharedBytes <= 232448, "sm_90 gives a block 227 KiB");
};

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

__device__ __forceinline__ int VisitCosts(int tiles) {
  return kVisitCost * ((tiles + kChunkTiles - 1) / kChunkTiles);
}

// The part of a query block's tiles that lies in the run; `before` is the cost of all query blocks
// before it.
__device__ __forceinline__ TileRange TilesInRun(TileRange tiles, Run run, int before) {
  const int count = tiles.end - tiles.begin, first = before + VisitCosts(count);
  return {tiles.begin + min(count, max(0, run.begin - first)),
          tiles.begin + min(count, max(0, run.end - first))};
}

// Finds this block's run, where it starts and which chunks of keys it touches.
template <int kQueries, class Shared>
__device__ Run FindRun(const Params& params, Shared& sh) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int per_thread = (params.num_query_blocks + kThreads - 1) / kThreads;
  const int from = min(params.num_query_blocks, static_cast<int>(threadIdx.x) * per_thread);
  const int to = min(params.num_query_blocks, from + per_thread);
  int sum = 0;
  for (int b = from; b < to; ++b) {
    const TileRange tiles = TilesOf<kQueries>(params.args, b);
    sum += tiles.end - tiles.begin + VisitCosts(tiles.end - tiles.begin);
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
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += sh.warp_sums[w];
    total += sh.warp_sums[w];
  }
  const Run run = {static_cast<int>(static_cast<int64_t>(total) * blockIdx.x / gridDim.x),
                   static_cast<int>(static_cast<int64_t>(total) * (blockIdx.x + 1) / gridDim.x)};
  if (before < run.end && run.begin < before + sum) {
    for (int b = from; b < to; ++b) {
      const TileRange tiles = TilesOf<kQueries>(params.args, b),
                      own = TilesInRun(tiles, run, before);
      if (own.begin < own.end) {
        atomicMin(&sh.first_chunk, own.begin / kChunkTiles);
        atomicMax(&sh.last_chunk, (own.end - 1) / kChunkTiles);
      }
      const int cost = tiles.end - tiles.begin + VisitCosts(tiles.end - tiles.begin);
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
template <int kQueries, class Shared, class Visit>
__device__ __forceinline__ void ForEachVisit(const Params& params, const Shared& sh, Run run,
                                             Visit visit) {
  for (int chunk = sh.first_chunk; chunk <= sh.last_chunk; ++chunk) {
    int before = sh.cost_before_first;
    for (int block = sh.first_block; before < run.end; ++block) {
      const TileRange tiles = TilesOf<kQueries>(params.args, block),
                      own = TilesInRun(tiles, run, before);
      const int first = max(own.begin, chunk * kChunkTiles),
                end = min(own.end, (chunk + 1) * kChunkTiles);
      if (first < end) visit(block, first, end - first);
      before += tiles.end - tiles.begin + VisitCosts(tiles.end - tiles.begin);
    }
  }
}

template <IndexerDtype kDtype, int kQueries>
__device__ void Produce(typename Layout<kDtype>::Shared& sh, const Params& params,
                        const CUtensorMap& query_map, const CUtensorMap& key_map, Run run) {
  using L = Layout<kDtype>;
  constexpr int kRunElements = L::kFp8 ? 128 : 64;
  int key_stage = 0, key_phase = 1, ordinal = 0;
  ForEachVisit<kQueries>(params, sh, run, [&](int block, int first_tile, int count) {
    const int stage = ordinal % kQueryStages;
    cuda::BarrierWait(&sh.query_empty[stage], (ordinal / kQueryStages & 1) ^ 1);
    ++ordinal;
    const int heads = kColumns / kQueries;
    const int rows = min(kQueries, params.args.num_rows - block * kQueries);
    const uint32_t weight_bytes = rows * heads * sizeof(float);
    cuda::BarrierArriveExpect(&sh.query_full[stage], L::kQueryBytes + weight_bytes);
    for (int r = 0; r < L::kRuns; ++r) {
      cuda::TensorLoad(cuda::SharedAddress(sh.queries[stage]) + r * kColumns * 128, &query_map,
                       r * kRunElements, block * kColumns, &sh.query_full[stage]);
    }
    cuda::BulkLoad(cuda::SharedAddress(sh.weights[stage]),
                   params.args.w_TI + static_cast<int64_t>(block) * kColumns, weight_bytes,
                   &sh.query_full[stage]);
    for (int i = 0; i < count; ++i) {
      cuda::BarrierWait(&sh.key_empty[key_stage], key_phase);
      cuda::BarrierArriveExpect(&sh.key_full[key_stage], L::kKeyBytes);
      for (int r = 0; r < L::kRuns; ++r) {
        cuda::TensorLoad(cuda::SharedAddress(sh.keys[key_stage]) + r * kTileKeys * 128, &key_map,
                         r * kRunElements, (first_tile + i) * kTileKeys, &sh.key_full[key_stage]);
      }
      if (++key_stage == L::kKeyStages) {
        key_stage = 0;
        key_phase ^= 1;
      }
    }
  });
}

// Issues d = keys x (half of the queries)^T.
template <IndexerDtype kDtype>
__device__ __forceinline__ void Multiply(float (&d)[64], uint32_t keys, uint32_t queries) {
  // Opaque: else the descriptors of all steps are kept in registers across the loop, and others
  // spill.
  asm volatile("" : "+r"(keys), "+r"(queries));
  const uint64_t first_a = cuda::DescriptorKMajor(keys), first_b = cuda::DescriptorKMajor(queries);
  cuda::WgmmaFence();
#pragma unroll
  for (int step = 0; step < Layout<kDtype>::kSteps; ++step) {
    const int run = step / 4, offset = step % 4 * 32;
    const uint64_t a = cuda::Advance(first_a, run * kTileKeys * 128 + offset);
    const uint64_t b = cuda::Advance(first_b, run * kColumns * 128 + offset);
    if constexpr (Layout<kDtype>::kFp8) {
      cuda::WgmmaE4m3N128(d, a, b, step > 0);
    } else {
      cuda::WgmmaBf16<kHalf, false, false>::Shared(d, a, b, step > 0);
    }
  }
  cuda::WgmmaCommit();
}

template <IndexerDtype kDtype, int kQueries>
__device__ void Consume(typename Layout<kDtype>::Shared& sh, const Params& params, int consumer,
                        Run run) {
  using L = Layout<kDtype>;
  constexpr int kHalfQueries = kQueries / 2;
  using Epilogue = HeadSums<L::kFp8, kHalfQueries>;
  constexpr int kKept = Epilogue::kKept;
  const IndexerScoresArgs& args = params.args;
  const int lane = threadIdx.x & 31;
  const int key_in_tile = (threadIdx.x & 127) / 32 * 16 + lane / 4 + Epilogue::KeyOffset();
  const uint32_t all_keys = cuda::SharedAddress(sh.keys);
  const uint32_t key_full = cuda::SharedAddress(sh.key_full),
                 key_empty = cuda::SharedAddress(sh.key_empty);

  int tile = 0, ordinal = 0;  // of this block's run
  ForEachVisit<kQueries>(params, sh, run, [&](int block, int first_tile, int count) {
    const int stage = ordinal % kQueryStages;
    cuda::BarrierWait(&sh.query_full[stage], ordinal / kQueryStages & 1);
    ++ordinal;
    const int tiles_end = tile + count;
    int own = tile + ((tile ^ consumer) & 1);
    if (own < tiles_end) {
      Epilogue epilogue;
      epilogue.LoadWeights(sh.weights[stage]);
      OutputRow rows[2][kKept];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
          const int query = Epilogue::Query(i), row = block * kQueries + h * kHalfQueries + query;
          const KeyRange window = RowWindow(args, row);
          rows[h][i] = {row < args.num_rows ? args.scores_TS + row * args.score_stride : nullptr,
                        window.begin, window.end};
        }
      }
      const uint32_t queries = cuda::SharedAddress(sh.queries[stage]);
      const auto key_of = [&](int own_tile) {
        return (first_tile + own_tile - tile) * kTileKeys + key_in_tile;
      };
      const auto scale_of = [&](int key) {
        return L::kFp8 && key < args.num_keys ? __ldg(args.k_scale_S + key) : 1.0f;
      };

      float d0[64], d1[64], kept[kKept];
      int key = key_of(own);
      float scale = scale_of(key);
      const auto wait_for_keys = [&] {
        cuda::BarrierWaitAt(key_full + 8 * (own % L::kKeyStages), own / L::kKeyStages & 1);
        return all_keys + own % L::kKeyStages * L::kKeyBytes;
      };
      // Sums half 0 of the current tile while half 1 is multiplied, then gives its keys back.
      const auto finish_half_0 = [&] {
        cuda::WgmmaWait<1>();
        cuda::PinRegisters(d0);
        epilogue.template Sum<0>(d0, kept);
        Store<kKept>(kept, rows[0], scale, key, args.num_keys);
        cuda::WgmmaWait<0>();
        cuda::PinRegisters(d1);
        if (lane == 0) cuda::BarrierArriveAt(key_empty + 8 * (own % L::kKeyStages));
      };
      uint32_t keys = wait_for_keys();
      Multiply<kDtype>(d0, keys, queries);
      Multiply<kDtype>(d1, keys, queries + kHalf * 128);
      finish_half_0();
      while (own + 2 < tiles_end) {
        own += 2;
        keys = wait_for_keys();
        Multiply<kDtype>(d0, keys, queries);
        // Half 1 of the tile before, while half 0 of this one is multiplied.
        epilogue.template Sum<1>(d1, kept);
        Store<kKept>(kept, rows[1], scale, key, args.num_keys);
        Multiply<kDtype>(d1, keys, queries + kHalf * 128);
        key = key_of(own);
        scale = scale_of(key);
        finish_half_0();
      }
      epilogue.template Sum<1>(d1, kept);
      Store<kKept>(kept, rows[1], scale, key, args.num_keys);
    }
    tile = tiles_end;
    __syncwarp();
    if (lane == 0) cuda::BarrierArrive(&sh.query_empty[stage]);
  });
}

template <IndexerDtype kDtype, int kQueries>
__global__ void __launch_bounds__(kThreads, 1)
    IndexerScoresKernel(const __grid_constant__ Params params,
                        const __grid_constant__ CUtensorMap query_map,
                        const __grid_constant__ CUtensorMap key_map) {
  using L = Layout<kDtype>;
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& sh = *reinterpret_cast<typename L::Shared*>(raw_shared);

  if (threadIdx.x == 0) {
    cuda::PrefetchTensorMap(&query_map);
    cuda::PrefetchTensorMap(&key_map);
    for (int i = 0; i < kQueryStages; ++i) {
      cuda::BarrierInit(&sh.query_full[i], 1);
      cuda::BarrierInit(&sh.query_empty[i], 8);  // one lane of each consumer warp
    }
    for (int i = 0; i < L::kKeyStages; ++i) {
      cuda::BarrierInit(&sh.key_full[i], 1);
      cuda::BarrierInit(&sh.key_empty[i], 4);  // the warps of the one consumer that has the tile
    }
    cuda::FenceBarrierInit();
  }
  const Run run = FindRun<kQueries>(params, sh);  // ends with a barrier

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    cuda::LowerRegisters<24>();
    if (threadIdx.x == 256) Produce<kDtype, kQueries>(sh, params, query_map, key_map, run);
  } else {
    cuda::RaiseRegisters<240>();
    Consume<kDtype, kQueries>(sh, params, warpgroup, run);
  }
}

template <IndexerDtype kDtype, int kQueries>
cudaError_t Launch(const IndexerScoresArgs& args, const IndexerScoresPlan& plan,
                   cudaStream_t stream) {
  using L = Layout<kDtype>;
  const CUtensorMapDataType type =
      L::kFp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int element_bytes = L::kFp8 ? 1 : 2;
  CUtensorMap query_map, key_map;
  cudaError_t error = cuda::MakeTensorMap(&query_map, type, element_bytes, args.q_TIJ,
                                          static_cast<int64_t>(args.num_rows) * args.num_heads,
                                          L::kRowBytes, kColumns);
  if (error != cudaSuccess) return error;
  error = cuda::MakeTensorMap(&key_map, type, element_bytes, args.k_SJ, args.num_keys, L::kRowBytes,
                              kTileKeys);
  if (error != cudaSuccess) return error;
  const auto kernel = IndexerScoresKernel<kDtype, kQueries>;
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  const Params params = {args, (args.num_rows + kQueries - 1) / kQueries};
  kernel<<<plan.num_blocks, plan.threads, plan.shared_bytes, stream>>>(params, query_map, key_map);
  return cudaGetLastError();
}

}  // namespace

IndexerScoresPlan PlanIndexerScores(IndexerDtype dtype, int num_rows, int num_keys, int num_heads,
                                    int num_sms) {
  IndexerScoresPlan plan;
  plan.rows_per_tile = kColumns / num_heads;
  plan.threads = kThreads;
  plan.shared_bytes = dtype == IndexerDtype::kBf16 ? Layout<IndexerDtype::kBf16>::kSharedBytes
                                                   : Layout<IndexerDtype::kE4m3>::kSharedBytes;
  const int64_t query_blocks = (num_rows + plan.rows_per_tile - 1) / plan.rows_per_tile;
  const int64_t most_tiles = query_blocks * ((num_keys + kTileKeys - 1) / kTileKeys);
  plan.num_blocks = static_cast<int>(std::min<int64_t>(num_sms, most_tiles));
  return plan;
}

cudaError_t LaunchIndexerScores(IndexerDtype dtype, const IndexerScoresArgs& args,
                                cudaStream_t stream) {
  if (args.num_rows == 0 || args.num_keys == 0) return cudaSuccess;
  const bool fp8 = dtype != IndexerDtype::kBf16;
  if (args.num_rows < 0 || args.num_keys < 0 || (args.num_heads != 64 && args.num_heads != 32) ||
      args.score_stride < args.num_keys || args.scores_TS == nullptr ||
      (fp8 && args.k_scale_S == nullptr)) {
    return cudaErrorInvalidValue;
  }
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const IndexerScoresPlan plan =
      PlanIndexerScores(dtype, args.num_rows, args.num_keys, args.num_heads, num_sms);
  if (fp8) {
    return args.num_heads == 64 ? Launch<IndexerDtype::kE4m3, 4>(args, plan, stream)
                                : Launch<IndexerDtype::kE4m3, 8>(args, plan, stream);
  }
  return args.num_heads == 64 ? Launch<IndexerDtype::kBf16, 4>(args, plan, stream)
                              : Launch<IndexerDtype::kBf16, 8>(args, plan, stream);
}

}  // namespace baleen
