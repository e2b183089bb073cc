// The schedule of masked attention: windows, bits of the selection, lists of tiles. All of it is
// small: T S / 8 bytes of bits written twice, against T S H 640 operations of the forward.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/ops/attention/masked_attention_schedule_cuda.h"

namespace baleen {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kBitsThreads = 1024;
constexpr int kChunkWords = 1024;  // of a row, at once in shared memory

// One warp a block of 32 rows.
__global__ void WindowsKernel(const MaskedAttentionKeys keys, const MaskedAttentionSchedule out) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (blockIdx.x == 0) {
    for (int i = threadIdx.x; i < out.num_counters; i += blockDim.x) out.counters[i] = 0;
  }
  if (row >= out.padded_rows) return;  // a multiple of 32
  int begin = 0, end = 0;
  if (row < keys.num_rows) {
    begin = keys.key_begin_T == nullptr ? 0 : max(0, keys.key_begin_T[row]);
    end = keys.key_end_T == nullptr ? keys.num_keys : min(keys.num_keys, keys.key_end_T[row]);
    if (begin >= end) begin = end = 0;
  }
  out.begin_T[row] = begin;
  out.end_T[row] = end;
  const bool some = begin < end, counts = row < keys.num_rows;
  const int hull_begin = __reduce_min_sync(kAllLanes, some ? begin : keys.num_keys);
  const int hull_end = __reduce_max_sync(kAllLanes, some ? end : 0);
  const int inner_begin = __reduce_max_sync(kAllLanes, counts ? begin : 0);
  const int inner_end = __reduce_min_sync(kAllLanes, counts ? end : keys.num_keys);
  if (row % 32 == 0) out.block_windows[row / 32] = {hull_begin, hull_end, inner_begin, inner_end};
}

// [word][row of 32], skewed so that neither the words of a row nor the rows of a word share a bank.
__device__ __forceinline__ int BitsAt(int word, int row) { return word * 32 + (row + word) % 32; }

// Sets a row's bits, by a warp: its ids within the words' keys and its window, which becomes the
// hull of the ids in it. Several loads are in flight at once.
__device__ void SetRowBits(const MaskedAttentionKeys& keys, const MaskedAttentionSchedule& out,
                           int row, int first_word, int words, uint32_t* bits) {
  constexpr int kLoads = 4;
  const int32_t* ids = keys.ids_TK + static_cast<int64_t>(row) * keys.num_selected;
  const int begin = out.begin_T[row], end = out.end_T[row];
  const int first_key = first_word * 32, end_key = (first_word + words) * 32;
  int low = end, high = begin - 1;
  for (int i = threadIdx.x % 32; i < keys.num_selected; i += 32 * kLoads) {
    int id[kLoads];
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      id[j] = i + 32 * j < keys.num_selected ? __ldg(ids + i + 32 * j) : -1;
    }
#pragma unroll
    for (int j = 0; j < kLoads; ++j) {
      if (id[j] < begin || id[j] >= end) continue;
      low = min(low, id[j]);
      high = max(high, id[j]);
      if (id[j] >= first_key && id[j] < end_key) {
        atomicOr(&bits[BitsAt(id[j] / 32 - first_word, row % 32)], 1u << id[j] % 32);
      }
    }
  }
  low = __reduce_min_sync(kAllLanes, low);
  high = __reduce_max_sync(kAllLanes, high);
  if (threadIdx.x % 32 == 0) {
    out.begin_T[row] = low <= high ? low : 0;
    out.end_T[row] = low <= high ? high + 1 : 0;
  }
}

// One thread block a block of 32 rows: their bits in shared memory, [word][row], then row by row,
// key by key (transposed by ballots), and the flags.
__global__ void __launch_bounds__(kBitsThreads)
    BitsKernel(const MaskedAttentionKeys keys, const MaskedAttentionSchedule out) {
  extern __shared__ uint32_t bits[];
  const int block = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int num_words = out.padded_keys / 32;
  for (int first = 0; first < num_words; first += kChunkWords) {
    const int words = min(kChunkWords, num_words - first);
    for (int i = threadIdx.x; i < words * 32; i += kBitsThreads) bits[i] = 0;
    __syncthreads();
    for (int r = warp; r < 32; r += kBitsThreads / 32) {
      const int row = block * 32 + r;
      if (row >= keys.num_rows) break;
      SetRowBits(keys, out, row, first, words, bits);
    }
    __syncthreads();
    for (int w = warp; w < words; w += kBitsThreads / 32) {
      const int word = first + w;
      const uint32_t own = bits[BitsAt(w, lane)];
      out.row_bits[static_cast<int64_t>(word) * out.padded_rows + block * 32 + lane] = own;
      const bool counts = block * 32 + lane < keys.num_rows;
      const bool some = __any_sync(kAllLanes, own != 0);
      const bool all = __all_sync(kAllLanes, !counts || own == ~0u);
      if (lane == 0) out.flags[static_cast<int64_t>(block) * num_words + word] = some + 2 * all;
      if (out.backward) {
        uint32_t of_key = 0;
#pragma unroll 8
        for (int b = 0; b < 32; ++b) {
          const uint32_t rows = __ballot_sync(kAllLanes, own >> b & 1);
          if (lane == b) of_key = rows;
        }
        out.key_bits[static_cast<int64_t>(block) * out.padded_keys + word * 32 + lane] = of_key;
      }
    }
    __syncthreads();
  }
}

