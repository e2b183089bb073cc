// Unions of the lists of a pack's queries: one thread block for four queries, which are one pack of
// four or two of two.
//
// Four bits a key in shared memory, one for each query, 64 KB for 128K keys; longer sequences go
// segment by segment. The lists mark their bits (or-ed: any order gives the same). A thread has a
// run of neighbouring keys: it counts those that are marked, the counts of the threads before it
// are its place, and it lays its entries into shared memory, from where they leave in runs of 16
// bytes.
//
// Bytes: 4 T K read once, at most as many written; at 4096 queries of 2048 keys 34 MB, 11 us.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/ops/attention/sparse_attention_packs_cuda.h"

namespace baleen {
namespace {

using namespace cuda;  // NOLINT: the device wrappers

constexpr int kQueries = kMostPackedQueries;  // a thread block
constexpr int kMostSelected = 2048;
constexpr int kMostEntries = kQueries * kMostSelected;  // of a thread block's packs together
constexpr int kKeysAWord = 8, kWordsAChunk = 4, kKeysAChunk = kKeysAWord * kWordsAChunk;

constexpr int kThreads = 512;
constexpr int kSlots = kMostSelected / kThreads;  // of each list a thread
static_assert(kSlots == 4);

// What follows from the chunks of 16 bytes that a thread has.
template <int kChunksAThread>
struct PackShape {
  static constexpr int kChunks = kChunksAThread;
  static constexpr int kSegmentKeys = kThreads * kChunks * kKeysAChunk;
  static constexpr int kMarkWords = kSegmentKeys / kKeysAWord;
  static constexpr int kWords = kChunks * kWordsAChunk;  // a thread
  static constexpr int kSharedBytes = (kMarkWords + kMostEntries) * 4;
  static_assert(kWords <= 32, "a bit each in a mask");
};

// This thread's slots of a list, neighbours so that the threads of a warp seldom mark the same
// word; -1 beyond its end.
__device__ __forceinline__ void LoadSlots(const int32_t* list, int num_selected,
                                          int32_t (&ids)[kSlots]) {
  const int slot = threadIdx.x * kSlots;
  if (slot + kSlots <= num_selected &&
      reinterpret_cast<uint64_t>(list + slot) % (4 * kSlots) == 0) {
    const int4 four = __ldg(reinterpret_cast<const int4*>(list + slot));
    ids[0] = four.x, ids[1] = four.y, ids[2] = four.z, ids[3] = four.w;
  } else {
#pragma unroll
    for (int x = 0; x < kSlots; ++x) ids[x] = slot + x < num_selected ? __ldg(list + slot + x) : -1;
  }
}

// The lowest bit of each four in `word` that has any: one for each of its eight keys chosen.
__device__ __forceinline__ uint32_t ChosenNibbles(uint32_t word) {
  return (word | word >> 1 | word >> 2 | word >> 3) & 0x11111111u;
}

// Where chunk `chunk` lies: the runs of eight threads begin in different banks.
template <int kChunks>
__device__ __forceinline__ int ChunkPlace(int chunk) {
  return chunk ^ (chunk >> 3 & (kChunks - 1));
}

template <typename Shape>
__global__ void __launch_bounds__(kThreads, 1536 / kThreads)
    PackSelectedKeysKernel(const SparseAttentionPacks packs, int width) {
  extern __shared__ __align__(16) uint32_t marks[];  // 4 bits a key
  uint32_t* const entries = marks + Shape::kMarkWords;
  __shared__ uint32_t warp_counts[32];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int first_query = blockIdx.x * kQueries;
  const int queries = packs.queries, num_packs = kQueries / queries;
  const uint32_t bits = queries == kQueries ? ~0u : 0x33333333u;  // of the first pack
  const int first_pack = blockIdx.x * num_packs;

  int32_t ids[kQueries][kSlots];
#pragma unroll
  for (int query = 0; query < kQueries; ++query) {
    const int t = first_query + query;
    LoadSlots(packs.ids_TK + size_t(t) * packs.num_selected,
              t < packs.num_tokens ? packs.num_selected : 0, ids[query]);
  }

  // Counts of both packs in one word: the second one's in the upper half.
  uint32_t total = 0;
  for (int base = 0; base < packs.num_keys; base += Shape::kSegmentKeys) {
    const int keys = min(Shape::kSegmentKeys, packs.num_keys - base);
#pragma unroll
    for (int x = 0; x < Shape::kChunks; ++x) {
      reinterpret_cast<uint4*>(marks)[x * kThreads + thread] = make_uint4(0, 0, 0, 0);
    }
    __syncthreads();
#pragma unroll
    for (int x = 0; x < kSlots * kQueries; ++x) {
      const int query = x / kSlots;
      const int32_t id = ids[query][x % kSlots];
      const uint32_t key = uint32_t(id) - uint32_t(base);
      if (id >= 0 && key < uint32_t(keys)) {
        atomicOr(&marks[ChunkPlace<Shape::kChunks>(key / kKeysAChunk) * kWordsAChunk +
                        key / kKeysAWord % kWordsAChunk],
                 1u << (4 * (key % kKeysAWord) + query));
      }
    }
    __syncthreads();

    // Of this thread's run: how many keys each pack has, and in which words.
    uint32_t count = 0, used[2] = {};
#pragma unroll
    for (int x = 0; x < Shape::kChunks; ++x) {
      const uint4 chunk = reinterpret_cast<const uint4*>(
          marks)[ChunkPlace<Shape::kChunks>(thread * Shape::kChunks + x)];
      const uint32_t words[kWordsAChunk] = {chunk.x, chunk.y, chunk.z, chunk.w};
      uint32_t chosen[2] = {};
#pragma unroll
      for (int w = 0; w < kWordsAChunk; ++w) {
        const uint32_t low = words[w] & bits, high = words[w] & ~bits;
        chosen[0] |= ChosenNibbles(low) << w;
        used[0] |= uint32_t(low != 0) << (x * kWordsAChunk + w);
        if (num_packs == 2) {
          chosen[1] |= ChosenNibbles(high) << w;
          used[1] |= uint32_t(high != 0) << (x * kWordsAChunk + w);
        }
      }
      count += __popc(chosen[0]) + (__popc(chosen[1]) << 16);
    }
    uint32_t scan = count;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const uint32_t before = __shfl_up_sync(~0u, scan, step);
      if (lane >= step) scan += before;
    }
    if (lane == 31) warp_counts[warp] = scan;
    __syncthreads();
    const uint32_t others = lane < kThreads / 32 ? warp_counts[lane] : 0;
    const uint32_t at = total + __reduce_add_sync(~0u, lane < warp ? others : 0) + scan - count;
    total += __reduce_add_sync(~0u, others);
    for (int pack = 0; pack < num_packs; ++pack) {
      uint32_t* out = entries + pack * (kMostEntries / 2) + (pack == 0 ? at & 0xFFFF : at >> 16);
      uint32_t left = pack == 0 ? used[0] : used[1], chosen = 0, word = 0, key = 0;
      for (int n = pack == 0 ? count & 0xFFFF : count >> 16; n > 0; --n) {
        if (chosen == 0) {
          const int x = __ffs(left) - 1;
          left &= left - 1;
          const int chunk = thread * Shape::kChunks + x / kWordsAChunk;
          word = marks[ChunkPlace<Shape::kChunks>(chunk) * kWordsAChunk + x % kWordsAChunk] >>
                     (pack * queries) &
                 bits;
          chosen = ChosenNibbles(word);
          key = base + thread * (Shape::kWords * kKeysAWord) + x * kKeysAWord;
        }
        const int bit = __ffs(chosen) - 1;  // four times the key
        chosen &= chosen - 1;
        *out++ = (key + bit / 4) | word >> bit << kPackedKeyBits;
      }
    }
    __syncthreads();  // the marks are read, the entries written
  }

