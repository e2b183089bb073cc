// Dense indexer loss, kernel 2: the head-summed target of a tile, then loss shares and delta. See
// dense_indexer_loss_cuda.cu for who does what.
//
// A cluster of two blocks has 256 rows x 192 keys; a block 128 rows, 64 for each of two consumer
// warpgroups. A consumer keeps S = q k^T of one head (96 registers) and p, the sum over heads (96).
// The heads are the loop, in runs of 64 columns. Keys (24 KB a run, 6 stages): each block of the
// cluster fetches half and sends it to both. Queries (8 KB a run, 4 stages): a ring for each
// consumer, so that a run's queries leave as soon as their one reader is done. The consumers take
// turns on the tensor cores: one multiplies while the other exponentiates (1152 clocks of products
// against 768 of exponentials).
#pragma once

#include "kernels/ops/indexer/dense_indexer_loss_params.cuh"

namespace baleen::dense_indexer_loss {

constexpr int kMainDim = 192;
constexpr int kMainRuns = kMainDim / 64;
constexpr int kKeyStages = 6;
constexpr int kQueryStages = 4;  // of each consumer
constexpr int kQueryBytes = 64 * 128;
constexpr int kKeyBytes = kTargetKeys * 128;
constexpr int kRowBlocksOfGroup = 4;  // clusters that run side by side share rows and keys in L2
constexpr int kTargetRegisters = kTargetKeys / 2;
constexpr int kStragglers = 12;  // clusters of earlier waves that may still run when one starts

struct TargetShared {
  uint8_t keys[kKeyStages][kKeyBytes];
  uint8_t queries[2][kQueryStages][kQueryBytes];
  uint64_t key_full[kKeyStages], key_empty[kKeyStages];
  uint64_t query_full[2][kQueryStages], query_empty[2][kQueryStages];
  int hull_begin, hull_end;
};
constexpr int kTargetSharedBytes = static_cast<int>(sizeof(TargetShared));
static_assert(kTargetSharedBytes <= 232448, "sm_90 gives a block 227 KiB");

// A tile into the same place of every block in the mask, its bytes onto each one's own barrier.
__device__ __forceinline__ void TensorLoadMulticast(uint32_t shared, const CUtensorMap* map,
                                                    int column, int row, uint64_t* barrier,
                                                    uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(cuda::SharedAddress(barrier)), "h"(blocks)
      : "memory");
}

// This block's half of the keys, 64 columns at a time, to both blocks of the cluster.
__device__ __forceinline__ void ProduceKeys(TargetShared& sh, const CUtensorMap& map, int num_runs,
                                            int first_key, uint32_t cluster_rank) {
  const int half = static_cast<int>(cluster_rank) * (kTargetKeys / 2);
  Ring<kKeyStages> ring;
  for (int run = 0; run < num_runs; ++run, ring.Next()) {
    uint64_t* full = &sh.key_full[ring.stage];
    cuda::BarrierWait(&sh.key_empty[ring.stage], ring.phase ^ 1);
    cuda::BarrierArriveExpect(full, kKeyBytes);
    TensorLoadMulticast(cuda::SharedAddress(sh.keys[ring.stage]) + half * 128, &map, run * 64,
                        first_key + half, full, 3);
  }
}

// The 64 rows of one consumer, 64 columns at a time.
__device__ __forceinline__ void ProduceQueries(TargetShared& sh, const CUtensorMap& map,
                                               int num_runs, int first_row, int consumer) {
  Ring<kQueryStages> ring;
  for (int run = 0; run < num_runs; ++run, ring.Next()) {
    uint64_t* full = &sh.query_full[consumer][ring.stage];
    cuda::BarrierWait(&sh.query_empty[consumer][ring.stage], ring.phase ^ 1);
    cuda::BarrierArriveExpect(full, kQueryBytes);
    cuda::TensorLoad(cuda::SharedAddress(sh.queries[consumer][ring.stage]), &map, run * 64,
                     first_row + 64 * consumer, full);
  }
}

