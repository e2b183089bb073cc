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
// A block stays on its SM. Its warpgroups:
//   producer    one thread: queries (2 stages of 256 rows, with weights, scales and windows), then
//               tile after tile of keys (6 or 12 stages of 64 rows), by tensor copies with 128 B
//               swizzle. It finds the work, and tells the others.
//   consumers   take tiles in turn.
//     bf16: 2. While the products of one half run, the epilogue of the other half is computed; then
//           its accumulator is free for the next tile. So each always has products in flight.
//     e4m3: 3, with one accumulator: products, then their epilogue (ConsumeInTurn). The epilogues
//           set the pace: the tensor cores are busy 5 clocks of 8.
//
// Work: the list of all (query block, key tile) pairs inside the windows, query blocks outermost,
// is cut into runs of equal cost, one for each block of the grid (cost: tiles, and a few tiles for
// each change of queries); a block counts tiles from the windows to find its run. So full, causal
// and packed windows are balanced, and no two blocks write the same element. Within its run a
// block goes through the keys in chunks of 16K, all its queries for each, so that all blocks read
// the same 4 MB of keys at about the same time and L2 holds them at any length.
#include <cuda_bf16.h>

#include <algorithm>

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
#include "kernels/ops/indexer/indexer_scores_work.cuh"

