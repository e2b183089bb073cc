// Indexer backward, kernel 3: softmax, loss and delta of the four rows of a group, the union of
// their lists and the mass of its keys. See indexer_backward_cuda.cu.
#pragma once

#include "kernels/ops/indexer/indexer_backward_params.cuh"

namespace baleen::indexer_backward {

constexpr int kGroupThreads = 512;
constexpr int kRowThreads = kGroupThreads / kGroupRows;
constexpr int kMaxK = kIndexerBackwardMaxK;
constexpr int kPerThread = kMaxK / kRowThreads;  // entries n * kRowThreads + thread of its row
constexpr int kPieces = kMaxK / 32;              // of 32 entries of a row
constexpr int kOwned = kMaxK / kGroupThreads;    // entries n * kGroupThreads + thread of each row
constexpr int kSets = 15;
constexpr int kRowPairs = 6;
constexpr int kElsewhere = 0xffff;  // in `places`: an earlier row of the group has the key too

// A block has one group; 111 KB, so that two share a multiprocessor.
struct GroupShared {
  int ids[kGroupRows][kMaxK];          // padded with INT_MAX; at the end the slots
  float values[kGroupRows][kMaxK];     // p, then delta, at the end in the order of the slots
  uint16_t found[kRowPairs][kMaxK];    // where the later row of a pair has this key, if it has
  uint16_t places[kGroupRows][kMaxK];  // of an entry's delta in the group's
  int before[kSets * kPieces + 1];     // entries of a set in a piece, then slots before them
  int first_delta[16];
  float warp_values[4][kGroupThreads / 32];
  int warp_sums[kGroupThreads / 32];
};

// Pairs of rows in the order (0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3).
__device__ __forceinline__ int RowPair(int early, int late) {
  return early * (5 - early) / 2 + late - 1;
}

// Neighbours in this order differ by one row (Gray code), so that tiles with slots of two sets have
// no more rows than the larger.
__device__ __forceinline__ int SetOrder(int set) {
  return (set ^ set >> 1 ^ set >> 2 ^ set >> 3) - 1;
}

// Over the threads of one row; all threads call.
template <class Combine>
__device__ float RowReduce(GroupShared& sh, int slot, float value, Combine combine) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2)
    value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
  if (threadIdx.x % 32 == 0) sh.warp_values[slot][threadIdx.x / 32] = value;
  __syncthreads();
  const float* of_row = sh.warp_values[slot] + threadIdx.x / kRowThreads * (kRowThreads / 32);
  value = of_row[0];
#pragma unroll
  for (int i = 1; i < kRowThreads / 32; ++i) value = combine(value, of_row[i]);
  return value;
}

// Ids, and the softmax with loss and delta, of this thread's row. Every warp writes what it alone
// reads, but for ids.
__device__ void Softmax(GroupShared& sh, const Params& params, int64_t row, int r, int thread) {
  const IndexerBackwardArgs& args = params.args;
  const float* given = args.scores_TK != nullptr ? args.scores_TK : params.scores_TK;
  const auto add = [](float a, float b) { return a + b; };
  float score[kPerThread], highest = -INFINITY, p_sum = 0, loss = 0;
#pragma unroll
  for (int n = 0; n < kPerThread; ++n) {
    const int i = n * kRowThreads + thread;
    const bool inside = row < args.num_rows && i < args.topk;
    const int64_t at = row * args.topk + i;
    const int id = inside ? __ldg(args.ids_TK + at) : -1;
    const float p = id >= 0 ? args.target_scale * __ldcs(args.target_TK + at) : 0.0f;
    score[n] = id >= 0 ? __ldcs(given + at) : -INFINITY;
    sh.ids[r][i] = id >= 0 ? id : INT_MAX;
    sh.values[r][i] = p;
    highest = fmaxf(highest, score[n]);
    p_sum += p;
    if (p > 0) loss += p * (__logf(p) - score[n]);
  }
  highest = RowReduce(sh, 0, highest, [](float a, float b) { return fmaxf(a, b); });
  float sum = 0;
#pragma unroll
  for (int n = 0; n < kPerThread; ++n) {
    score[n] = score[n] > -INFINITY ? __expf(score[n] - highest) : 0.0f;
    sum += score[n];
  }
  sum = RowReduce(sh, 1, sum, add);
  p_sum = RowReduce(sh, 2, p_sum, add);
  loss = RowReduce(sh, 3, loss, add);
  if (thread == 0 && row < args.num_rows)
    args.loss_T[row] = sum > 0 ? loss + p_sum * (highest + logf(sum)) : 0.0f;
  const float pi_scale = sum > 0 ? p_sum / sum : 0.0f;
#pragma unroll
  for (int n = 0; n < kPerThread; ++n) {
    float& value = sh.values[r][n * kRowThreads + thread];
    value = score[n] * pi_scale - value;
  }
}

