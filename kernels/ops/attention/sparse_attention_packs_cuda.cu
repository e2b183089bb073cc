// Unions of the lists of a pack's queries: one thread block for four queries, which are one pack of
// four or two of two.
//
// Four bits a key in shared memory, one for each query, 64 KB for 128K keys; longer sequences go
// segment by segment. The lists mark their bits (or-ed: any order gives the same), then the
// segment's keys are counted warp by warp and written ascending: a lane looks at 8 neighbouring
// keys (32 in long segments), and the counts of the warps and lanes before it are its place.
//
// Bytes: 4 T K read once, at most as many written; at 4096 queries of 2048 keys 34 MB, 11 us.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/ops/attention/sparse_attention_packs_cuda.h"

namespace baleen {
namespace {

using namespace cuda;  // NOLINT: the device wrappers

constexpr int kThreads = 512, kWarps = kThreads / 32;
constexpr int kQueries = kMostPackedQueries;  // a thread block
constexpr int kSegmentKeys = 1 << 17;
constexpr int kKeysAWord = 8;
static_assert(kThreads * 4 >= 2048, "a thread has four slots of each list");

// This thread's slots of a list, four neighbours so that the threads of a warp seldom mark the same
// word; -1 beyond its end.
__device__ __forceinline__ void LoadSlots(const int32_t* list, int num_selected,
                                          int32_t (&ids)[4]) {
  const int slot = threadIdx.x * 4;
  if (slot + 4 <= num_selected && reinterpret_cast<uint64_t>(list + slot) % 16 == 0) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(list + slot));
    ids[0] = four.x, ids[1] = four.y, ids[2] = four.z, ids[3] = four.w;
  } else {
#pragma unroll
    for (int x = 0; x < 4; ++x) ids[x] = slot + x < num_selected ? __ldg(list + slot + x) : -1;
  }
}

// The lowest bit of each four in `word` that has any: one for each of its eight keys chosen.
__device__ __forceinline__ uint32_t ChosenNibbles(uint32_t word) {
  return (word | word >> 1 | word >> 2 | word >> 3) & 0x11111111u;
}

// The marks of 8 kWords neighbouring keys.
template <int kWords>
struct __align__(4 * kWords) Marks {
  uint32_t words[kWords];

  // What the queries of pack `pack` marked, moved to the lower bits; `bits` has a pack's bits of
  // each four.
  __device__ __forceinline__ Marks OfPack(int pack, int queries, uint32_t bits) const {
    Marks out;
#pragma unroll
    for (int x = 0; x < kWords; ++x) out.words[x] = words[x] >> (pack * queries) & bits;
    return out;
  }
  __device__ __forceinline__ int CountKeys() const {
    uint32_t chosen = 0;  // a bit of each four a word
#pragma unroll
    for (int x = 0; x < kWords; ++x) chosen |= ChosenNibbles(words[x]) << x;
    return __popc(chosen);
  }
  __device__ __forceinline__ void Write(uint32_t first_key, uint32_t * out) const {
#pragma unroll
    for (int x = 0; x < kWords; ++x) {
      for (uint32_t chosen = ChosenNibbles(words[x]); chosen != 0; chosen &= chosen - 1) {
        const int bit = __ffs(chosen) - 1;  // four times the key
        *out++ = (first_key + x * kKeysAWord + bit / 4) | words[x] >> bit << kPackedKeyBits;
      }
    }
  }
};
static_assert(sizeof(Marks<4>) == 16, "");

