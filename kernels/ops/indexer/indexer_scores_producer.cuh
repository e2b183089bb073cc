// The producers of the indexer scores: what a block shares, and who fills it. See
// indexer_scores_cuda.cu.
//
// A warpgroup of four warps: one begins visits (queries, windows, and in e4m3 the weights in the
// order in which they are used), three ask for keys.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/tensor_map.cuh"
#include "kernels/ops/indexer/indexer_scores_cuda.h"
#include "kernels/ops/indexer/indexer_scores_epilogue.cuh"
#include "kernels/ops/indexer/indexer_scores_work.cuh"

namespace baleen::indexer_scores {

constexpr int kHeadDim = 128;
constexpr int kColumns = 256;  // queries of a block x heads
constexpr int kQueryStages = 2;
constexpr int kHalf = kColumns / 2;
constexpr int kLoaders = 3;                  // warps that ask for keys
constexpr int kReadyRow = kColumns / 4 + 4;  // 16 bytes more: each lane's row in banks of its own

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
  static constexpr int kConsumerRegisters = kInTurn ? 160 : 232;
  static constexpr int kProducerRegisters = kInTurn ? 32 : 40;
  static constexpr int kRowBytes = kFp8 ? kHeadDim : 2 * kHeadDim;
  static constexpr int kRuns = kRowBytes / 128;  // 128-byte columns of swizzled atoms
  static constexpr int kKeyStages = kFp8 ? 12 : 6;
  static constexpr int kQueryBytes = kColumns * kRowBytes;
  static constexpr int kKeyBytes = kTileKeys * kRowBytes;
  static constexpr int kChunkTiles = (4 << 20) / kKeyBytes;  // 4 MB, see ForEachVisit
  // A change of queries, in tiles: drain, weights, first products.
  static constexpr int kVisitCost = kInTurn ? 4 : 2;
  static constexpr int kSteps = kRowBytes / 32;  // products of one tile

  // Everything a block shares; queries and keys first: swizzled atoms start at multiples of 1024.
  struct Shared {
    uint8_t queries[kQueryStages][kQueryBytes];
    uint8_t keys[kKeyStages][kKeyBytes];
    float weights[kQueryStages][kColumns];
    float scales[kQueryStages][kFp8 ? kColumns : 4];  // of the queries' heads, e4m3 only
    alignas(16) float ready[kQueryStages][4][kFp8 ? kReadyRow : 4];  // see PrepareWeights
    uint64_t query_full[kQueryStages], query_empty[kQueryStages], ready_full[kQueryStages];
    uint64_t key_full[kKeyStages], key_empty[kKeyStages];
    int warp_sums[kThreads / 32];
    Visit visits[kQueryStages];
    int first_block, cost_before_first;  // where the run starts
    int first_chunk, last_chunk;         // of its keys
  };
  static constexpr int kSharedBytes = static_cast<int>(sizeof(Shared));
  static_assert(kSharedBytes <= 232448, "sm_90 gives a block 227 KiB");
};

// The weights of a visit as ConsumeInTurn multiplies with them, each lane's in a row. By a warp.
template <IndexerDtype kDtype, int kQueries>
__device__ void PrepareWeights(typename Layout<kDtype, kQueries>::Shared& sh, bool scaled,
                               int stage, int lane) {
  using Epilogue = HeadSums<Layout<kDtype, kQueries>::kFp8, kQueries / 2>;
#pragma unroll 1
  for (int column = lane; column < kColumns; column += 32) {
    float w = sh.weights[stage][column];
    if (scaled) w *= sh.scales[stage][column];
    sh.ready[stage][column % 8 / 2][column / 8 * 2 + column % 2] = w * Epilogue::Share(column);
  }
  cuda::BarrierArrive(&sh.ready_full[stage]);
  __syncwarp();  // all have arrived before the next visit begins: consumers may skip a wait
}

