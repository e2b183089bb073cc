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
//   producers   four warps, one thread of each (indexer_scores_producer.cuh): queries (2 stages of
//               256 rows, with weights, scales and windows) a visit ahead, and tile after tile of
//               keys (6 or 12 stages of 64 rows), by tensor copies with 128 B swizzle. They find
//               the work, and tell the others.
//   consumers   take tiles in turn.
//     bf16: 2. While the products of one half run, the epilogue of the other half is computed; then
//           its accumulator is free for the next tile. So each always has products in flight.
//     e4m3: 3, with one accumulator: products, then their epilogue (ConsumeInTurn). Issued
//           instructions and the products' use of the register file set the pace.
//
// Work: the list of all (query block, key tile) pairs inside the windows, query blocks outermost,
// is cut into runs of equal cost, one for each block of the grid (cost: tiles, and a few tiles for
// each change of queries); a block counts tiles from the windows to find its run. So full, causal
// and packed windows are balanced, and no two blocks write the same element. Within its run a
// block goes through the keys in chunks of 4 MB, all its queries for each, so that all blocks read
// the same ones at about the same time and L2 holds them at any length.
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
#include "kernels/ops/indexer/indexer_scores_producer.cuh"
#include "kernels/ops/indexer/indexer_scores_work.cuh"

namespace baleen {
namespace {

using namespace indexer_scores;  // NOLINT: the parts in files of their own

// Issues d = keys x (half of the queries)^T, from the lower words of their first descriptors.
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
  const uint64_t upper = cuda::DescriptorKMajor(0) >> 32 << 32;
  const uint64_t first_a = upper | keys, first_b = upper | queries;
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

__device__ __forceinline__ uint32_t LowerWord(const void* shared) {
  return static_cast<uint32_t>(cuda::DescriptorKMajor(cuda::SharedAddress(shared)));
}

template <int kQueries>
__device__ __forceinline__ OutputRow RowOf(const IndexerScoresArgs& args, const Visit& visit,
                                           int query) {
  const KeyRange window = visit.windows[query];  // empty past the last row
  OutputRow row = {args.scores_TS + (visit.block * kQueries + query) * args.score_stride,
                   window.begin, max(0, window.end - window.begin)};
  asm volatile("" : "+l"(row.scores));  // else computed again for every store
  return row;
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
  const uint32_t all_keys = LowerWord(sh.keys);
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
      epilogue.LoadWeights(sh.weights[stage]);
      OutputRow rows[2][kKept];
#pragma unroll
      for (int i = 0; i < 2 * kKept; ++i) {
        const int query = i / kKept * (kQueries / 2) + Epilogue::Query(i % kKept);
        rows[i / kKept][i % kKept] = RowOf<kQueries>(args, visit, query);
      }
      const uint32_t queries = LowerWord(sh.queries[stage]);
      const auto key_of = [&](int own_tile) {
        return (first_tile + own_tile - tile) * kTileKeys + key_in_tile;
      };

      float d0[64], d1[64], kept[kKept];
      int key = key_of(own);
      const auto wait_for_keys = [&] {
        cuda::BarrierWaitAt(key_full + 8 * (own % L::kKeyStages), own / L::kKeyStages & 1);
        return all_keys + own % L::kKeyStages * (L::kKeyBytes >> 4);
      };
      // Sums half 0 of the current tile while half 1 is multiplied, then gives its keys back.
      const auto finish_half_0 = [&] {
        cuda::WgmmaWait<1>();
        cuda::PinRegisters(d0);
        epilogue.template SumJoined<0>(d0, kept);
        Store<kKept>(kept, rows[0], 1.0f, key);
        cuda::WgmmaWait<0>();
        cuda::PinRegisters(d1);
        if (lane == 0) cuda::BarrierArriveAt(key_empty + 8 * (own % L::kKeyStages));
      };
      uint32_t keys = wait_for_keys();
      Multiply<L>(d0, keys, queries);
      Multiply<L>(d1, keys, queries + (kHalf * 128 >> 4));
      finish_half_0();
      while (own + 2 < tiles_end) {
        own += 2;
        keys = wait_for_keys();
        Multiply<L>(d0, keys, queries);
        // Half 1 of the tile before, while half 0 of this one is multiplied.
        epilogue.template SumJoined<1>(d1, kept);
        Store<kKept>(kept, rows[1], 1.0f, key);
        Multiply<L>(d1, keys, queries + (kHalf * 128 >> 4));
        key = key_of(own);
        finish_half_0();
      }
      epilogue.template SumJoined<1>(d1, kept);
      Store<kKept>(kept, rows[1], 1.0f, key);
    }
    tile = tiles_end;
    __syncwarp();
    if (lane == 0) cuda::BarrierArrive(&sh.query_empty[stage]);
  }
}