template <int kWords>
__global__ void __launch_bounds__(kThreads, 3)
    PackSelectedKeysKernel(const SparseAttentionPacks packs, int width, int segment_keys) {
  extern __shared__ __align__(16) uint32_t marks[];  // 4 bits a key
  __shared__ uint32_t warp_counts[kWarps];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first_query = blockIdx.x * kQueries;
  const int queries = packs.queries, num_packs = kQueries / queries;
  const uint32_t bits = queries == kQueries ? ~0u : 0x33333333u;
  const int first_pack = blockIdx.x * num_packs;
  const Marks<kWords>* units = reinterpret_cast<const Marks<kWords>*>(marks);
  constexpr int kKeysAUnit = kKeysAWord * kWords;

  int32_t ids[kQueries][4];
#pragma unroll
  for (int query = 0; query < kQueries; ++query) {
    const int t = first_query + query;
    LoadSlots(packs.ids_TK + size_t(t) * packs.num_selected,
              t < packs.num_tokens ? packs.num_selected : 0, ids[query]);
  }

  // Counts of both packs in one word: the second one's in the upper half.
  uint32_t total = 0;
  for (int base = 0; base < packs.num_keys; base += segment_keys) {
    const int keys = min(segment_keys, packs.num_keys - base);
    const int num_units = (keys + kKeysAUnit - 1) / kKeysAUnit;
    for (int x = thread; x < (keys + 31) / 32; x += kThreads) {
      reinterpret_cast<uint4*>(marks)[x] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
#pragma unroll
    for (int x = 0; x < 4 * kQueries; ++x) {
      const int query = x / 4;
      const int32_t id = ids[query][x % 4];
      const uint32_t key = uint32_t(id) - uint32_t(base);
      if (id >= 0 && key < uint32_t(keys)) {
        atomicOr(&marks[key / kKeysAWord], 1u << (4 * (key % kKeysAWord) + query));
      }
    }
    __syncthreads();

    // Each warp has a run of units.
    const int units_a_warp = (num_units + kThreads - 1) / kThreads * 32;
    const int begin = warp * units_a_warp, end = min(begin + units_a_warp, num_units);
    const auto count_both = [&](const Marks<kWords>& unit) {
      uint32_t count = unit.OfPack(0, queries, bits).CountKeys();
      if (num_packs == 2) count += unit.OfPack(1, queries, bits).CountKeys() << 16;
      return count;
    };
    uint32_t count = 0;
    for (int x = begin + lane; x < end; x += 32) count += count_both(units[x]);
    count = __reduce_add_sync(~0u, count);
    if (lane == 0) warp_counts[warp] = count;
    __syncthreads();
    uint32_t place = total;
    for (int other = 0; other < kWarps; ++other) {
      if (other < warp) place += warp_counts[other];
      total += warp_counts[other];
    }
    for (int x = begin; x < end; x += 32) {
      const Marks<kWords> unit = x + lane < end ? units[x + lane] : Marks<kWords>{};
      const uint32_t own = count_both(unit);
      if (!__any_sync(~0u, own != 0)) continue;
      uint32_t scan = own;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const uint32_t before = __shfl_up_sync(~0u, scan, step);
        if (lane >= step) scan += before;
      }
      const uint32_t at = place + scan - own;
      for (int pack = 0; pack < num_packs; ++pack) {
        unit.OfPack(pack, queries, bits)
            .Write(base + (x + lane) * kKeysAUnit, packs.entries_IU +
                                                       size_t(first_pack + pack) * width +
                                                       (pack == 0 ? at & 0xFFFF : at >> 16));
      }
      place += __shfl_sync(~0u, scan, 31);
    }
    __syncthreads();  // the marks are read
  }
  for (int pack = 0; pack < num_packs; ++pack) {
    if (first_query + pack * queries >= packs.num_tokens) break;
    const int count = pack == 0 ? total & 0xFFFF : total >> 16;
    if (thread == 0) packs.counts_I[first_pack + pack] = count;
    if (count % 64 != 0 && thread < 64 - count % 64) {
      packs.entries_IU[size_t(first_pack + pack) * width + count + thread] = 0;
    }
  }
}

template <int kWords>
void Launch(const SparseAttentionPacks& packs, void* stream) {
  constexpr char kName[] = "packs of sparse attention";
  const int segment = std::min(kSegmentKeys, (packs.num_keys + 31) / 32 * 32);
  auto* kernel = PackSelectedKeysKernel<kWords>;
  CheckCuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSegmentKeys / 2),
      kName);
  kernel<<<(packs.num_tokens + kQueries - 1) / kQueries, kThreads, segment / 2, AsStream(stream)>>>(
      packs, packs.Width(), segment);
  CheckLaunch(kName);
}

}  // namespace

void LaunchPackSelectedKeys(const SparseAttentionPacks& packs, void* stream) {
  if (packs.num_tokens == 0) return;
  // Small segments have too few runs of 32 keys for all threads.
  if (packs.num_keys <= 1 << 15) {
    Launch<1>(packs, stream);
  } else {
    Launch<4>(packs, stream);
  }
}

}  // namespace baleen