// For each entry of this thread's the rows from its own on that have its key (0: no key), and where
// they have it. Lists that are not ascending are left as they are: right, but every row's keys are
// added by themselves.
__device__ __forceinline__ void FindMatches(GroupShared& sh, int (&sets)[kGroupRows][kOwned]) {
  bool ascending = true;
#pragma unroll
  for (int r = 0; r < kGroupRows; ++r) {
#pragma unroll
    for (int n = 0; n < kOwned; ++n) {
      const int i = n * kGroupThreads + threadIdx.x, id = sh.ids[r][i];
      sh.places[r][i] = 0;
      sets[r][n] = id != INT_MAX ? 1 << r : 0;
      if (i + 1 < kMaxK) ascending &= id < sh.ids[r][i + 1] || sh.ids[r][i + 1] == INT_MAX;
    }
  }
  if (!__syncthreads_and(ascending)) return;
#pragma unroll
  for (int early = 0; early < kGroupRows; ++early) {
#pragma unroll
    for (int late = early + 1; late < kGroupRows; ++late) {
      const int* list = sh.ids[late];
#pragma unroll
      for (int n = 0; n < kOwned; ++n) {
        const int i = n * kGroupThreads + threadIdx.x, id = sh.ids[early][i];
        int low = 0;
#pragma unroll
        for (int step = kMaxK / 2; step > 0; step /= 2) {
          if (list[low + step - 1] < id) low += step;
        }
        if (id != INT_MAX && list[low] == id) {
          sh.found[RowPair(early, late)][i] = low;
          sh.places[late][low] = kElsewhere;
          sets[early][n] |= 1 << late;
        }
      }
    }
  }
}

// Turns the counts of sets in pieces into the slots before them; before[last] = all.
__device__ __forceinline__ void ScanPieces(GroupShared& sh) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, at = 2 * threadIdx.x;
  constexpr int kCounts = kSets * kPieces;
  const int first = at < kCounts ? sh.before[at] : 0;
  const int sum = first + (at + 1 < kCounts ? sh.before[at + 1] : 0);
  int inclusive = sum;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) sh.warp_sums[warp] = inclusive;
  __syncthreads();
  int before = inclusive - sum;
  for (int w = 0; w < warp; ++w) before += sh.warp_sums[w];
  if (at <= kCounts) sh.before[at] = before;
  if (at + 1 <= kCounts) sh.before[at + 1] = before + first;
}

// first_delta of every set, by the first warp.
__device__ __forceinline__ void FindFirstDeltas(GroupShared& sh) {
  const int set = threadIdx.x + 1;  // lanes 0 .. 14
  int order = 0, begin = 0, deltas = 0;
  if (set <= kSets) {
    order = SetOrder(set);
    begin = sh.before[order * kPieces];
    deltas = (sh.before[(order + 1) * kPieces] - begin) * __popc(set);
  }
  int before = 0;
  for (int lane = 0; lane < kSets; ++lane) {
    const int their_order = __shfl_sync(kAllLanes, order, lane);
    const int theirs = __shfl_sync(kAllLanes, deltas, lane);
    if (their_order < order) before += theirs;
  }
  if (set <= kSets) sh.first_delta[set] = before - begin * __popc(set);
  if (set == kSets + 1) sh.first_delta[0] = 0;
}

__global__ void __launch_bounds__(kGroupThreads, 2) GroupKernel(const Params params) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  GroupShared& sh = *reinterpret_cast<GroupShared*>(raw_shared);
  const IndexerBackwardArgs& args = params.args;
  const int thread = threadIdx.x % kRowThreads, r = threadIdx.x / kRowThreads;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t group = blockIdx.x, first_row = group * kGroupRows;
  for (int i = threadIdx.x; i < kSets * kPieces; i += kGroupThreads) sh.before[i] = 0;
  Softmax(sh, params, first_row + r, r, thread);
  __syncthreads();
  int sets[kGroupRows][kOwned];
  FindMatches(sh, sets);
  __syncthreads();

  // An entry that no earlier row has is a slot. Its rank among those of its piece and set.
  const auto count_at = [&](int set, int n) -> int& {
    return sh.before[SetOrder(set) * kPieces + n * (kGroupThreads / 32) + warp];
  };
  int slots[kGroupRows][kOwned];  // rank, then the slot's number; -1: none
