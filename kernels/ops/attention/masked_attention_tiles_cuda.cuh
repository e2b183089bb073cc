// What the kernels of masked attention share on the device: their work lists, rings of buffers,
// loads, and the bits of a tile.
//
// Every tile in shared memory is a row of runs of 64 bf16 columns: lines of 128 bytes, 128-byte
// swizzle. A run is a K-major operand along its columns and an MN-major operand along its lines.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/ops/attention/masked_attention_schedule_cuda.h"

namespace baleen::masked_attention {

constexpr int kQueryDim = 192, kValueDim = 128;  // Q, V
constexpr int kQueryRuns = kQueryDim / 64, kValueRuns = kValueDim / 64;
constexpr int kThreads = 384;  // two consumer warpgroups and one for the producers
constexpr int kConsumerWarps = 8;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;

// Items are (head, tile that stays); heads go in groups whose keys and values fit into L2 together.
struct Work {
  MaskedTileLists lists;
  int num_heads, heads_per_group;
  bool last_first;   // the longest lists of a causal mask come first
  int32_t* counter;  // of items handed out
  int first_head = 0;
};

struct Item {
  int tile, head, steps;  // steps < 0: no more items
};

// The heads of a round, where dS is kept; none if there are fewer rounds.
__device__ __forceinline__ Work InRound(Work work, int heads_of_round, int round) {
  work.first_head = round * heads_of_round;
  work.num_heads = max(0, min(heads_of_round, work.num_heads - work.first_head));
  work.heads_per_group = max(1, min(work.heads_per_group, work.num_heads));
  while (work.num_heads % work.heads_per_group != 0) --work.heads_per_group;
  return work;
}

__device__ __forceinline__ Item ItemAt(const Work& work, int index) {
  if (index >= work.lists.count * work.num_heads) return {0, 0, -1};
  const int group = index / (work.lists.count * work.heads_per_group);
  const int first_head = group * work.heads_per_group;
  const int heads = min(work.heads_per_group, work.num_heads - first_head);
  const int in_group = index - first_head * work.lists.count;
  const int place = in_group / heads;
  const int tile = work.last_first ? work.lists.count - 1 - place : place;
  const int steps =
      work.lists.entries == nullptr
          ? 0
          : __ldg(work.lists.entries + static_cast<int64_t>(tile) * work.lists.stride);
  return {tile, work.first_head + first_head + in_group % heads, steps};
}

// Position in a ring of kStages buffers.
template <int kStages>
struct Ring {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// The barriers of a ring: one thread fills a stage, `readers` warps give it back.
template <int kStagesOfRing>
__device__ __forceinline__ void InitStages(uint64_t (&full)[kStagesOfRing],
                                           uint64_t (&empty)[kStagesOfRing], int readers) {
  for (int i = 0; i < kStagesOfRing; ++i) {
    cuda::BarrierInit(&full[i], 1);
    cuda::BarrierInit(&empty[i], readers);
  }
}

// Items on their way from the producer that draws them to all other roles. Which thread block gets
// an item depends on timing, its result does not.
constexpr int kItemStages = 2;
struct ItemRing {
  Item items[kItemStages];
  uint64_t full[kItemStages], empty[kItemStages];

  __device__ void Init(int readers) { InitStages(full, empty, readers); }
  // Thread 0 of the producer. `index` was drawn before; draws the next.
  __device__ __forceinline__ Item Draw(const Work& work, Ring<kItemStages>& ring, int& index) {
    const Item item = ItemAt(work, index);
    cuda::BarrierWait(&empty[ring.stage], ring.phase ^ 1);
    items[ring.stage] = item;
    cuda::BarrierArrive(&full[ring.stage]);
    ring.Next();
    if (item.steps >= 0) index = atomicAdd(work.counter, 1);
    return item;
  }
  // A reader that is a single thread.
  __device__ __forceinline__ Item TakeAlone(Ring<kItemStages>& ring) {
    cuda::BarrierWait(&full[ring.stage], ring.phase);
    const Item item = items[ring.stage];
    cuda::BarrierArrive(&empty[ring.stage]);
    ring.Next();
    return item;
  }
  // A reader that is a warp.
  __device__ __forceinline__ Item Take(Ring<kItemStages>& ring) {
    cuda::BarrierWait(&full[ring.stage], ring.phase);
    Item item = items[ring.stage];
    __syncwarp();
    if (threadIdx.x % 32 == 0) cuda::BarrierArrive(&empty[ring.stage]);
    ring.Next();
    item.tile = __shfl_sync(kAllLanes, item.tile, 0);
    item.head = __shfl_sync(kAllLanes, item.head, 0);
    item.steps = __shfl_sync(kAllLanes, item.steps, 0);
    return item;
  }
};

// One arrival for the warp.
__device__ __forceinline__ void Release(uint64_t* barrier) {
  if (threadIdx.x % 32 == 0) cuda::BarrierArrive(barrier);
}

// kRuns runs of kLines lines, from (first_column, first_line) of the matrix.
template <int kRuns, int kLines>
__device__ __forceinline__ void LoadRuns(void* shared, const CUtensorMap& map, int first_column,
                                         int first_line, uint64_t* barrier) {
  const uint32_t to = cuda::SharedAddress(shared);
#pragma unroll
  for (int run = 0; run < kRuns; ++run) {
    cuda::TensorLoad(to + run * kLines * 128, &map, first_column + run * 64, first_line, barrier);
  }
}

// The lowest n bits, for any n.
__device__ __forceinline__ uint32_t LowBits(int n) { return __funnelshift_lc(~0u, 0u, max(n, 0)); }

// A window of keys as bits of the keys [first, first + 32).
__device__ __forceinline__ uint32_t WindowBits(int begin, int end, int first) {
  return LowBits(end - first) & ~LowBits(begin - first);
}

// Scores of the keys whose bit is 0 become -inf. An accumulator of kWords * 32 keys, `bits` of the
// thread's rows.
template <int kWords>
__device__ __forceinline__ void MaskScores(float (&s)[16 * kWords],
                                           const uint32_t (&bits)[2][kWords]) {
  const int shift = threadIdx.x % 4 * 2;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      const uint32_t own = bits[r][w] >> shift;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          float& x = s[16 * w + 4 * j + 2 * r + e];
          x = own & (1u << (8 * j + e)) ? x : -INFINITY;
        }
      }
    }
  }
}

