// Indexer scores: a GEMM of keys against (query, head) columns whose epilogue is relu, weight, sum over heads.
//
// Roofline: a pair (t, s) costs 64 * 128 * 2 = 16384 FLOP: 4 (bf16) or 2 (fp8) clocks of an SM's tensor cores. Its
// epilogue is 64 maxima at 64 a clock and 64 FMAs at 128 a clock on another pipe: 1 clock when both overlap, so it
// must run beside the next tile's products. Output is 4 bytes a pair: 0.3 TB/s at 1200 TF. Shared memory feeds
// wgmma at 128 B a clock: with N = 256 columns one 64-key tile reads A 8 KB + B 32 KB (fp8) per 512 clocks, and its
// load writes 8 KB: 96 B a clock; with N = 128 it would be 96 + 16 to 32, at the limit.
//
// Tile: M = 64 keys, N = 256 = 4 queries x 64 heads (8 x 32), K = 128: one accumulator of 128 registers. A thread has
// the columns 2c, 2c + 1 of every group of 8 (c = lane % 4), so it keeps its 64 head weights in registers for as long
// as the queries stay, sums its columns privately and shares with 3 lanes only at the end: 6 shuffles for 8 sums.
//
// A block has 3 warpgroups and stays on its SM:
//   producer  one thread: the block's queries (2 stages of 256 rows, with their weights), then tile after tile of keys
//             (6 or 12 stages of 64 rows), by tensor copies with the 128-byte swizzle.
//   consumer  two warpgroups take alternate tiles: all products of a tile, then its epilogue while the other's
//   0 and 1   products run. A pair of named barriers passes the right to issue products back and forth, handed over
//             when all but the last product of a tile are done, so the tensor cores see neither a gap nor two tiles
//             that end together.
//
// Work: the list of all (query block, key tile) pairs inside the windows, query blocks outermost, is cut into equal
// runs, one for each block of the grid; a block counts tiles from the windows to find its run. So full, causal and
// packed windows are balanced to one tile, and no two blocks write the same element.
#include "kernels/ops/indexer_scores_cuda.h"

#include <cuda_bf16.h>

#include <algorithm>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/tensor_map.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/cuda/wgmma_fp8.cuh"

namespace baleen {
namespace {

constexpr int kHeadDim = 128;
constexpr int kColumns = 256;  // queries of a block x heads
constexpr int kTileKeys = 64;
constexpr int kQueryStages = 2;
constexpr int kThreads = 384;
constexpr int kTokenBarrier = 1;  // named barriers 1 and 2: the right of consumer 0, 1 to issue products

// When consumer i lets the other issue its products (kIssued, kLate), or whether they take turns at all.
enum class Handover { kNone, kIssued, kLate };
#ifndef BALEEN_INDEXER_HANDOVER
#define BALEEN_INDEXER_HANDOVER kLate
#endif
constexpr Handover kHandover = Handover::BALEEN_INDEXER_HANDOVER;

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
    int first_block, first_tile;
    int total;
  };
  static constexpr int kSharedBytes = static_cast<int>(sizeof(Shared)) + 1024;  // room to align
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
  const int end = args.key_end_T != nullptr ? min(args.num_keys, __ldg(args.key_end_T + row)) : args.num_keys;
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

// Finds this block's run of tiles: it starts `first_tile` tiles into query block `first_block`. Returns its length.
template <int kQueries, class Shared>
__device__ int FindRun(const Params& params, Shared& sh) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int per_thread = (params.num_query_blocks + kThreads - 1) / kThreads;
  const int from = min(params.num_query_blocks, static_cast<int>(threadIdx.x) * per_thread);
  const int to = min(params.num_query_blocks, from + per_thread);
  int sum = 0;
  for (int b = from; b < to; ++b) {
    const TileRange tiles = TilesOf<kQueries>(params.args, b);
    sum += tiles.end - tiles.begin;
  }
  int inclusive = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) sh.warp_sums[warp] = inclusive;
  __syncthreads();
  int before = inclusive - sum, total = 0;
  for (int w = 0; w < kThreads / 32; ++w) {
    if (w < warp) before += sh.warp_sums[w];
    total += sh.warp_sums[w];
  }
  const int run_begin = static_cast<int>(static_cast<int64_t>(total) * blockIdx.x / gridDim.x);
  const int run_end = static_cast<int>(static_cast<int64_t>(total) * (blockIdx.x + 1) / gridDim.x);
  if (before <= run_begin && run_begin < before + sum) {
    for (int b = from; b < to; ++b) {
      const TileRange tiles = TilesOf<kQueries>(params.args, b);
      const int count = tiles.end - tiles.begin;
      if (run_begin < before + count) {
        sh.first_block = b;
        sh.first_tile = run_begin - before;
        break;
      }
      before += count;
    }
  }
  __syncthreads();
  return run_end - run_begin;
}