#pragma unroll
  for (int row = 0; row < kGroupRows; ++row) {
#pragma unroll
    for (int n = 0; n < kOwned; ++n) {
      int& set = sets[row][n];
      if (sh.places[row][n * kGroupThreads + threadIdx.x] == kElsewhere) set = 0;
      const unsigned same = __match_any_sync(kAllLanes, set);
      const int rank = __popc(same & ((1u << lane) - 1));
      if (rank == 0 && set != 0) count_at(set, n) = __popc(same);
      slots[row][n] = rank;
    }
  }
  __syncthreads();
  ScanPieces(sh);
  __syncthreads();
  if (threadIdx.x < 32) FindFirstDeltas(sh);
  __syncthreads();

  // Where everything goes; the mass of the keys.
  float bounds[kGroupRows];
#pragma unroll
  for (int row = 0; row < kGroupRows; ++row)
    bounds[row] = first_row + row < args.num_rows ? params.bound_T[first_row + row] : 0.0f;
  const float unit = PowerOfTwo(32 - BoundExponent(params));
#pragma unroll
  for (int row = 0; row < kGroupRows; ++row) {
#pragma unroll
    for (int n = 0; n < kOwned; ++n) {
      const int i = n * kGroupThreads + threadIdx.x, set = sets[row][n];
      slots[row][n] = set != 0 ? count_at(set, n) + slots[row][n] : -1;
      if (set == 0) continue;
      int place = sh.first_delta[set] + slots[row][n] * __popc(set);
      float mass = 0;  // rounded up at every step
#pragma unroll
      for (int late = row; late < kGroupRows; ++late) {
        if (late > row && !(set >> late & 1)) continue;
        const int at = late == row ? i : sh.found[RowPair(row, late)][i];
        sh.places[late][at] = place++;
        mass = __fmaf_ru(fabsf(sh.values[late][at]), bounds[late], mass);
      }
      const int id = sh.ids[row][i];
      if (mass != 0) atomicAdd(&params.mass_S[id], __float2ull_ru(mass * unit) + 1);
      sets[row][n] = id | static_cast<int>(static_cast<unsigned>(set) << kSetShift);
    }
  }
  __syncthreads();

  // Into their order in shared memory, then out.
  int* staged_slots = &sh.ids[0][0];
  float* staged_deltas = &sh.values[0][0];
  const int num_slots = sh.before[kSets * kPieces];
  const int num_tiles = max(1, (num_slots + kTileKeys - 1) / kTileKeys);
  float delta[kGroupRows][kOwned];
  int place[kGroupRows][kOwned];
#pragma unroll
  for (int row = 0; row < kGroupRows; ++row) {
#pragma unroll
    for (int n = 0; n < kOwned; ++n) {
      const int i = n * kGroupThreads + threadIdx.x;
      delta[row][n] = sh.values[row][i];
      place[row][n] = sh.ids[row][i] != INT_MAX ? sh.places[row][i] : -1;
    }
  }
  __syncthreads();
#pragma unroll
  for (int row = 0; row < kGroupRows; ++row) {
#pragma unroll
    for (int n = 0; n < kOwned; ++n) {
      if (slots[row][n] >= 0) staged_slots[slots[row][n]] = sets[row][n];
      if (place[row][n] >= 0) staged_deltas[place[row][n]] = delta[row][n];
    }
  }
  __syncthreads();
  int* out_slots = params.slots + group * params.num_slots;
  for (int i = threadIdx.x; i < num_tiles * kTileKeys; i += kGroupThreads)
    out_slots[i] = i < num_slots ? staged_slots[i] : 0;
  const int room = kGroupRows * args.topk;
  float* out_deltas = params.deltas + group * room;
  for (int i = threadIdx.x; i < room; i += kGroupThreads) out_deltas[i] = staged_deltas[i];
  Group& out = params.groups[group];
  if (threadIdx.x < 16) out.first_delta[threadIdx.x] = sh.first_delta[threadIdx.x];
  if (threadIdx.x == 16) out.num_tiles = num_tiles;
}

}  // namespace baleen::indexer_backward
