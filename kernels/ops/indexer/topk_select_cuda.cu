// Exact top-k, the lowest index winning ties: sample, one streaming read, select in shared memory.
//
// Roofline: a row of n fp32 scores must be read once: 4n bytes, 0.175 us at n = 128K and 3 TB/s.
// Radix selection over global memory reads it three to five times; here it is read once, plus
// a sample: 1/8 of a row of 8K, 1/32 of one of 128K.
//
// One block of 512 threads owns one row, up to three blocks share an SM (one at 2^18 keys), so that
// one row's short shared-memory phases hide behind the streaming of another. In a block:
//   1. Sample: 1K-4K scores in 64-byte pieces, evenly spaced. Their exact order statistic gives
//      `floor`, a score that about 1.2 k to 1.8 k of the whole row exceed (its rank is chosen
//      several standard deviations off both bad sides).
//   2. Stream: every thread reads four float4 at a time. Scores above `floor` are appended as
//      (key, index) to a candidate list in shared memory (a warp scan and one shared atomic per
//      warp and 512 scores); scores equal to `floor` only set a bit in `ties`, one bit per
//      position, so that a plateau of equal scores cannot overflow.
//   3. Select: radix selection with 11-bit digits among the candidates, digits counted from the
//      candidates' own minimum and cut to their range, so two rounds nearly always end it.
//   4. Emit: winners set their bit in `taken`, scores equal to the threshold in `ties`; a block
//      scan over the words of both bitmaps keeps the lowest-index ties and gives every winner its
//      place: ascending ids, no sort.
// The sample decides only how much work is done, never the result. If it misleads (fewer than k
// found, or the list overflows) the row falls back to radix selection over global memory: 5 reads,
// same result. Lists are filled in an order that depends on timing, but only sets leave a phase,
// so the output bits do not.
//
// Scores are compared as unsigned keys: the usual order-preserving image of the float's bits, with
// -0.0 mapped to +0.0. Key 0 belongs to no number and stands for "no score here".
#include <algorithm>
#include <climits>

#include "kernels/ops/indexer/topk_select_cuda.h"

namespace baleen {
namespace {

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kVecsPerThread = 4;     // float4 loads in flight per thread
constexpr int kMaxCandidates = 6144;  // 48 KiB of (key, index)
constexpr int kDirectKeys = 4096;     // shorter windows are candidates as a whole
constexpr int kDigitBits = 11;
constexpr int kBins = 1 << kDigitBits;
static_assert(kBins == 4 * kThreads, "FindBin gives each thread four bins");
static_assert(kBins >= kTopkSelectMaxK, "ids are staged over the histogram");

constexpr unsigned kAllLanes = 0xffffffffu;

struct Shared {
  uint32_t hist[kBins];  // also stages the ids at the end
  uint32_t keys[kMaxCandidates];
  uint32_t positions[kMaxCandidates];
  uint32_t warp_values[2][kWarps];
  uint32_t bin, above, in_bin;
  uint32_t num_candidates, num_floor_ties, has_nan;
  uint32_t bitmaps[1];  // taken[words], then ties[words]
};

// A row's window, seen as float4 vectors from the 16-byte boundary at or below its first score.
struct Window {
  const float* scores;  // of the row
  int begin, end;
  int first;  // position of element 0 of vector 0; up to 3 below begin
  int num_vecs;
};

// The k highest are: every key >= cut, and the first `ties_taken` (by position) of the `ties` keys
// equal to cut - 1.
struct Threshold {
  uint32_t cut;
  uint32_t ties_taken;
  uint32_t ties;
};

__device__ __forceinline__ uint32_t OrderedKey(uint32_t bits) {
  if (bits == 0x80000000u) bits = 0;
  return bits ^ (static_cast<uint32_t>(static_cast<int32_t>(bits) >> 31) | 0x80000000u);
}

__device__ __forceinline__ bool IsNan(uint32_t bits) { return (bits << 1) > 0xff000000u; }

// Reads vector v; *valid has a bit for each element inside the window, the others are arbitrary.
__device__ __forceinline__ uint4 LoadVec(const Window& w, int v, unsigned* valid) {
  const int position = w.first + 4 * v;
  const float* p = w.scores + position;
  if (v < w.num_vecs && position >= w.begin && position + 4 <= w.end) {
    *valid = 15u;
    return __ldcs(reinterpret_cast<const uint4*>(p));
  }
  *valid = 0;
  uint32_t x[4] = {0, 0, 0, 0};
  if (v < w.num_vecs) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (position + e >= w.begin && position + e < w.end) {
        x[e] = __float_as_uint(p[e]);
        *valid |= 1u << e;
      }
    }
  }
  return make_uint4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ uint32_t WarpInclusiveScan(uint32_t value) {
  const int lane = threadIdx.x & 31;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const uint32_t other = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += other;
  }
  return value;
}