// Walks a run: for each query block calls visit(block, first tile, number of tiles).
template <int kQueries, class Shared, class Visit>
__device__ __forceinline__ void ForEachBlock(const Params& params, const Shared& sh, int run, Visit visit) {
  int skip = sh.first_tile;
  for (int block = sh.first_block; run > 0; ++block) {
    const TileRange tiles = TilesOf<kQueries>(params.args, block);
    const int count = min(run, tiles.end - tiles.begin - skip);
    if (count > 0) visit(block, tiles.begin + skip, count);
    run -= max(count, 0);
    skip = 0;
  }
}

template <IndexerDtype kDtype, int kQueries>
__device__ void Produce(typename Layout<kDtype>::Shared& sh, const Params& params, const CUtensorMap& query_map,
                        const CUtensorMap& key_map, int run) {
  using L = Layout<kDtype>;
  constexpr int kRunElements = L::kFp8 ? 128 : 64;
  int key_stage = 0, key_phase = 1, ordinal = 0;
  ForEachBlock<kQueries>(params, sh, run, [&](int block, int first_tile, int count) {
    const int stage = ordinal % kQueryStages;
    cuda::BarrierWait(&sh.query_empty[stage], (ordinal / kQueryStages & 1) ^ 1);
    ++ordinal;
    const int heads = kColumns / kQueries;
    const int rows = min(kQueries, params.args.num_rows - block * kQueries);
    const uint32_t weight_bytes = rows * heads * sizeof(float);
    cuda::BarrierArriveExpect(&sh.query_full[stage], L::kQueryBytes + weight_bytes);
    for (int r = 0; r < L::kRuns; ++r) {
      cuda::TensorLoad(cuda::SharedAddress(sh.queries[stage]) + r * kColumns * 128, &query_map, r * kRunElements,
                       block * kColumns, &sh.query_full[stage]);
    }
    cuda::BulkLoad(cuda::SharedAddress(sh.weights[stage]), params.args.w_TI + static_cast<int64_t>(block) * kColumns,
                   weight_bytes, &sh.query_full[stage]);
    for (int i = 0; i < count; ++i) {
      cuda::BarrierWait(&sh.key_empty[key_stage], key_phase);
      cuda::BarrierArriveExpect(&sh.key_full[key_stage], L::kKeyBytes);
      for (int r = 0; r < L::kRuns; ++r) {
        cuda::TensorLoad(cuda::SharedAddress(sh.keys[key_stage]) + r * kTileKeys * 128, &key_map, r * kRunElements,
                         (first_tile + i) * kTileKeys, &sh.key_full[key_stage]);
      }
      if (++key_stage == L::kKeyStages) {
        key_stage = 0;
        key_phase ^= 1;
      }
    }
  });
}

// Products [from, to) of a tile: d (+)= keys x queries^T, 32 bytes of the reduction each.
template <IndexerDtype kDtype, int kFrom, int kTo>
__device__ __forceinline__ void Multiply(float (&d)[128], uint32_t keys, uint32_t queries) {
#pragma unroll
  for (int step = kFrom; step < kTo; ++step) {
    const int run = step / 4, offset = step % 4 * 32;
    const uint64_t a = cuda::DescriptorKMajor(keys + run * kTileKeys * 128 + offset);
    const uint64_t b = cuda::DescriptorKMajor(queries + run * kColumns * 128 + offset);
    if constexpr (kDtype == IndexerDtype::kE4m3) {
      cuda::WgmmaE4m3N256(d, a, b, step > 0);
    } else {
      cuda::WgmmaBf16<kColumns, false, false>::Shared(d, a, b, step > 0);
    }
  }
}

// sums[r][u] = sum over this thread's heads of w * relu(d), for row r of its two and query u.
template <int kQueries>
__device__ __forceinline__ void SumHeads(const float (&d)[128], const float (&w)[64], float (&sums)[2][kQueries]) {
  constexpr int kGroups = kColumns / 8 / kQueries;  // groups of 8 columns a query has
#pragma unroll
  for (int u = 0; u < kQueries; ++u) sums[0][u] = sums[1][u] = 0;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
#pragma unroll
    for (int u = 0; u < kQueries; ++u) {
      const int j = u * kGroups + g;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sums[0][u] = fmaf(w[2 * j + e], fmaxf(d[4 * j + e], 0.0f), sums[0][u]);
        sums[1][u] = fmaf(w[2 * j + e], fmaxf(d[4 * j + 2 + e], 0.0f), sums[1][u]);
      }
    }
  }
}