namespace baleen {
namespace {

using namespace indexer_scores;  // NOLINT: the parts in files of their own

constexpr int kHeadDim = 128;
constexpr int kColumns = 256;  // queries of a block x heads
constexpr int kQueryStages = 2;
constexpr int kHalf = kColumns / 2;

// What the producer tells the consumers of a visit; count 0: there are no more.
struct Visit {
  int block, first_tile, count;
  KeyRange windows[8];  // of the block's rows
};

template <IndexerDtype kDtype, int kQueries>
struct Layout {
  static constexpr bool kFp8 = kDtype == IndexerDtype::kE4m3;
  static constexpr bool kInTurn = kFp8;  // see ConsumeInTurn
  static constexpr int kConsumers = kInTurn ? 3 : 2;
  static constexpr int kThreads = 128 * (kConsumers + 1);
  static constexpr int kConsumerRegisters = kInTurn ? 160 : 240;
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
    float scales[kQueryStages][kFp8 ? kColumns : 4];  // of the queries' heads, e4m3 only
    uint64_t query_full[kQueryStages], query_empty[kQueryStages];
    uint64_t key_full[kKeyStages], key_empty[kKeyStages];
    int warp_sums[kThreads / 32];
    Visit visits[kQueryStages];
    int first_block, cost_before_first;  // where the run starts
    int first_chunk, last_chunk;         // of its keys
  };
  static constexpr int kSharedBytes = static_cast<int>(sizeof(Shared));
  static_assert(kSharedBytes <= 232448, "sm_90 gives a block 227 KiB");
};

template <IndexerDtype kDtype, int kQueries>
__device__ void Produce(typename Layout<kDtype, kQueries>::Shared& sh, const Params& params,
                        const CUtensorMap& query_map, const CUtensorMap& key_map, Run run) {
  using L = Layout<kDtype, kQueries>;
  constexpr int kRunElements = L::kFp8 ? 128 : 64;
  int key_stage = 0, key_phase = 1, ordinal = 0;
  ForEachVisit<kQueries>(params, sh, run, [&](int block, int first_tile, int count) {
    const int stage = ordinal % kQueryStages;
    cuda::BarrierWait(&sh.query_empty[stage], (ordinal / kQueryStages & 1) ^ 1);
    ++ordinal;
    Visit& visit = sh.visits[stage];
    visit.block = block;
    visit.first_tile = first_tile;
    visit.count = count;
    for (int u = 0; u < kQueries; ++u)
      visit.windows[u] = RowWindow(params.args, block * kQueries + u);
    const int heads = kColumns / kQueries;
    const int rows = min(kQueries, params.args.num_rows - block * kQueries);
    const uint32_t weight_bytes = rows * heads * sizeof(float);
    const bool scaled = L::kFp8 && params.args.q_scale_TI != nullptr;
    cuda::BarrierArriveExpect(&sh.query_full[stage],
                              L::kQueryBytes + (scaled ? 2 : 1) * weight_bytes);
    for (int r = 0; r < L::kRuns; ++r) {
      cuda::TensorLoad(cuda::SharedAddress(sh.queries[stage]) + r * kColumns * 128, &query_map,
                       r * kRunElements, block * kColumns, &sh.query_full[stage]);
    }
    cuda::BulkLoad(cuda::SharedAddress(sh.weights[stage]),
                   params.args.w_TI + static_cast<int64_t>(block) * kColumns, weight_bytes,
                   &sh.query_full[stage]);
    if (scaled) {
      cuda::BulkLoad(cuda::SharedAddress(sh.scales[stage]),
                     params.args.q_scale_TI + static_cast<int64_t>(block) * kColumns, weight_bytes,
                     &sh.query_full[stage]);
    }
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
  const int stage = ordinal % kQueryStages;
  cuda::BarrierWait(&sh.query_empty[stage], (ordinal / kQueryStages & 1) ^ 1);
  sh.visits[stage].count = 0;
  cuda::BarrierArrive(&sh.query_full[stage]);
}

// Issues d = keys x (half of the queries)^T.
template <class L>
__device__ __forceinline__ void Multiply(float (&d)[64], uint32_t keys, uint32_t queries) {
  if constexpr (L::kInTurn) {
    // Into uniform registers, so that the descriptors of the steps are computed once for a warp.
    keys = __reduce_or_sync(kAllLanes, keys);
    queries = __reduce_or_sync(kAllLanes, queries);
  } else {
    // Opaque: else the descriptors of all steps are kept in registers across the loop, and others
    // spill.
    asm volatile("" : "+r"(keys), "+r"(queries));
  }
  const uint64_t first_a = cuda::DescriptorKMajor(keys), first_b = cuda::DescriptorKMajor(queries);
  cuda::WgmmaFence();
#pragma unroll
  for (int step = 0; step < L::kSteps; ++step) {
    const int run = step / 4, offset = step % 4 * 32;
    const uint64_t a = cuda::Advance(first_a, run * kTileKeys * 128 + offset);
    const uint64_t b = cuda::Advance(first_b, run * kColumns * 128 + offset);
    if constexpr (L::kFp8) {
      cuda::WgmmaE4m3N128(d, a, b, step > 0);
    } else {
      cuda::WgmmaBf16<kHalf, false, false>::Shared(d, a, b, step > 0);
    }
  }
  cuda::WgmmaCommit();
}

// Where a thread's sums of each half of a block of queries go.
template <int kQueries, int kKept>
__device__ __forceinline__ void FindRows(const IndexerScoresArgs& args, const Visit& visit,
                                         OutputRow (&rows)[2][kKept]) {
  constexpr int kHalfQueries = kQueries / 2;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int query = h * kHalfQueries + HeadSums<false, kHalfQueries>::Query(i),
                row = visit.block * kQueries + query;
      rows[h][i] = {row < args.num_rows ? args.scores_TS + row * args.score_stride : nullptr,
                    visit.windows[query].begin, visit.windows[query].end};
    }
  }
}

// Two consumers (bf16): each always has products in flight.
template <IndexerDtype kDtype, int kQueries>
__device__ void Consume(typename Layout<kDtype, kQueries>::Shared& sh, const Params& params,
                        int consumer) {
  using L = Layout<kDtype, kQueries>;
  using Epilogue = HeadSums<L::kFp8, kQueries / 2>;
  constexpr int kKept = Epilogue::kKept;
  const IndexerScoresArgs& args = params.args;
  const int lane = threadIdx.x & 31;
  const int key_in_tile = (threadIdx.x & 127) / 32 * 16 + lane / 4 + Epilogue::KeyOffset();
  const uint32_t all_keys = cuda::SharedAddress(sh.keys);
  const uint32_t key_full = cuda::SharedAddress(sh.key_full),
                 key_empty = cuda::SharedAddress(sh.key_empty);

  int tile = 0;  // of this block's run
  for (int ordinal = 0;; ++ordinal) {
    const int stage = ordinal % kQueryStages;
    cuda::BarrierWait(&sh.query_full[stage], ordinal / kQueryStages & 1);
    const Visit& visit = sh.visits[stage];
    if (visit.count == 0) break;
    const int first_tile = visit.first_tile, tiles_end = tile + visit.count;
    int own = tile + ((tile ^ consumer) & 1);
    if (own < tiles_end) {
      Epilogue epilogue;
      epilogue.LoadWeights(sh.weights[stage], nullptr);
      OutputRow rows[2][kKept];
      FindRows<kQueries, kKept>(args, visit, rows);
      const uint32_t queries = cuda::SharedAddress(sh.queries[stage]);
      const auto key_of = [&](int own_tile) {
        return (first_tile + own_tile - tile) * kTileKeys + key_in_tile;
      };

      float d0[64], d1[64], kept[kKept];
      int key = key_of(own);
      const auto wait_for_keys = [&] {
        cuda::BarrierWaitAt(key_full + 8 * (own % L::kKeyStages), own / L::kKeyStages & 1);
        return all_keys + own % L::kKeyStages * L::kKeyBytes;
      };
      // Sums half 0 of the current tile while half 1 is multiplied, then gives its keys back.
      const auto finish_half_0 = [&] {
        cuda::WgmmaWait<1>();
        cuda::PinRegisters(d0);
        epilogue.template Sum<0>(d0, kept);
        Store<kKept>(kept, rows[0], 1.0f, key, args.num_keys);
        cuda::WgmmaWait<0>();
        cuda::PinRegisters(d1);
        if (lane == 0) cuda::BarrierArriveAt(key_empty + 8 * (own % L::kKeyStages));
      };
      uint32_t keys = wait_for_keys();
      Multiply<L>(d0, keys, queries);
      Multiply<L>(d1, keys, queries + kHalf * 128);
      finish_half_0();
      while (own + 2 < tiles_end) {
        own += 2;
        keys = wait_for_keys();
        Multiply<L>(d0, keys, queries);
        // Half 1 of the tile before, while half 0 of this one is multiplied.
        epilogue.template Sum<1>(d1, kept);
        Store<kKept>(kept, rows[1], 1.0f, key, args.num_keys);
        Multiply<L>(d1, keys, queries + kHalf * 128);
        key = key_of(own);
        finish_half_0();
      }
      epilogue.template Sum<1>(d1, kept);
      Store<kKept>(kept, rows[1], 1.0f, key, args.num_keys);
    }
    tile = tiles_end;
    __syncwarp();
    if (lane == 0) cuda::BarrierArrive(&sh.query_empty[stage]);
  }
}

// Three consumers, each with one accumulator: products, then their sums. A warp is held up where it
// issues products while others run, and where it sums beside them (the register file); with three
// there is one more to go on meanwhile. In e4m3, where products are short, that is worth more than
// a consumer's own overlap.
template <IndexerDtype kDtype, int kQueries>
__device__ void ConsumeInTurn(typename Layout<kDtype, kQueries>::Shared& sh, const Params& params,
                              int consumer) {
  using L = Layout<kDtype, kQueries>;
  using Epilogue = HeadSums<L::kFp8, kQueries / 2>;
  constexpr int kKept = Epilogue::kKept;
  static_assert(L::kKeyStages % L::kConsumers == 0);
  const IndexerScoresArgs& args = params.args;
  const int lane = threadIdx.x & 31;
  const int key_in_tile = (threadIdx.x & 127) / 32 * 16 + lane / 4 + Epilogue::KeyOffset();
  const uint32_t all_keys = cuda::SharedAddress(sh.keys);
  const uint32_t key_full = cuda::SharedAddress(sh.key_full),
                 key_empty = cuda::SharedAddress(sh.key_empty);

  int tile = 0;                                             // of this block's run
  int own = consumer, key_stage = consumer, key_phase = 0;  // the next tile of this consumer
  for (int ordinal = 0;; ++ordinal) {
    const int stage = ordinal % kQueryStages;
    cuda::BarrierWait(&sh.query_full[stage], ordinal / kQueryStages & 1);
    const Visit& visit = sh.visits[stage];
    if (visit.count == 0) break;
    const int first_tile = visit.first_tile, tiles_end = tile + visit.count;
    if (own < tiles_end) {
      Epilogue epilogue;
      epilogue.LoadWeights(sh.weights[stage],
                           args.q_scale_TI != nullptr ? sh.scales[stage] : nullptr);
      OutputRow rows[2][kKept];
      FindRows<kQueries, kKept>(args, visit, rows);
      const uint32_t queries = cuda::SharedAddress(sh.queries[stage]);
      int key = (first_tile + own - tile) * kTileKeys + key_in_tile;
      float d[64], kept[kKept];
      do {
        cuda::BarrierWaitAt(key_full + 8 * key_stage, key_phase);
        const uint32_t keys = all_keys + key_stage * L::kKeyBytes;
        Multiply<L>(d, keys, queries);
        const float scale = key < args.num_keys ? __ldg(args.k_scale_S + key) : 1.0f;
        cuda::WgmmaWait<0>();
        cuda::PinRegisters(d);
        epilogue.template Sum<0>(d, kept);
        Store<kKept>(kept, rows[0], scale, key, args.num_keys);
        Multiply<L>(d, keys, queries + kHalf * 128);
        cuda::WgmmaWait<0>();
        cuda::PinRegisters(d);
        if (lane == 0) cuda::BarrierArriveAt(key_empty + 8 * key_stage);
        epilogue.template Sum<1>(d, kept);
        Store<kKept>(kept, rows[1], scale, key, args.num_keys);
        own += L::kConsumers;
        key += L::kConsumers * kTileKeys;
        key_stage += L::kConsumers;
        if (key_stage >= L::kKeyStages) {
          key_stage -= L::kKeyStages;
          key_phase ^= 1;
        }
      } while (own < tiles_end);
    }
    tile = tiles_end;
    __syncwarp();
    if (lane == 0) cuda::BarrierArrive(&sh.query_empty[stage]);
  }
}

template <IndexerDtype kDtype, int kQueries>
__global__ void __launch_bounds__((Layout<kDtype, kQueries>::kThreads), 1)
    IndexerScoresKernel(const __grid_constant__ Params params,
                        const __grid_constant__ CUtensorMap query_map,
                        const __grid_constant__ CUtensorMap key_map) {
  using L = Layout<kDtype, kQueries>;
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  auto& sh = *reinterpret_cast<typename L::Shared*>(raw_shared);

  if (threadIdx.x == 0) {
    cuda::PrefetchTensorMap(&query_map);
    cuda::PrefetchTensorMap(&key_map);
    for (int i = 0; i < kQueryStages; ++i) {
      cuda::BarrierInit(&sh.query_full[i], 1);
      cuda::BarrierInit(&sh.query_empty[i], 4 * L::kConsumers);  // one lane of each consumer warp
    }
    for (int i = 0; i < L::kKeyStages; ++i) {
      cuda::BarrierInit(&sh.key_full[i], 1);
      cuda::BarrierInit(&sh.key_empty[i], 4);  // the warps of the one consumer that has the tile
    }
    cuda::FenceBarrierInit();
  }
  const Run run = FindRun<kQueries, L::kThreads>(params, sh);  // ends with a barrier

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == L::kConsumers) {
    cuda::LowerRegisters<24>();
    if (threadIdx.x % 128 == 0) Produce<kDtype, kQueries>(sh, params, query_map, key_map, run);
  } else {
    cuda::RaiseRegisters<L::kConsumerRegisters>();
    if constexpr (L::kInTurn) {
      ConsumeInTurn<kDtype, kQueries>(sh, params, warpgroup);
    } else {
      Consume<kDtype, kQueries>(sh, params, warpgroup);
    }
  }
}

template <IndexerDtype kDtype, int kQueries>
cudaError_t Launch(const IndexerScoresArgs& args, const IndexerScoresPlan& plan,
                   cudaStream_t stream) {
  using L = Layout<kDtype, kQueries>;
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
  const auto set = [&](auto layout) {
    plan.threads = decltype(layout)::kThreads;
    plan.shared_bytes = decltype(layout)::kSharedBytes;
  };
  if (dtype == IndexerDtype::kBf16) {
    num_heads == 64 ? set(Layout<IndexerDtype::kBf16, 4>{}) : set(Layout<IndexerDtype::kBf16, 8>{});
  } else {
    num_heads == 64 ? set(Layout<IndexerDtype::kE4m3, 4>{}) : set(Layout<IndexerDtype::kE4m3, 8>{});
  }
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