// bf16 pairs of an accumulator's columns as the A of steps of 16.
template <int kSteps>
__device__ __forceinline__ void PackOperand(const float (&s)[8 * kSteps],
                                            uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) a[i / 4][i % 4] = cuda::PackBf16(s[2 * i], s[2 * i + 1]);
}

template <int kSteps>
__device__ __forceinline__ void PinOperand(uint32_t (&a)[kSteps][4]) {
#pragma unroll
  for (int i = 0; i < 4 * kSteps; ++i) asm volatile("" : "+r"(a[i / 4][i % 4])::"memory");
}

// Issues d = a b^T, both K-major tiles in shared memory of kRuns runs; kM, kN lines to a run (of a,
// the warpgroup's 64 begin at `a`).
template <int kRuns, int kM, int kN>
__device__ __forceinline__ void MultiplyTransposed(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  a = cuda::Opaque(a);
  b = cuda::Opaque(b);
#pragma unroll
  for (int step = 0; step < 4 * kRuns; ++step) {
    const uint32_t run = step / 4, column = step % 4 * 32;
    cuda::WgmmaBf16<kN, false, false>::Shared(d, cuda::Advance(a, run * kM * 128 + column),
                                              cuda::Advance(b, run * kN * 128 + column), step > 0);
  }
  cuda::WgmmaCommit();
}

// Issues d (+)= a b: a in registers, b of kN columns in runs of 16 kSteps lines.
template <int kSteps, int kN>
__device__ __forceinline__ void MultiplyRegisters(float (&d)[kN / 2],
                                                  const uint32_t (&a)[kSteps][4], uint64_t b,
                                                  bool accumulate) {
  b = cuda::Opaque(b);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    cuda::WgmmaBf16<kN, false, true>::Registers(d, a[step], cuda::Advance(b, step * 2048),
                                                accumulate || step > 0);
  }
  cuda::WgmmaCommit();
}

// The same, a K-major in shared memory of one run; adds.
template <int kSteps, int kN>
__device__ __forceinline__ void MultiplyShared(float (&d)[kN / 2], uint64_t a, uint64_t b) {
  a = cuda::Opaque(a);
  b = cuda::Opaque(b);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    cuda::WgmmaBf16<kN, false, true>::Shared(d, cuda::Advance(a, step * 32),
                                             cuda::Advance(b, step * 2048), true);
  }
  cuda::WgmmaCommit();
}

// Stores row r (0, 1) of an accumulator as bf16, times `scale`: `row` begins the [kDim] row. The
// four lanes that share it transpose their pairs, so that each stores 16 bytes. All lanes call.
template <int kDim>
__device__ __forceinline__ void StoreRow(uint4* row, bool valid, const float (&d)[kDim / 2], int r,
                                         float scale) {
  const int lane = threadIdx.x % 4;
  const bool odd = lane % 2, upper = lane / 2;
#pragma unroll
  for (int j = 0; j < kDim / 8; j += 4) {
    uint32_t w[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* pair = &d[4 * (j + i) + 2 * r];
      w[i] = cuda::PackBf16(pair[0] * scale, pair[1] * scale);
    }
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? w[i] : w[i + 1], 1);
      w[i] = odd ? other : w[i];
      w[i + 1] = odd ? w[i + 1] : other;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, upper ? w[i] : w[i + 2], 2);
      w[i] = upper ? other : w[i];
      w[i + 2] = upper ? w[i + 2] : other;
    }
    if (valid) row[j + lane] = make_uint4(w[0], w[1], w[2], w[3]);
  }
}

// --- Host.

// A [rows, heads * dim] bf16 matrix in tiles of `lines` rows.
inline CUtensorMap HeadsMap(const void* base, int rows, int heads, int dim, int lines) {
  CUtensorMap map;
  cuda::CheckCuda(cuda::MakeTensorMap(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, base, rows,
                                      int64_t{2} * heads * dim, lines),
                  "masked attention: tensor map");
  return map;
}

// What the keys (or rows) of a group of heads take: about half of L2. Each round of heads has an
// end, which is short if its last group is long beside the longest item; heads go in step, so that
// L2 need not hold all of a group.
constexpr int64_t kGroupBytes = int64_t{24} << 20, kRoundBytes = 4 * kGroupBytes;

inline int HeadsPerGroup(int length, int num_heads, int64_t group_bytes = kGroupBytes) {
  int64_t heads = group_bytes / (int64_t{length} * (kQueryDim + kValueDim) * 2);
  heads = heads < 1 ? 1 : heads > num_heads ? num_heads : heads;
  while (num_heads % heads != 0) --heads;  // a short last group would begin with its longest items
  return static_cast<int>(heads);
}

}  // namespace baleen::masked_attention