// Adds the sums of the 4 lanes that share a row; lane c = lane % 4 keeps queries c * kKept .. + kKept - 1.
template <int kQueries, int kKept>
__device__ __forceinline__ void ShareSums(float (&sums)[2][kQueries], float (&kept)[2][kKept]) {
  static_assert(kQueries == 4 * kKept);
  const bool high = threadIdx.x & 2, odd = threadIdx.x & 1;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float half[2 * kKept];
#pragma unroll
    for (int i = 0; i < 2 * kKept; ++i) {
      const float keep = high ? sums[r][2 * kKept + i] : sums[r][i];
      const float send = high ? sums[r][i] : sums[r][2 * kKept + i];
      half[i] = keep + __shfl_xor_sync(0xffffffffu, send, 2);
    }
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const float keep = odd ? half[kKept + i] : half[i];
      const float send = odd ? half[i] : half[kKept + i];
      kept[r][i] = keep + __shfl_xor_sync(0xffffffffu, send, 1);
    }
  }
}

template <IndexerDtype kDtype, int kQueries>
__device__ void Consume(typename Layout<kDtype>::Shared& sh, const Params& params, int consumer, int run) {
  using L = Layout<kDtype>;
  constexpr int kKept = kQueries / 4;
  const IndexerScoresArgs& args = params.args;
  const int lane = threadIdx.x & 31, column = lane & 3;
  const int key_in_tile = (threadIdx.x & 127) / 32 * 16 + lane / 4;  // and + 8

  int tile = 0, ordinal = 0;  // of this block's run
  ForEachBlock<kQueries>(params, sh, run, [&](int block, int first_tile, int count) {
    const int stage = ordinal % kQueryStages;
    cuda::BarrierWait(&sh.query_full[stage], ordinal / kQueryStages & 1);
    ++ordinal;
    float w[64];
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      const float2 pair = *reinterpret_cast<const float2*>(&sh.weights[stage][8 * j + 2 * column]);
      w[2 * j] = pair.x;
      w[2 * j + 1] = pair.y;
    }
    KeyRange window[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) window[i] = RowWindow(args, block * kQueries + column * kKept + i);

    const int tiles_end = tile + count;
    for (int own = tile + ((tile ^ consumer) & 1); own < tiles_end; own += 2) {
      const int key = (first_tile + own - tile) * kTileKeys + key_in_tile;
      float scale[2] = {1.0f, 1.0f};
      if constexpr (L::kFp8) {
        scale[0] = key < args.num_keys ? __ldg(args.k_scale_S + key) : 0.0f;
        scale[1] = key + 8 < args.num_keys ? __ldg(args.k_scale_S + key + 8) : 0.0f;
      }
      const int key_stage = own % L::kKeyStages;
      const uint32_t keys = cuda::SharedAddress(sh.keys[key_stage]);
      const uint32_t queries = cuda::SharedAddress(sh.queries[stage]);

      // Take the turn, issue this tile's products, and give the turn on.
      cuda::BarrierWait(&sh.key_full[key_stage], own / L::kKeyStages & 1);
      if (kHandover != Handover::kNone && own > 0) cuda::NamedSync(kTokenBarrier + consumer, 256);
      float d[128];
      cuda::WgmmaFence();
      Multiply<kDtype, 0, L::kSteps - 1>(d, keys, queries);
      cuda::WgmmaCommit();
      Multiply<kDtype, L::kSteps - 1, L::kSteps>(d, keys, queries);
      cuda::WgmmaCommit();
      if (kHandover == Handover::kLate) cuda::WgmmaWait<1>();
      if (kHandover != Handover::kNone && own + 1 < run) cuda::NamedArrive(kTokenBarrier + (consumer ^ 1), 256);
      cuda::WgmmaWait<0>();
      cuda::PinRegisters(d);
      if (lane == 0) cuda::BarrierArrive(&sh.key_empty[key_stage]);

      // Weighted sum over heads, then the window's mask.
      float sums[2][kQueries], kept[2][kKept];
      SumHeads<kQueries>(d, w, sums);
      ShareSums<kQueries, kKept>(sums, kept);
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int row = block * kQueries + column * kKept + i;
        float* out = args.scores_TS + row * args.score_stride;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const int s = key + 8 * r;
          if (row < args.num_rows && s < args.num_keys) {
            const bool inside = s >= window[i].begin && s < window[i].end;
            __stcs(out + s, inside ? kept[r][i] * scale[r] : -INFINITY);
          }
        }
      }
    }
    tile = tiles_end;
    __syncwarp();
    if (lane == 0) cuda::BarrierArrive(&sh.query_empty[stage]);
  });
}