// Asks for the queries of a visit, and tells the consumers of it. By one thread.
template <IndexerDtype kDtype, int kQueries>
__device__ void BeginVisit(typename Layout<kDtype, kQueries>::Shared& sh, const Params& params,
                           const CUtensorMap& query_map, int stage, int block, int first_tile,
                           int count) {
  using L = Layout<kDtype, kQueries>;
  constexpr int kRunElements = L::kFp8 ? 128 : 64;
  const int rows = min(kQueries, params.args.num_rows - block * kQueries);
  const uint32_t weight_bytes = rows * (kColumns / kQueries) * sizeof(float);
  const bool scaled = L::kFp8 && params.args.q_scale_TI != nullptr;
  const auto load = [&](float* shared, const float* all) {
    cuda::BulkLoad(cuda::SharedAddress(shared), all + static_cast<int64_t>(block) * kColumns,
                   weight_bytes, &sh.query_full[stage]);
  };
  // Bytes may land before they are announced: the phase waits for the arrival below.
  for (int r = 0; r < L::kRuns; ++r) {
    cuda::TensorLoad(cuda::SharedAddress(sh.queries[stage]) + r * kColumns * 128, &query_map,
                     r * kRunElements, block * kColumns, &sh.query_full[stage]);
  }
  load(sh.weights[stage], params.args.w_TI);
  if (scaled) load(sh.scales[stage], params.args.q_scale_TI);
  Visit& visit = sh.visits[stage];
  visit.block = block;
  visit.first_tile = first_tile;
  visit.count = count;
#pragma unroll
  for (int u = 0; u < kQueries; ++u)
    visit.windows[u] = RowWindow(params.args, block * kQueries + u);
  cuda::BarrierArriveExpect(&sh.query_full[stage],
                            L::kQueryBytes + (scaled ? 2 : 1) * weight_bytes);
}

// By a warp of its own: visits, each as soon as its stage is free, so a visit ahead.
template <IndexerDtype kDtype, int kQueries>
__device__ void ProduceVisits(typename Layout<kDtype, kQueries>::Shared& sh, const Params& params,
                              const CUtensorMap& query_map, Run run, int lane) {
  using L = Layout<kDtype, kQueries>;
  int ordinal = 0;
  ForEachVisit<kQueries, L>(params, sh, run, [&](int block, int first_tile, int count) {
    const int stage = ordinal % kQueryStages, phase = ordinal / kQueryStages & 1;
    ++ordinal;
    cuda::BarrierWait(&sh.query_empty[stage], phase ^ 1);
    if (lane == 0) {
      BeginVisit<kDtype, kQueries>(sh, params, query_map, stage, block, first_tile, count);
    }
    if constexpr (L::kInTurn) {
      cuda::BarrierWait(&sh.query_full[stage], phase);
      PrepareWeights<kDtype, kQueries>(sh, params.args.q_scale_TI != nullptr, stage, lane);
    }
  });
  const int stage = ordinal % kQueryStages;
  cuda::BarrierWait(&sh.query_empty[stage], (ordinal / kQueryStages & 1) ^ 1);
  if (lane == 0) {
    sh.visits[stage].count = 0;
    cuda::BarrierArrive(&sh.query_full[stage]);
  }
}

// By a thread of each of kLoaders warps: tiles of keys in turn. One takes some 30 instructions; all
// of them on one scheduler would hold back the three consumers, whose warps share it.
template <IndexerDtype kDtype, int kQueries>
__device__ void ProduceKeys(typename Layout<kDtype, kQueries>::Shared& sh, const Params& params,
                            const CUtensorMap& key_map, Run run, int loader) {
  using L = Layout<kDtype, kQueries>;
  constexpr int kRunElements = L::kFp8 ? 128 : 64;
  static_assert(L::kKeyStages % kLoaders == 0);
  int tiles_begin = 0;                                  // of this visit
  int own = loader, key_stage = loader, key_phase = 1;  // the next tile of this loader
  ForEachVisit<kQueries, L>(params, sh, run, [&](int, int first_tile, int count) {
#pragma unroll 1
    for (; own < tiles_begin + count; own += kLoaders) {
      cuda::BarrierWait(&sh.key_empty[key_stage], key_phase);
      cuda::BarrierArriveExpect(&sh.key_full[key_stage], L::kKeyBytes);
      for (int r = 0; r < L::kRuns; ++r) {
        cuda::TensorLoad(cuda::SharedAddress(sh.keys[key_stage]) + r * kTileKeys * 128, &key_map,
                         r * kRunElements, (first_tile + own - tiles_begin) * kTileKeys,
                         &sh.key_full[key_stage]);
      }
      key_stage += kLoaders;
      if (key_stage >= L::kKeyStages) {
        key_stage -= L::kKeyStages;
        key_phase ^= 1;
      }
    }
    tiles_begin += count;
  });
}

}  // namespace baleen::indexer_scores