// Sum of `value` over the threads before this one; *total over all. Two barriers.
__device__ uint32_t BlockExclusiveScan(Shared& sh, uint32_t value, uint32_t* total) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const uint32_t inclusive = WarpInclusiveScan(value);
  if (lane == 31) sh.warp_values[0][warp] = inclusive;
  __syncthreads();
  const uint32_t sum = lane < kWarps ? sh.warp_values[0][lane] : 0;
  const uint32_t before = __reduce_add_sync(kAllLanes, lane < warp ? sum : 0);
  *total = __reduce_add_sync(kAllLanes, sum);
  __syncthreads();
  return before + inclusive - value;
}

// Finds, from the top, the bin of the histogram that holds the rank-th key (rank >= 1): sets
// sh.bin, sh.above (keys in higher bins) and sh.in_bin. Leaves the histogram zero. The caller has a
// barrier after filling it.
__device__ void FindBin(Shared& sh, uint32_t rank) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int first_bin = kBins - 4 - 4 * static_cast<int>(threadIdx.x);
  uint4* bins = reinterpret_cast<uint4*>(&sh.hist[first_bin]);
  const uint4 count = *bins;
  *bins = make_uint4(0, 0, 0, 0);
  const uint32_t sum = count.x + count.y + count.z + count.w;
  const uint32_t inclusive = WarpInclusiveScan(sum);
  if (lane == 31) sh.warp_values[0][warp] = inclusive;
  __syncthreads();
  uint32_t above =
      __reduce_add_sync(kAllLanes, lane < warp ? sh.warp_values[0][lane] : 0) + inclusive - sum;
  if (above < rank && rank <= above + sum) {
    const uint32_t from_top[4] = {count.w, count.z, count.y, count.x};
    int i = 0;
#pragma unroll
    for (int e = 0; e < 3; ++e) {
      if (i == e && rank > above + from_top[e]) {
        above += from_top[e];
        i = e + 1;
      }
    }
    sh.bin = first_bin + 3 - i;
    sh.above = above;
    sh.in_bin = i == 0 ? count.w : i == 1 ? count.z : i == 2 ? count.y : count.x;
  }
  __syncthreads();
}

// Threshold of the rank highest among keys[0..n), 1 <= rank <= n. The histogram is zero before and
// after.
__device__ Threshold SelectShared(Shared& sh, int n, uint32_t rank) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint32_t low = UINT_MAX, high = 0;
  for (int i = threadIdx.x; i < n; i += kThreads) {
    low = min(low, sh.keys[i]);
    high = max(high, sh.keys[i]);
  }
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  if (lane == 0) {
    sh.warp_values[0][warp] = low;
    sh.warp_values[1][warp] = high;
  }
  __syncthreads();
  low = __reduce_min_sync(kAllLanes, sh.warp_values[0][lane & (kWarps - 1)]);
  high = __reduce_max_sync(kAllLanes, sh.warp_values[1][lane & (kWarps - 1)]);
  __syncthreads();

  // Each round narrows [low, low + last] to one bin of 2^shift keys.
  uint32_t last = high - low;
  int shift = max(0, 32 - __clz(last) - kDigitBits);
  while (true) {
    for (int i = threadIdx.x; i < n; i += kThreads) {
      const uint32_t offset = sh.keys[i] - low;
      if (offset <= last) atomicAdd(&sh.hist[offset >> shift], 1u);
    }
    __syncthreads();
    FindBin(sh, rank);
    low += sh.bin << shift;
    rank -= sh.above;
    const uint32_t in_bin = sh.in_bin;
    if (in_bin == rank) return {low, 0, 0};
    if (shift == 0) return {low + 1, rank, in_bin};
    last = (1u << shift) - 1;
    shift = max(0, shift - kDigitBits);
  }
}

// Calls visit(position - first, bits) for each score of the window.
template <class Visit>
__device__ __forceinline__ void ForEachScore(const Window& w, Visit visit) {
  for (int v = threadIdx.x; v < w.num_vecs; v += kThreads) {
    unsigned valid;
    const uint4 x = LoadVec(w, v, &valid);
    const uint32_t bits[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (valid >> e & 1) visit(4 * v + e, bits[e]);
    }
  }
}

