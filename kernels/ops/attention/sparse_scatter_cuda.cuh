// Scatter-add of selected rows in a fixed order: dkv[ids[t, k]] += row(t, k), summed over t
// ascending.
//
// Queries go in chunks. For each chunk a bit mask per key tells which of its queries chose it; its
// running popcount gives each (t, k) a place in a buffer sorted by key, where the producer of
// row(t, k) stores it. The rows of a key then lie side by side and one warp adds them in the order
// of t. Where the run of a key starts is decided by an atomic and may differ between calls; no sum
// depends on it.
//
// Legend: S keys, C chunks, W = words of 32 queries (a chunk is a multiple of 32).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/ops/attention/sparse_scatter_row_cuda.h"

namespace baleen::cuda {

struct ScatterIndex {
  uint32_t* masks_WS;  // bit t % 32 of word t / 32: query t chose key s
  int32_t* ranks_WS;   // how many queries of the chunk before word w chose key s
  int32_t* starts_CS;  // first row of key s in the sorted buffer of the chunk
  int32_t* counts_CS;
  // Zero at the start of a launch.
  int32_t* cursor_C;   // rows handed out so far
  int32_t* written_C;  // thread blocks whose rows are all stored
  int32_t* summed_C;   // thread blocks whose keys are all added up
  int32_t* turns_B;    // chunks that the b-th thread block of each chunk's sums has added up
  int num_keys;        // S
  int words_a_chunk;   // 0: of packs, see RankSelectedKernel
};

// The sorted place of the contribution of query `t` (counted from the first chunk) of `chunk` to
// key `s`.
__device__ __forceinline__ int ScatterPlace(const ScatterIndex& index, int chunk, int t, int s) {
  const int w = t >> 5;
  const size_t word = size_t(w) * index.num_keys + s;
  const uint32_t before = (1u << (t & 31)) - 1;
  return index.starts_CS[size_t(chunk) * index.num_keys + s] + index.ranks_WS[word] +
         __popc(index.masks_WS[word] & before);
}

constexpr int kMarkThreads = 1024, kMarkMostKeys = 32768;
// Keys a thread block of MarkSelectedKernel has: as many as fit, or as give each of a large GPU's
// multiprocessors a block.
inline int KeysAMarkBlock(int num_keys, int num_words) {
  constexpr int kBlocks = 132, kStep = 1024;
  const int segments = (kBlocks + num_words - 1) / num_words;
  const int share = (num_keys + segments - 1) / segments;
  return (share < kMarkMostKeys ? share : kMarkMostKeys) / kStep * kStep + kStep;
}

// A thread block marks 32 lists' choices among some keys, in shared memory: blockIdx.x = the word
// of masks, y = the keys. An id is a key, or -1; with counts the low bits `key_mask` of a list's
// first so many. Does nothing if `choice` is not null and speaks of the other of packs and single
// queries.
__global__ void __launch_bounds__(kMarkThreads)
    MarkSelectedKernel(ScatterIndex index, const int32_t* ids_TK, const int32_t* counts_T,
                       uint32_t key_mask, int num_lists, int width, int keys_a_block,
                       const int32_t* choice) {
  extern __shared__ uint32_t marks[];
  if (choice != nullptr && (__ldg(choice) != 0) != (counts_T != nullptr)) return;
  const int base = blockIdx.y * keys_a_block;
  const uint32_t keys = max(0, min(keys_a_block, index.num_keys - base));
  for (uint32_t x = threadIdx.x; x < keys; x += kMarkThreads) marks[x] = 0;
  __syncthreads();
  // A warp takes one list, all of whose ids are different words.
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, t = blockIdx.x * 32 + warp;
  if (t < num_lists) {
    const int count = counts_T == nullptr ? width : __ldg(counts_T + t);
    const int32_t* list = ids_TK + size_t(t) * width;
#pragma unroll 8
    for (int k = lane; k < count; k += 32) {
      const uint32_t id = __ldg(list + k);
      const uint32_t at = (counts_T == nullptr ? id : id & key_mask) - uint32_t(base);
      if (at < keys) atomicOr(&marks[at], 1u << warp);
    }
  }
  __syncthreads();
  uint32_t* out = index.masks_WS + size_t(blockIdx.x) * index.num_keys + base;
  for (uint32_t x = threadIdx.x; x < keys; x += kMarkThreads) out[x] = marks[x];
}

// One thread a key, blockIdx.y = the chunk: ranks of the words, count, and a place for its run. The
// runs of 32 neighbouring keys lie one behind the other. Without words in a chunk these are packs,
// whose chunk was chosen; with them nothing is done if it was.
__global__ void RankSelectedKernel(ScatterIndex index, int num_words, const int32_t* choice) {
  const int s = blockIdx.x * blockDim.x + threadIdx.x, chunk = blockIdx.y;
  const int chosen = choice == nullptr ? 0 : __ldg(choice);
  if ((chosen != 0) != (index.words_a_chunk == 0)) return;
  const int words = chosen != 0 ? chosen / 32 : index.words_a_chunk;
  if (chunk * words >= num_words) return;
  int count = 0;
  if (s < index.num_keys) {
    const int end = min((chunk + 1) * words, num_words);
#pragma unroll 8
    for (int w = chunk * words; w < end; ++w) {
      const size_t word = size_t(w) * index.num_keys + s;
      index.ranks_WS[word] = count;
      count += __popc(__ldg(&index.masks_WS[word]));  // constant here: loads run ahead of stores
    }
  }
  // One atomic a warp: inclusive scan of the counts over the lanes.
  const int lane = threadIdx.x & 31;
  int scan = count;
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, scan, step);
    if (lane >= step) scan += other;
  }
  int base = 0;
  if (lane == 31) base = atomicAdd(&index.cursor_C[chunk], scan);
  base = __shfl_sync(~0u, base, 31);
  if (s < index.num_keys) {
    index.starts_CS[size_t(chunk) * index.num_keys + s] = base + scan - count;
    index.counts_CS[size_t(chunk) * index.num_keys + s] = count;
  }
}