// Flags of the pairs of `blocks` blocks of rows and `words` words of keys.
__device__ int TileFlags(const MaskedAttentionSchedule& s, int block, int blocks, int word,
                         int words) {
  int some = 0, all = 2;
  for (int b = block; b < block + blocks; ++b) {
    if (s.selected) {
      const uint8_t* flags = s.flags + static_cast<int64_t>(b) * (s.padded_keys / 32);
      for (int w = word; w < word + words; ++w) {
        some |= flags[w] & 1;
        all &= flags[w] & 2;
      }
    } else {
      const int4 window = s.block_windows[b];
      some |= window.x < (word + words) * 32 && window.y > word * 32;
      all &= window.z <= word * 32 && window.w >= (word + words) * 32 ? 2 : 0;
    }
  }
  return some | all;
}

// Tiles of `own` blocks (words, if kByKeys) meet candidates of `passing` words (blocks). One warp a
// list.
template <bool kByKeys>
__global__ void ListKernel(const MaskedAttentionSchedule schedule, const MaskedTileLists lists,
                           int own, int passing, int candidates) {
  const int list = blockIdx.x, lane = threadIdx.x;
  int32_t* out = lists.entries + static_cast<int64_t>(list) * lists.stride;
  int count = 0;
  for (int first = 0; first < candidates; first += 32) {
    const int i = first + lane;
    int flags = 0;
    if (i < candidates) {
      flags = kByKeys ? TileFlags(schedule, i * passing, passing, list * own, own)
                      : TileFlags(schedule, list * own, own, i * passing, passing);
      if (kByKeys && schedule.keeps_ds) {
        const int tile = i * passing / own * (schedule.padded_keys / kMaskedTile) + list;
        flags = (flags & 2) | (schedule.places[tile] >= 0);
      }
    }
    const uint32_t some = __ballot_sync(kAllLanes, flags & 1);
    if (flags & 1) out[1 + count + __popc(some & ((1u << lane) - 1))] = 2 * i + !(flags & 2);
    count += __popc(some);
  }
  if (lane == 0) {
    if (!kByKeys && count == 0) out[1 + count++] = 1;
    out[0] = count;
  }
}

// One warp a tile of rows: the places of its tiles of keys, and how many there are.
__global__ void TilesKernel(const MaskedAttentionSchedule schedule, int num_tiles) {
  constexpr int kBlocks = kMaskedTile / 32;
  const int row = blockIdx.x, lane = threadIdx.x;
  int32_t* out = schedule.places + static_cast<int64_t>(row) * (schedule.padded_keys / kMaskedTile);
  int count = 0;
  for (int first = 0; first < num_tiles; first += 32) {
    const int i = first + lane;
    const bool some =
        i < num_tiles && TileFlags(schedule, row * kBlocks, kBlocks, i * kBlocks, kBlocks) & 1;
    const uint32_t all = __ballot_sync(kAllLanes, some);
    if (i < num_tiles) out[i] = some ? count + __popc(all & ((1u << lane) - 1)) : -1;
    count += __popc(all);
  }
  if (lane == 0) schedule.tile_counts[row] = count;
}

// One thread block a tile of rows: its places begin behind those of the rows before.
__global__ void PlacesKernel(const MaskedAttentionSchedule schedule, int num_tiles, int num_heads,
                             int64_t tiles_held) {
  __shared__ int sum;
  const int row = blockIdx.x;
  if (threadIdx.x == 0) sum = 0;
  __syncthreads();
  int own = 0;
  for (int i = threadIdx.x; i < row; i += blockDim.x) own += schedule.tile_counts[i];
  own = __reduce_add_sync(kAllLanes, own);
  if (threadIdx.x % 32 == 0) atomicAdd(&sum, own);
  __syncthreads();
  int32_t* out = schedule.places + static_cast<int64_t>(row) * (schedule.padded_keys / kMaskedTile);
  for (int i = threadIdx.x; i < num_tiles; i += blockDim.x) {
    if (out[i] >= 0) out[i] += sum;
  }
  if (row + 1 == gridDim.x && threadIdx.x == 0) {
    const int tiles = sum + schedule.tile_counts[row];
    const int64_t fitting = tiles == 0 ? num_heads : min(int64_t{num_heads}, tiles_held / tiles);
    const int64_t rounds = (num_heads + fitting - 1) / fitting;
    *schedule.rounds = {static_cast<int>((num_heads + rounds - 1) / rounds), tiles};
  }
}