// Issues s (+)= q k^T over 64 columns. The last run of a head is two groups, so that a consumer
// knows when its last 16 columns begin.
__device__ __forceinline__ void MultiplyRun(float (&s)[kTargetRegisters], uint32_t queries,
                                            uint32_t keys, int run) {
  const uint64_t a = cuda::DescriptorKMajor(queries), b = cuda::DescriptorKMajor(keys);
  cuda::WgmmaFence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    cuda::WgmmaBf16<kTargetKeys, false, false>::Shared(
        s, cuda::Advance(a, step * 32), cuda::Advance(b, step * 32), step > 0 || run > 0);
    if (run == kMainRuns - 1 && step == 2) cuda::WgmmaCommit();
  }
  cuda::WgmmaCommit();
}

// Hands a run's keys back to the producers of both blocks (lanes 0 and 1 one each; `key_empty` is
// the address of the lane's first barrier there), its queries to their own.
__device__ __forceinline__ void ReleaseRun(uint32_t key_empty, int key_stage,
                                           uint64_t* query_empty) {
  const int lane = threadIdx.x % 32;
  if (lane < 2) {
    asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(key_empty + 8 * key_stage)
                 : "memory");
  }
  if (lane == 0) cuda::BarrierArrive(query_empty);
}

// -log2(e) lse - log2(heads) of the thread's rows `row` and row + 8, head by head.
struct LseShifts {
  const float* lse[2];
  float log2_heads, next[2];

  __device__ LseShifts(const DenseIndexerLossArgs& args, int row)
      : log2_heads(log2f(static_cast<float>(args.num_main_heads))) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t clipped = min(row + 8 * r, args.num_rows - 1);
      lse[r] = args.lse_TH + clipped * args.num_main_heads;
      next[r] = __ldg(lse[r]);
    }
  }
  // Of the current head; asks for the next one's unless this is the last.
  __device__ __forceinline__ void Take(bool last, float (&shift)[2]) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      shift[r] = fmaf(-kLog2E, next[r], -log2_heads);
      if (!last) next[r] = __ldg(++lse[r]);
    }
  }
};

// p of the tile: the mean over heads of exp(scale s - lse), also outside the windows.
__device__ __forceinline__ void SumMainHeads(TargetShared& sh, const Params& params, int consumer,
                                             int row, float (&p)[kTargetRegisters]) {
  const int num_heads = params.args.num_main_heads;
  const float scale = params.args.softmax_scale * kLog2E;
  LseShifts lse(params.args, row);
  const uint32_t queries = cuda::SharedAddress(sh.queries[consumer]),
                 keys = cuda::SharedAddress(sh.keys);
  const uint32_t key_empty = cuda::PeerAddress(cuda::SharedAddress(sh.key_empty), threadIdx.x % 2);
#pragma unroll
  for (int i = 0; i < kTargetRegisters; ++i) p[i] = 0;
  Ring<kKeyStages> key_ring;
  Ring<kQueryStages> query_ring;
  float s[kTargetRegisters];
  for (int head = 0; head < num_heads; ++head) {
    const bool last = head + 1 == num_heads;
    float shift[2];
    lse.Take(last, shift);
    int key_stages[kMainRuns], query_stages[kMainRuns];
    cuda::NamedSync(1 + consumer, 256);  // our turn on the tensor cores
#pragma unroll
    for (int run = 0; run < kMainRuns; ++run, key_ring.Next(), query_ring.Next()) {
      key_stages[run] = key_ring.stage;
      query_stages[run] = query_ring.stage;
      cuda::BarrierWait(&sh.query_full[consumer][query_ring.stage], query_ring.phase);
      cuda::BarrierWait(&sh.key_full[key_ring.stage], key_ring.phase);
      MultiplyRun(s, queries + query_ring.stage * kQueryBytes, keys + key_ring.stage * kKeyBytes,
                  run);
    }
    const auto release = [&](int run) {
      ReleaseRun(key_empty, key_stages[run], &sh.query_empty[consumer][query_stages[run]]);
    };
    cuda::WgmmaWait<3>();
    release(0);
    cuda::WgmmaWait<2>();
    release(1);
    // 96 clocks of products are left: about what the other consumer needs to start its own.
    cuda::WgmmaWait<1>();
    if (consumer == 0 || !last) cuda::NamedArrive(2 - consumer, 256);
    cuda::WgmmaWait<0>();
    cuda::PinRegisters(s);
    release(2);
#pragma unroll
    for (int i = 0; i < kTargetRegisters; ++i) {
      p[i] += cuda::Exp2(fmaf(s[i], scale, shift[i / 2 % 2]));
    }
  }
}