template <IndexerDtype kDtype, int kQueries>
__global__ void __launch_bounds__(kThreads, 1)
    IndexerScoresKernel(const __grid_constant__ Params params, const __grid_constant__ CUtensorMap query_map,
                        const __grid_constant__ CUtensorMap key_map) {
  using L = Layout<kDtype>;
  extern __shared__ uint8_t raw_shared[];
  const uint32_t misaligned = cuda::SharedAddress(raw_shared) & 1023;
  auto& sh = *reinterpret_cast<typename L::Shared*>(raw_shared + (misaligned ? 1024 - misaligned : 0));

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
  const int run = FindRun<kQueries>(params, sh);  // ends with a barrier

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
cudaError_t Launch(const IndexerScoresArgs& args, const IndexerScoresPlan& plan, cudaStream_t stream) {
  using L = Layout<kDtype>;
  const CUtensorMapDataType type = L::kFp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const int element_bytes = L::kFp8 ? 1 : 2;
  CUtensorMap query_map, key_map;
  cudaError_t error = cuda::MakeTensorMap(&query_map, type, element_bytes, args.q_TIJ,
                                          static_cast<int64_t>(args.num_rows) * args.num_heads, L::kRowBytes, kColumns);
  if (error != cudaSuccess) return error;
  error = cuda::MakeTensorMap(&key_map, type, element_bytes, args.k_SJ, args.num_keys, L::kRowBytes, kTileKeys);
  if (error != cudaSuccess) return error;
  const auto kernel = IndexerScoresKernel<kDtype, kQueries>;
  error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  const Params params = {args, (args.num_rows + kQueries - 1) / kQueries};
  kernel<<<plan.num_blocks, plan.threads, plan.shared_bytes, stream>>>(params, query_map, key_map);
  return cudaGetLastError();
}

}  // namespace

IndexerScoresPlan PlanIndexerScores(IndexerDtype dtype, int num_rows, int num_keys, int num_heads, int num_sms) {
  IndexerScoresPlan plan;
  plan.rows_per_tile = kColumns / num_heads;
  plan.threads = kThreads;
  plan.shared_bytes = dtype == IndexerDtype::kE4m3 ? Layout<IndexerDtype::kE4m3>::kSharedBytes
                                                   : Layout<IndexerDtype::kBf16>::kSharedBytes;
  const int64_t query_blocks = (num_rows + plan.rows_per_tile - 1) / plan.rows_per_tile;
  const int64_t most_tiles = query_blocks * ((num_keys + kTileKeys - 1) / kTileKeys);
  plan.num_blocks = static_cast<int>(std::min<int64_t>(num_sms, most_tiles));
  return plan;
}

cudaError_t LaunchIndexerScores(IndexerDtype dtype, const IndexerScoresArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0 || args.num_keys == 0) return cudaSuccess;
  const bool fp8 = dtype == IndexerDtype::kE4m3;
  if (args.num_rows < 0 || args.num_keys < 0 || (args.num_heads != 64 && args.num_heads != 32) ||
      args.score_stride < args.num_keys || args.scores_TS == nullptr || (fp8 && args.k_scale_S == nullptr)) {
    return cudaErrorInvalidValue;
  }
  int device = 0, num_sms = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  error = cudaDeviceGetAttribute(&num_sms, cudaDevAttrMultiProcessorCount, device);
  if (error != cudaSuccess) return error;
  const IndexerScoresPlan plan = PlanIndexerScores(dtype, args.num_rows, args.num_keys, args.num_heads, num_sms);
  if (fp8) {
    return args.num_heads == 64 ? Launch<IndexerDtype::kE4m3, 4>(args, plan, stream)
                                : Launch<IndexerDtype::kE4m3, 8>(args, plan, stream);
  }
  return args.num_heads == 64 ? Launch<IndexerDtype::kBf16, 4>(args, plan, stream)
                              : Launch<IndexerDtype::kBf16, 8>(args, plan, stream);
}

}  // namespace baleen