// --- Counters between thread blocks of one launch. ---

// One thread: after a barrier of the threads whose writes it announces.
__device__ __forceinline__ void Announce(int32_t* counter) {
  __threadfence();
  atomicAdd(counter, 1);
}
// One thread, before a barrier of the threads that read what was announced.
__device__ __forceinline__ void AwaitCount(const int32_t* counter, int count) {
  int seen;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
  } while (seen < count);
}

// --- The sum. ---

// A warp's part of the sum's shared memory: two batches of sorted rows.
template <bool kShort>
struct __align__(128) SumStage {
  static constexpr int kBatch = 8;  // rows
  uint8_t rows[2][kBatch * kScatterRowBytes<kShort>];
  uint64_t full[2];
};

// A lane's share of a row: the columns, as nine pairs, and their sums. Of a row as bf16 it takes
// units lane and lane + 32, of a short row those of its quad's lane in piece lane / 4; of the last
// 64 columns it takes one pair.
template <bool kShort>
struct LaneSums {
  float2 pairs[9] = {};
  const ShortUnitAdder short_units;
  int from[3];  // bytes of the row

  __device__ __forceinline__ explicit LaneSums(uint32_t lane) : short_units(gridDim.z - 1) {
    from[0] = kShort ? ScatterUnitPlace(lane) : lane * 16;
    from[1] = kShort ? ScatterUnitRest(lane) : 512 + lane * 16;
    from[2] = kScatterRowBytes<kShort> - 128 + lane * 4;
  }

  static __device__ __forceinline__ int Column(int lane, int pair) {
    if (pair == 8) return ScatterUnitColumn(64 + lane / 4) + 8 * (lane % 4);
    const int second = pair / 4;
    return ScatterUnitColumn(kShort ? lane / 4 * 8 + lane % 4 + second * 4 : lane + second * 32) +
           8 * (pair % 4);
  }

  __device__ __forceinline__ void AddPairs(const uint4& words, float2* sums) {
    const uint32_t four[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int x = 0; x < 4; ++x) {
      sums[x].x += LowBf16(four[x]);
      sums[x].y += HighBf16(four[x]);
    }
  }

  __device__ __forceinline__ void Add(const uint8_t* row) {
    const uint4 a = *reinterpret_cast<const uint4*>(row + from[0]);
    const uint32_t last = *reinterpret_cast<const uint32_t*>(row + from[2]);
    if constexpr (kShort) {
      const uint2 b = *reinterpret_cast<const uint2*>(row + from[1]);
      short_units.Add(a.x, a.y, a.z, pairs);
      short_units.Add(a.w, b.x, b.y, pairs + 4);
    } else {
      AddPairs(a, pairs);
      AddPairs(*reinterpret_cast<const uint4*>(row + from[1]), pairs + 4);
    }
    pairs[8].x += LowBf16(last);
    pairs[8].y += HighBf16(last);
  }
};