// Three consumers (e4m3), each with one accumulator: products, then their sums. What a scheduler
// issues and what the tensor cores read and write of the register file take its time one after the
// other, so the loop is written for few instructions: counters and addresses in uniform registers,
// weights prepared by others, no store outside the windows.
template <IndexerDtype kDtype, int kQueries>
__device__ void ConsumeInTurn(typename Layout<kDtype, kQueries>::Shared& sh, const Params& params,
                              int consumer_of_thread) {
  using L = Layout<kDtype, kQueries>;
  using Epilogue = HeadSums<L::kFp8, kQueries / 2>;
  constexpr int kHalfQueries = kQueries / 2, kConsumers = L::kConsumers;
  const IndexerScoresArgs& args = params.args;
  const int lane = threadIdx.x & 31;
  const int key_in_tile = (threadIdx.x & 127) / 32 * 16 + lane / 4 + Epilogue::KeyOffset();
  // The same in all lanes, and known to be.
  const int consumer = __reduce_or_sync(kAllLanes, consumer_of_thread);

  // Its tiles are consumer, consumer + 3...: turns 0, 1... Every fourth has the same stage.
  constexpr int kOwnStages = L::kKeyStages / kConsumers;
  static_assert(kOwnStages * kConsumers == L::kKeyStages);
  const uint32_t own_keys = __reduce_or_sync(kAllLanes, LowerWord(sh.keys[consumer]));
  const uint32_t all_queries = __reduce_or_sync(kAllLanes, LowerWord(sh.queries));
  uint32_t key_full = cuda::SharedAddress(&sh.key_full[consumer]);
  asm volatile("" : "+r"(key_full));                          // else computed again for every tile
  const uint32_t key_empty = key_full + sizeof(sh.key_full);  // follows it in Shared
  const auto keys_of = [&](unsigned turn) {
    return own_keys + turn % kOwnStages * (kConsumers * L::kKeyBytes >> 4);
  };
  const auto barrier_of = [](uint32_t first, unsigned turn) {
    return first + turn % kOwnStages * (kConsumers * sizeof(uint64_t));
  };

  int tile = 0;  // of this block's run
  unsigned turn = 0;
  for (int ordinal = 0;; ++ordinal) {
    const int stage = ordinal % kQueryStages, phase = ordinal / kQueryStages & 1;
    cuda::BarrierWait(&sh.query_full[stage], phase);
    const Visit& visit = sh.visits[stage];
    if (visit.count == 0) break;
    const int first_tile = visit.first_tile, tiles_end = tile + visit.count;
    unsigned turns_end = (tiles_end - consumer + kConsumers - 1) / kConsumers;
    asm volatile("" : "+r"(turns_end));
    if (turn < turns_end) {
      uint32_t queries = all_queries + stage * (L::kQueryBytes >> 4);
      asm volatile("" : "+r"(queries));
      const int first = first_tile + consumer + static_cast<int>(turn) * kConsumers - tile;
      int key = first * kTileKeys + key_in_tile;
      float d[64], sums[2][2][kHalfQueries], kept[kHalfQueries];
      cuda::BarrierWait(&sh.ready_full[stage], phase);
      Epilogue epilogue;
      epilogue.LoadReady(sh.ready[stage][lane % 4]);
      OutputRow rows[kHalfQueries];
#pragma unroll
      for (int u = 0; u < kHalfQueries; ++u) {
        rows[u] = RowOf<kQueries>(args, visit, threadIdx.x % 4 / 2 * kHalfQueries + u);
      }
      do {
        cuda::BarrierWaitAt(barrier_of(key_full, turn), turn / kOwnStages & 1);
        Multiply<L>(d, keys_of(turn), queries);
        const float scale = __ldg(args.k_scale_S + min(key, args.num_keys - 1));
        cuda::WgmmaWait<0>();
        cuda::PinRegisters(d);
        epilogue.template Sum<0>(d, sums[0]);
        Multiply<L>(d, keys_of(turn), queries + (kHalf * 128 >> 4));
        cuda::WgmmaWait<0>();
        cuda::PinRegisters(d);
        if (lane == 0) cuda::BarrierArriveAt(barrier_of(key_empty, turn));
        epilogue.template Sum<1>(d, sums[1]);
        Epilogue::JoinHalves(sums, kept);
        Store<kHalfQueries>(kept, rows, scale, key);
        key += kConsumers * kTileKeys;
      } while (++turn < turns_end);
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
      cuda::BarrierInit(&sh.ready_full[i], 32);
    }
    for (int i = 0; i < L::kKeyStages; ++i) {
      cuda::BarrierInit(&sh.key_full[i], 1);
      cuda::BarrierInit(&sh.key_empty[i], 4);  // the warps of the one consumer that has the tile
    }
    cuda::FenceBarrierInit();
  }
  const Run run = FindRun<kQueries, L>(params, sh);  // ends with a barrier

  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == L::kConsumers) {
    cuda::LowerRegisters<L::kProducerRegisters>();
    const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
    if (warp == 0) {
      ProduceVisits<kDtype, kQueries>(sh, params, query_map, run, lane);
    } else if (lane == 0) {
      ProduceKeys<kDtype, kQueries>(sh, params, key_map, run, warp - 1);
    }
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