// Loss share and delta of one row of the thread, keys 8 j + 2 c + e of the tile.
__device__ __forceinline__ void FinishRow(const Params& params, int row, int first_key, int r,
                                          const float (&p)[kTargetRegisters]) {
  const int c = threadIdx.x % 4, padded = params.num_tiles * kTileKeys;
  const bool valid = row < params.args.num_rows;
  const KeyRange window = RowWindow(params, row);
  const int64_t at = static_cast<int64_t>(row) * padded + first_key;
  const float lse = valid ? params.lse_T[row] : 0.0f;
  float loss = 0;
#pragma unroll
  for (int tile = 0; tile < kTargetKeys / kTileKeys; ++tile) {
    float delta[2][8];
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int offset = tile * kTileKeys + 8 * j + 2 * c;
      const float2 score =
          valid ? __ldcs(reinterpret_cast<const float2*>(params.score_TS + at + offset))
                : make_float2(0, 0);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int key = first_key + offset + e;
        const bool inside = key >= window.begin && key < window.end;
        const float target = p[32 * tile + 4 * j + 2 * r + e];
        const float log_pi = (e == 0 ? score.x : score.y) - lse;
        delta[e][j] = inside ? cuda::Exp2(log_pi * kLog2E) - target : 0.0f;
        if (inside && target > 0) loss = fmaf(target, __logf(target) - log_pi, loss);
      }
    }
    if (valid) {
      uint4* out = reinterpret_cast<uint4*>(params.delta_TX + at + tile * kTileKeys + 16 * c);
#pragma unroll
      for (int j = 0; j < 8; j += 4) {
        out[j / 4] = {cuda::PackBf16(delta[0][j], delta[1][j]),
                      cuda::PackBf16(delta[0][j + 1], delta[1][j + 1]),
                      cuda::PackBf16(delta[0][j + 2], delta[1][j + 2]),
                      cuda::PackBf16(delta[0][j + 3], delta[1][j + 3])};
      }
    }
  }
  loss += __shfl_xor_sync(kAllLanes, loss, 1);
  loss += __shfl_xor_sync(kAllLanes, loss, 2);
  if (valid && c == 0) {
    params.loss_TX[static_cast<int64_t>(row) * (padded / kTargetKeys) + first_key / kTargetKeys] =
        loss;
  }
}

struct TargetPlace {
  int cluster_row, first_key;
};

// Clusters in groups of kRowBlocksOfGroup row blocks, key block by key block.
__device__ __forceinline__ TargetPlace PlaceOfCluster(const Params& params, int cluster) {
  const int key_blocks = params.num_tiles * kTileKeys / kTargetKeys;
  const int group = cluster / (kRowBlocksOfGroup * key_blocks);
  const int in_group = cluster % (kRowBlocksOfGroup * key_blocks);
  return {(group * kRowBlocksOfGroup + in_group % kRowBlocksOfGroup) * kPadRows,
          in_group / kRowBlocksOfGroup * kTargetKeys};
}