__device__ __forceinline__ void SetBit(uint32_t* bitmap, uint32_t i) {
  atomicOr(&bitmap[i >> 5], 1u << (i & 31));
}

// The key that the rank-th of an evenly spaced sample has; rank is chosen so that clearly more than
// topk, and clearly fewer than kMaxCandidates, of the window exceed it.
__device__ uint32_t SampleFloor(Shared& sh, const Window& w, int topk) {
  const int n = w.end - w.begin;
  const int samples = min(4096, max(1024, (n / 16) & ~(4 * kThreads - 1)));
  const int pieces = samples / 16,
            pieces_in_row = (w.num_vecs - 2) / 4;  // the outermost vectors may be partial
  for (int s = threadIdx.x; s < samples / 4; s += kThreads) {
    const int v = 1 + (s / 4) * pieces_in_row / pieces * 4 + s % 4;
    const uint4 x = __ldg(reinterpret_cast<const uint4*>(w.scores + w.first + 4 * v));
    sh.keys[4 * s + 0] = OrderedKey(x.x);
    sh.keys[4 * s + 1] = OrderedKey(x.y);
    sh.keys[4 * s + 2] = OrderedKey(x.z);
    sh.keys[4 * s + 3] = OrderedKey(x.w);
  }
  // `expected` of the sample are winners, give or take sqrt(expected): aim eight deviations higher,
  // but not above the geometric middle between topk and the room for candidates.
  const float expected = static_cast<float>(topk) * samples / n;
  const float wanted = min(topk * (1.0f + 8.0f * rsqrtf(expected)),
                           sqrtf(static_cast<float>(topk) * kMaxCandidates));
  const int rank = min(samples, static_cast<int>(wanted * samples / n) + 1);
  __syncthreads();
  const Threshold t = SelectShared(sh, samples, rank);
  return t.ties_taken > 0 ? t.cut - 1 : t.cut;
}

// One read of the window: keys above floor go to the candidates, keys equal to it to the bitmap of
// ties.
__device__ void CollectCandidates(Shared& sh, const Window& w, uint32_t floor, uint32_t* ties) {
  const int lane = threadIdx.x & 31;
  uint32_t nan_bits = 0, floor_ties = 0;
  for (int v0 = 0; v0 < w.num_vecs; v0 += kThreads * kVecsPerThread) {
    uint32_t key[4 * kVecsPerThread];
    unsigned valid[kVecsPerThread];
    uint4 x[kVecsPerThread];
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i)
      x[i] = LoadVec(w, v0 + i * kThreads + threadIdx.x, &valid[i]);
    unsigned above = 0, equal = 0;
#pragma unroll
    for (int i = 0; i < kVecsPerThread; ++i) {
      const uint32_t bits[4] = {x[i].x, x[i].y, x[i].z, x[i].w};
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int j = 4 * i + e;
        key[j] = (valid[i] >> e & 1) ? OrderedKey(bits[e]) : 0;
        nan_bits |= (valid[i] >> e & 1) && IsNan(bits[e]);
        above |= static_cast<unsigned>(key[j] > floor) << j;
        equal |= static_cast<unsigned>(key[j] == floor) << j;
      }
    }
    if (floor != 0 && equal != 0) {
      floor_ties += __popc(equal);
#pragma unroll
      for (int i = 0; i < kVecsPerThread; ++i) {
        const unsigned nibble = equal >> (4 * i) & 15u;
        const int bit = 4 * (v0 + i * kThreads + static_cast<int>(threadIdx.x));
        if (nibble != 0) atomicOr(&ties[bit >> 5], nibble << (bit & 31));
      }
    }
    if (!__any_sync(kAllLanes, above != 0)) continue;
    const uint32_t count = __popc(above);
    const uint32_t inclusive = WarpInclusiveScan(count);
    uint32_t place = 0;
    if (lane == 31) place = atomicAdd(&sh.num_candidates, inclusive);
    place = __shfl_sync(kAllLanes, place, 31) + inclusive - count;
#pragma unroll
    for (int j = 0; j < 4 * kVecsPerThread; ++j) {
      if (above >> j & 1) {
        if (place < kMaxCandidates) {
          sh.keys[place] = key[j];
          sh.positions[place] = 4 * (v0 + (j / 4) * kThreads + threadIdx.x) + j % 4;
        }
        ++place;
      }
    }
  }
  if (nan_bits != 0) sh.has_nan = 1;
  if (floor_ties != 0) atomicAdd(&sh.num_floor_ties, floor_ties);
  __syncthreads();
}