  for (int pack = 0; pack < num_packs; ++pack) {
    if (first_query + pack * queries >= packs.num_tokens) break;
    const int count = pack == 0 ? total & 0xFFFF : total >> 16;
    if (thread == 0) packs.counts_I[first_pack + pack] = count;
    const uint4* from = reinterpret_cast<const uint4*>(entries + pack * (kMostEntries / 2));
    uint4* to = reinterpret_cast<uint4*>(packs.entries_IU + size_t(first_pack + pack) * width);
    for (int x = thread; x < (count + 63) / 64 * 16; x += kThreads) {
      uint4 four = from[x];
      if (4 * x + 0 >= count) four.x = 0;
      if (4 * x + 1 >= count) four.y = 0;
      if (4 * x + 2 >= count) four.z = 0;
      if (4 * x + 3 >= count) four.w = 0;
      to[x] = four;
    }
  }
}

template <typename Shape>
void Launch(const SparseAttentionPacks& packs, void* stream) {
  constexpr char kName[] = "packs of sparse attention";
  auto* kernel = PackSelectedKeysKernel<Shape>;
  CheckCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 Shape::kSharedBytes),
            kName);
  kernel<<<(packs.num_tokens + kQueries - 1) / kQueries, kThreads, Shape::kSharedBytes,
           AsStream(stream)>>>(packs, packs.Width());
  CheckLaunch(kName);
}

}  // namespace

void LaunchPackSelectedKeys(const SparseAttentionPacks& packs, void* stream) {
  if (packs.num_tokens == 0) return;
  if (packs.num_keys <= PackShape<1>::kSegmentKeys) {
    Launch<PackShape<1>>(packs, stream);
  } else if (packs.num_keys <= PackShape<2>::kSegmentKeys) {
    Launch<PackShape<2>>(packs, stream);
  } else {
    Launch<PackShape<8>>(packs, stream);
  }
}

}  // namespace baleen