// Initialises the barriers; true if a window of the cluster's rows touches its keys.
__device__ __forceinline__ bool PrepareTarget(TargetShared& sh, const Params& params,
                                              TargetPlace place) {
  if (threadIdx.x == 0) {
    sh.hull_begin = params.args.num_keys;
    sh.hull_end = 0;
    for (int i = 0; i < kKeyStages; ++i) {
      cuda::BarrierInit(&sh.key_full[i], 1);
      cuda::BarrierInit(&sh.key_empty[i], 16);  // the consumer warps of both blocks
    }
    for (int i = 0; i < 2 * kQueryStages; ++i) {
      cuda::BarrierInit(&sh.query_full[i / kQueryStages][i % kQueryStages], 1);
      cuda::BarrierInit(&sh.query_empty[i / kQueryStages][i % kQueryStages], 4);
    }
    cuda::FenceBarrierInit();
  }
  __syncthreads();
  if (threadIdx.x < kPadRows) {
    const KeyRange window = RowWindow(params, place.cluster_row + static_cast<int>(threadIdx.x));
    const int begin = __reduce_min_sync(kAllLanes, window.begin);
    const int end = __reduce_max_sync(kAllLanes, window.end);
    if (threadIdx.x % 32 == 0) {
      atomicMin(&sh.hull_begin, begin);
      atomicMax(&sh.hull_end, end);
    }
  }
  __syncthreads();
  return sh.hull_begin < place.first_key + kTargetKeys && sh.hull_end > place.first_key;
}

// Holds a cluster back until all but kStragglers of the waves before its own are done. Clusters
// that run side by side read the same heads' rows and keys from L2; without this they drift apart,
// head by head, until L2 no longer holds what lies between the first and the last. Waits only for
// clusters that started earlier, so always for running ones; results do not depend on it.
__device__ __forceinline__ void WaitForWave(const Params& params) {
  TargetWaves* waves = params.target_waves;
  const int wave = max(1, params.num_runs / 2);
  const int before = atomicAdd(&waves->started, 1) / wave * wave;
  while (*static_cast<volatile int*>(&waves->finished) < before - kStragglers) __nanosleep(200);
}

// Loss shares and delta of the thread's rows `row` and row + 8.
struct FinishLoss {
  __device__ __forceinline__ void operator()(const Params& params, int row, int first_key,
                                             const float (&p)[kTargetRegisters]) const {
    FinishRow(params, row, first_key, 0, p);
    FinishRow(params, row + 8, first_key, 1, p);
  }
};

// finish(params, row, first key, p) gets the means over heads of the thread's rows.
template <class Finish>
__global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    TargetKernel(const __grid_constant__ Params params,
                 const __grid_constant__ CUtensorMap query_map,
                 const __grid_constant__ CUtensorMap key_map, const Finish finish) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  TargetShared& sh = *reinterpret_cast<TargetShared*>(raw_shared);
  const TargetPlace place = PlaceOfCluster(params, blockIdx.x / 2);
  if (!PrepareTarget(sh, params, place)) return;  // both blocks of the cluster
  const uint32_t cluster_rank = cuda::ClusterRank();
  if (cluster_rank == 0 && threadIdx.x == 0) WaitForWave(params);
  cuda::ClusterSync();
  const int first_row = place.cluster_row + static_cast<int>(cluster_rank) * kTargetRows;
  const int warp = threadIdx.x / 32;
  if (warp >= 8) {
    cuda::LowerRegisters<24>();
    const int num_runs = params.args.num_main_heads * kMainRuns;
    if (warp < 10 && threadIdx.x % 32 == 0) {
      ProduceQueries(sh, query_map, num_runs, first_row, warp - 8);
    } else if (warp == 10 && threadIdx.x % 32 == 0) {
      ProduceKeys(sh, key_map, num_runs, place.first_key, cluster_rank);
    }
    __syncwarp();
  } else {
    cuda::RaiseRegisters<240>();
    const int consumer = Uniform(warp / 4), row = first_row + warp * 16 + threadIdx.x % 32 / 4;
    if (consumer == 1) cuda::NamedArrive(1, 256);  // consumer 0 has the first turn
    float p[kTargetRegisters];
    SumMainHeads(sh, params, consumer, row, p);
    finish(params, row, place.first_key, p);
  }
  cuda::ClusterSync();  // the other block may still send keys and hand stages back
  if (cluster_rank == 0 && threadIdx.x == 0) atomicAdd(&params.target_waves->finished, 1);
}

}  // namespace baleen::dense_indexer_loss