// Radix selection over global memory; for windows that the sample misjudged. The histogram is zero
// before and after.
__device__ Threshold SelectGlobal(Shared& sh, const Window& w, uint32_t rank) {
  uint32_t low = 0, last = UINT_MAX;
  int shift = 32 - kDigitBits;
  while (true) {
    ForEachScore(w, [&](int, uint32_t bits) {
      const uint32_t offset = OrderedKey(bits) - low;
      if (offset <= last) atomicAdd(&sh.hist[offset >> shift], 1u);
    });
    __syncthreads();
    FindBin(sh, rank);
    low += sh.bin << shift;
    rank -= sh.above;
    const uint32_t in_bin = sh.in_bin;
    if (in_bin == rank) return {low, 0, 0};
    if (shift == 0) return {low + 1, rank, in_bin};
    last = (1u << shift) - 1;
    shift = max(0, shift - kDigitBits);
  }
}

// One id of a row and, if asked for, its score.
__device__ __forceinline__ void WriteChosen(const TopkSelectArgs& args, int row,
                                            const float* scores, int slot, int id) {
  const int64_t place = static_cast<int64_t>(row) * args.topk + slot;
  args.ids_TK[place] = id;
  if (args.chosen_scores_TK != nullptr)
    args.chosen_scores_TK[place] = id >= 0 ? __ldg(scores + id) : 0.0f;
}

// Turns the bitmaps into ids: all of `taken`, and the first ties_taken of `ties`. Fills the row up
// with -1.
__device__ void EmitIds(Shared& sh, uint32_t* taken, const uint32_t* ties, int words,
                        uint32_t ties_taken, const TopkSelectArgs& args, int row, const Window& w) {
  const int per_thread = (words + kThreads - 1) / kThreads;
  const int from = min(words, per_thread * static_cast<int>(threadIdx.x)),
            to = min(words, from + per_thread);
  uint32_t total;
  if (ties_taken > 0) {
    uint32_t count = 0;
    for (int i = from; i < to; ++i) count += __popc(ties[i]);
    uint32_t before = BlockExclusiveScan(sh, count, &total);
    for (int i = from; i < to && before < ties_taken; ++i) {
      uint32_t word = ties[i];
      uint32_t room = ties_taken - before;
      before += __popc(word);
      uint32_t kept = word;
      if (__popc(word) > room) {
        kept = 0;
        for (; room > 0; --room) {
          kept |= word & -word;
          word &= word - 1;
        }
      }
      taken[i] |= kept;
    }
  }
  uint32_t count = 0;
  for (int i = from; i < to; ++i) count += __popc(taken[i]);
  uint32_t place = BlockExclusiveScan(sh, count, &total);
  for (int i = from; i < to; ++i) {
    for (uint32_t word = taken[i]; word != 0; word &= word - 1)
      sh.hist[place++] = w.first + 32 * i + __ffs(word) - 1;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < args.topk; i += kThreads) {
    WriteChosen(args, row, w.scores, i, i < total ? static_cast<int>(sh.hist[i]) : -1);
  }
}

__device__ void ZeroWords(uint32_t* words, int n) {
  for (int i = threadIdx.x; i < n; i += kThreads) words[i] = 0;
}

// A window of at most topk keys is its own answer.
__device__ void EmitWholeWindow(Shared& sh, const Window& w, const TopkSelectArgs& args, int row) {
  for (int i = w.begin + threadIdx.x; i < w.end; i += kThreads) {
    if (IsNan(__float_as_uint(w.scores[i]))) sh.has_nan = 1;
  }
  __syncthreads();
  const bool valid = sh.has_nan == 0;
  for (int i = threadIdx.x; i < args.topk; i += kThreads) {
    WriteChosen(args, row, w.scores, i, valid && i < w.end - w.begin ? w.begin + i : -1);
  }
}