// Keys of a unit, whose runs must lie one behind the other: 1, 2 or 4, so that it is part of 32.
// Few keys, small units, so that each warp has several and all end at about the same time.
__device__ __forceinline__ int KeysAUnit(int num_keys, int num_warps) {
  const int share = num_keys / (num_warps * 8);
  return share >= 4 ? 4 : share >= 2 ? 2 : 1;
}

// dkv[s] += the sorted rows of key s, for units first_unit, first_unit + step, ... of one chunk.
// The runs of a unit are one run of bytes, which the copy engine brings two batches ahead.
template <bool kShort>
__device__ __forceinline__ void SumSortedRows(const ScatterIndex& index, int chunk,
                                              const uint8_t* rows, int first_unit, int step,
                                              float* dkv_SC, SumStage<kShort>& stage) {
  constexpr int kRowBytes = kScatterRowBytes<kShort>, kBatch = SumStage<kShort>::kBatch;
  const int lane = threadIdx.x % 32;
  const uint64_t hint = PolicyEvictFirst();
  const int keys = KeysAUnit(index.num_keys, step);
  uint32_t parity = 0;  // of the two slots, a bit each

  int next_start = 0, next_count = 0;  // of the unit that comes next, in the lanes of its keys
  const auto find = [&](int unit) {
    const int s = unit * keys + lane;
    next_start = next_count = 0;
    if (lane < keys && s < index.num_keys) {
      next_start = __ldg(&index.starts_CS[size_t(chunk) * index.num_keys + s]);
      next_count = __ldg(&index.counts_CS[size_t(chunk) * index.num_keys + s]);
    }
  };
  find(first_unit);
  for (int unit = first_unit; unit * keys < index.num_keys; unit += step) {
    const int count = next_count;
    const uint8_t* run = rows + size_t(__shfl_sync(~0u, next_start, 0)) * kRowBytes;
    find(unit + step);
    int total = 0;
    for (int key = 0; key < keys; ++key) total += __shfl_sync(~0u, count, key);
    auto load = [&](int first_row) {
      if (lane != 0 || first_row >= total) return;
      const int slot = first_row / kBatch & 1;
      const uint32_t bytes = min(kBatch, total - first_row) * kRowBytes;
      BarrierArriveExpect(&stage.full[slot], bytes);
      BulkLoadHint(SharedAddress(stage.rows[slot]), run + size_t(first_row) * kRowBytes, bytes,
                   &stage.full[slot], hint);
    };
    __syncwarp();  // all lanes are through with the unit before
    load(0);
    load(kBatch);

    int row = 0;
    for (int key = 0; key < keys; ++key) {
      const int end = row + __shfl_sync(~0u, count, key);
      if (end == row) continue;
      float* out = dkv_SC + size_t(unit * keys + key) * kScatterColumns;
      float2 old[9];
#pragma unroll
      for (int x = 0; x < 9; ++x) {
        old[x] = __ldcg(reinterpret_cast<float2*>(out + LaneSums<kShort>::Column(lane, x)));
      }
      LaneSums<kShort> sums(lane);
      while (row < end) {
        const int slot = row / kBatch & 1;
        if (row % kBatch == 0) {
          BarrierWait(&stage.full[slot], parity >> slot & 1);
          parity ^= 1 << slot;
        }
        const int stop = min(end, (row / kBatch + 1) * kBatch);
        const uint8_t* at = stage.rows[slot] + row % kBatch * kRowBytes;
#pragma unroll 4
        for (; row < stop; ++row, at += kRowBytes) sums.Add(at);
        if (row % kBatch == 0) {
          __syncwarp();
          load(row + kBatch);
        }
      }
#pragma unroll
      for (int x = 0; x < 9; ++x) {
        *reinterpret_cast<float2*>(out + LaneSums<kShort>::Column(lane, x)) =
            make_float2(old[x].x + sums.pairs[x].x, old[x].y + sums.pairs[x].y);
      }
    }
  }
}

}  // namespace baleen::cuda