template <bool kByKeys>
void LaunchLists(const MaskedAttentionSchedule& schedule, const MaskedTileLists& lists, int passing,
                 cudaStream_t stream) {
  const int length = kByKeys ? schedule.num_rows : schedule.num_keys;
  ListKernel<kByKeys>
      <<<lists.count, 32, 0, stream>>>(schedule, lists, kMaskedTile / 32, passing / 32,
                                       static_cast<int>(cuda::CeilDiv(length, passing)));
  cuda::CheckLaunch("masked attention: lists of tiles");
}

}  // namespace

MaskedAttentionSchedule PlaceMaskedAttentionSchedule(const MaskedAttentionKeys& keys,
                                                     MaskedAttentionPass pass,
                                                     const MaskedAttentionLayout& layout,
                                                     void* workspace) {
  const auto at = [workspace](size_t offset) {
    return static_cast<void*>(static_cast<uint8_t*>(workspace) + offset);
  };
  const auto lists = [&](size_t offset, int length) {
    return MaskedTileLists{static_cast<int32_t*>(at(offset)), layout.list_stride,
                           static_cast<int>(cuda::CeilDiv(length, kMaskedTile))};
  };
  MaskedAttentionSchedule s;
  s.num_rows = keys.num_rows;
  s.num_keys = keys.num_keys;
  s.padded_rows = layout.padded_rows;
  s.padded_keys = layout.padded_keys;
  s.selected = keys.num_selected >= 0;
  s.backward = pass == MaskedAttentionPass::kBackward;
  s.keeps_ds = layout.keeps_ds;
  s.num_counters = layout.num_counters;
  s.counters = static_cast<int32_t*>(at(layout.counters));
  s.begin_T = static_cast<int32_t*>(at(layout.begin_T));
  s.end_T = static_cast<int32_t*>(at(layout.end_T));
  s.row_bits = static_cast<uint32_t*>(at(layout.row_bits));
  s.key_bits = static_cast<uint32_t*>(at(layout.key_bits));
  s.flags = static_cast<uint8_t*>(at(layout.flags));
  s.block_windows = static_cast<int4*>(at(layout.block_windows));
  s.by_rows = lists(layout.row_lists, keys.num_rows);
  s.by_keys = lists(layout.key_lists, keys.num_keys);
  s.places = static_cast<int32_t*>(at(layout.places));
  s.tile_counts = static_cast<int32_t*>(at(layout.tile_counts));
  s.rounds = static_cast<HeadRounds*>(at(layout.rounds));
  return s;
}

void LaunchMaskedAttentionSchedule(const MaskedAttentionKeys& keys,
                                   const MaskedAttentionSchedule& schedule, cudaStream_t stream) {
  WindowsKernel<<<schedule.padded_rows / 256, 256, 0, stream>>>(keys, schedule);
  cuda::CheckLaunch("masked attention: windows");
  if (schedule.selected) {
    const int shared = std::min(kChunkWords, schedule.padded_keys / 32) * 128;
    cuda::CheckCuda(
        cudaFuncSetAttribute(BitsKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
        "masked attention: shared memory of the bits");
    BitsKernel<<<schedule.padded_rows / 32, kBitsThreads, shared, stream>>>(keys, schedule);
    cuda::CheckLaunch("masked attention: bits");
  }
  if (schedule.keeps_ds) return;
  LaunchLists<false>(schedule, schedule.by_rows, schedule.backward ? kMaskedStep : kMaskedTile,
                     stream);
  if (schedule.backward) LaunchLists<true>(schedule, schedule.by_keys, kMaskedStep, stream);
}

void LaunchMaskedAttentionPlaces(const MaskedAttentionSchedule& schedule, int num_heads,
                                 int64_t tiles_held, cudaStream_t stream) {
  const int tiles = static_cast<int>(cuda::CeilDiv(schedule.num_keys, kMaskedTile));
  const unsigned rows = static_cast<unsigned>(schedule.padded_rows / kMaskedTile);
  TilesKernel<<<rows, 32, 0, stream>>>(schedule, tiles);
  cuda::CheckLaunch("masked attention: tiles");
  PlacesKernel<<<rows, 128, 0, stream>>>(schedule, tiles, num_heads, tiles_held);
  cuda::CheckLaunch("masked attention: places of tiles");
  LaunchLists<true>(schedule, schedule.by_keys, kMaskedStep, stream);
}

}  // namespace baleen