__global__ void __launch_bounds__(kThreads, 2) TopkSelectKernel(const TopkSelectArgs args) {
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  Shared& sh = *reinterpret_cast<Shared*>(shared_bytes);
  // Under a causal window the last rows are the longest: they start first.
  const int row = args.num_rows - 1 - static_cast<int>(blockIdx.x);
  Window w;
  w.scores = args.scores_TS + row * args.score_stride;
  w.begin = args.key_begin_T != nullptr ? max(0, args.key_begin_T[row]) : 0;
  w.end = args.key_end_T != nullptr ? min(args.num_keys, args.key_end_T[row]) : args.num_keys;
  w.end = max(w.begin, w.end);
  w.first = w.begin -
            static_cast<int>(reinterpret_cast<uintptr_t>(w.scores + w.begin) / sizeof(float) % 4);
  w.num_vecs = (w.end - w.first + 3) / 4;
  const int words = (w.num_vecs + 7) / 8;
  uint32_t* taken = sh.bitmaps;
  uint32_t* ties = sh.bitmaps + words;
  const int n = w.end - w.begin;

  if (threadIdx.x == 0) sh.num_candidates = sh.num_floor_ties = sh.has_nan = 0;
  Threshold threshold = {0, 0, 0};
  if (n <= args.topk) {
    __syncthreads();
    EmitWholeWindow(sh, w, args, row);
  } else {
    ZeroWords(sh.hist, kBins);
    ZeroWords(sh.bitmaps, 2 * words);
    __syncthreads();
    const uint32_t topk = args.topk;
    const uint32_t floor = n <= kDirectKeys ? 0 : SampleFloor(sh, w, args.topk);
    CollectCandidates(sh, w, floor, ties);
    const uint32_t candidates = sh.num_candidates, floor_ties = sh.num_floor_ties;
    if (sh.has_nan != 0) {
      threshold = {0, 0, 0};  // nothing is chosen: `taken` stays empty
    } else if (candidates <= kMaxCandidates && candidates + floor_ties >= topk) {
      if (candidates >= topk) {
        // The threshold lies above the floor, whose ties are out.
        if (floor_ties > 0) ZeroWords(ties, words);
        threshold = SelectShared(sh, candidates, topk);
      } else {
        const uint32_t need = topk - candidates;
        threshold = {floor + 1, need, floor_ties};
      }
      for (uint32_t i = threadIdx.x; i < candidates; i += kThreads) {
        if (sh.keys[i] >= threshold.cut) {
          SetBit(taken, sh.positions[i]);
        } else if (threshold.ties_taken > 0 && sh.keys[i] == threshold.cut - 1) {
          SetBit(ties, sh.positions[i]);
        }
      }
    } else {
      ZeroWords(ties, words);
      threshold = SelectGlobal(sh, w, topk);
      ForEachScore(w, [&](int i, uint32_t bits) {
        const uint32_t key = OrderedKey(bits);
        if (key >= threshold.cut) {
          SetBit(taken, i);
        } else if (threshold.ties_taken > 0 && key == threshold.cut - 1) {
          SetBit(ties, i);
        }
      });
    }
    __syncthreads();
    EmitIds(sh, taken, ties, words, threshold.ties_taken, args, row, w);
  }
  if (threadIdx.x == 0) {
    if (args.ties_cut_T != nullptr) args.ties_cut_T[row] = threshold.ties - threshold.ties_taken;
    if (sh.has_nan != 0 && args.first_nan_row != nullptr) atomicMin(args.first_nan_row, row);
  }
}

}  // namespace

TopkSelectPlan PlanTopkSelect(int num_rows, int num_keys) {
  // A window may start 3 elements past its first vector, so one word more than num_keys / 32
  // rounded up.
  const int words = (num_keys + 3 + 31) / 32 + 1;
  TopkSelectPlan plan;
  plan.num_blocks = num_rows;
  plan.threads = kThreads;
  plan.shared_bytes =
      static_cast<int>(sizeof(Shared)) + 2 * words * static_cast<int>(sizeof(uint32_t));
  return plan;
}

cudaError_t LaunchTopkSelect(const TopkSelectArgs& args, cudaStream_t stream) {
  if (args.num_rows == 0) return cudaSuccess;
  if (args.num_rows < 0 || args.num_keys < 0 || args.num_keys > kTopkSelectMaxKeys ||
      args.topk < 1 || args.topk > kTopkSelectMaxK || args.score_stride < args.num_keys ||
      args.ids_TK == nullptr) {
    return cudaErrorInvalidValue;
  }
  const TopkSelectPlan plan = PlanTopkSelect(args.num_rows, args.num_keys);
  cudaError_t error = cudaFuncSetAttribute(
      TopkSelectKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  TopkSelectKernel<<<plan.num_blocks, plan.threads, plan.shared_bytes, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace baleen
