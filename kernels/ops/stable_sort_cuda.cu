// Stable counting sort by radix passes of up to 10 bits.
//
// Bytes for n items: each pass reads keys twice and items once and writes both: 20 n, plus 8 bytes
// for each digit and tile. A tile is 2048 items in order, 256 for each of the eight warps of a
// block. One pass is three kernels:
//   count    per tile: how often each digit comes
//   scan     per digit: running sum of its counts over the tiles; the digits' totals
//   scatter  place = items of lower digits + of this digit in earlier tiles, warps, items. A warp
//            takes 32 items at a time; equal digits find each other by match_any and keep the order
//            of their lanes.
// No atomics whose order matters: the same input gives the same output.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/ops/stable_sort_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kWarpItems = 256;
constexpr int kTile = kWarps * kWarpItems;
constexpr int kMaxBits = 10;

int BitsOf(int64_t num_keys) {  // of the keys 0 .. num_keys
  int bits = 1;
  while (num_keys >> bits) ++bits;
  return bits;
}
int NumPasses(int64_t num_keys) { return (BitsOf(num_keys) + kMaxBits - 1) / kMaxBits; }
int PassBits(int64_t num_keys) {
  const int passes = NumPasses(num_keys);
  return (BitsOf(num_keys) + passes - 1) / passes;
}

struct Pass {
  int64_t count;
  int32_t num_tiles;
  int shift, digits;
  // The first pass reads raw keys and counts the items itself (items null).
  const int32_t* keys;
  const int32_t* items;
  int64_t first, num_keys;
  int32_t* counts;  // [digits, num_tiles]; after the scan: of earlier tiles
  int32_t* totals;  // [digits]; the items of a digit
  int32_t* keys_out;
  int32_t* items_out;
};

__device__ __forceinline__ int32_t KeyOf(const Pass& pass, int64_t i) {
  const int32_t key = pass.keys[i];
  if (pass.items != nullptr) return key;
  const int64_t local = key - pass.first;
  return static_cast<int32_t>(local >= 0 && local < pass.num_keys ? local : pass.num_keys);
}

// Digit counts of the warp's items, into its own row of shared memory.
__device__ __forceinline__ void CountWarp(const Pass& pass, int64_t begin, int32_t* mine) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int round = 0; round < kWarpItems / 32; ++round) {
    const int64_t i = begin + round * 32 + lane;
    const bool valid = i < pass.count;
    const int digit = valid ? (KeyOf(pass, i) >> pass.shift) & (pass.digits - 1) : pass.digits;
    const unsigned equal = __match_any_sync(~0u, digit);
    if (valid && lane == __ffs(static_cast<int>(equal)) - 1) mine[digit] += __popc(equal);
    __syncwarp();
  }
}

__global__ void __launch_bounds__(kThreads) CountKernel(Pass pass) {
  extern __shared__ int32_t counts[];  // [kWarps, digits]
  for (int d = threadIdx.x; d < kWarps * pass.digits; d += kThreads) counts[d] = 0;
  __syncthreads();
  const int warp = threadIdx.x / 32;
  CountWarp(pass, int64_t{blockIdx.x} * kTile + warp * kWarpItems, counts + warp * pass.digits);
  __syncthreads();
  for (int d = threadIdx.x; d < pass.digits; d += kThreads) {
    int32_t sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += counts[w * pass.digits + d];
    pass.counts[int64_t{d} * pass.num_tiles + blockIdx.x] = sum;
  }
}

// The exclusive running sum of a block's values; returns the total through `total`.
__device__ int32_t BlockExclusive(int32_t value, int32_t* shared, int32_t* total) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int32_t sum = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const int32_t lower = __shfl_up_sync(~0u, sum, offset);
    if (lane >= offset) sum += lower;
  }
  __syncthreads();  // an earlier call's sums have been read
  if (lane == 31) shared[warp] = sum;
  __syncthreads();
  int32_t before = 0;
  *total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += shared[w];
    *total += shared[w];
  }
  return before + sum - value;
}

// One block a digit.
__global__ void __launch_bounds__(kThreads) ScanTilesKernel(Pass pass) {
  __shared__ int32_t shared[kWarps];
  int32_t* const row = pass.counts + int64_t{blockIdx.x} * pass.num_tiles;
  int32_t carry = 0;
  for (int begin = 0; begin < pass.num_tiles; begin += kThreads) {
    const int tile = begin + threadIdx.x;
    const int32_t value = tile < pass.num_tiles ? row[tile] : 0;
    int32_t total;
    const int32_t before = BlockExclusive(value, shared, &total);
    if (tile < pass.num_tiles) row[tile] = carry + before;
    carry += total;
  }
  if (threadIdx.x == 0) pass.totals[blockIdx.x] = carry;
}

__global__ void __launch_bounds__(kThreads) ScatterKernel(Pass pass) {
  extern __shared__ int32_t next[];  // [kWarps, digits]: where a warp's next item of a digit goes
  __shared__ int32_t shared[kWarps];
  for (int d = threadIdx.x; d < kWarps * pass.digits; d += kThreads) next[d] = 0;
  __syncthreads();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t begin = int64_t{blockIdx.x} * kTile + warp * kWarpItems;
  int32_t* const mine = next + warp * pass.digits;
  CountWarp(pass, begin, mine);
  // Counts become places: lower digits, then earlier tiles, then earlier warps.
  int32_t carry = 0;
  for (int first = 0; first < pass.digits; first += kThreads) {
    const int d = first + threadIdx.x;
    int32_t total;
    const int32_t before = BlockExclusive(d < pass.digits ? pass.totals[d] : 0, shared, &total);
    if (d < pass.digits) {
      int32_t place = carry + before + pass.counts[int64_t{d} * pass.num_tiles + blockIdx.x];
      for (int w = 0; w < kWarps; ++w) {
        const int32_t count = next[w * pass.digits + d];
        next[w * pass.digits + d] = place;
        place += count;
      }
    }
    carry += total;
  }
  __syncthreads();
  for (int round = 0; round < kWarpItems / 32; ++round) {
    const int64_t i = begin + round * 32 + lane;
    const bool valid = i < pass.count;
    const int32_t key = valid ? KeyOf(pass, i) : 0;
    const int digit = valid ? (key >> pass.shift) & (pass.digits - 1) : pass.digits;
    const unsigned equal = __match_any_sync(~0u, digit);
    if (valid) {
      const int32_t place = mine[digit] + __popc(equal & ((1u << lane) - 1));
      pass.keys_out[place] = key;
      pass.items_out[place] = pass.items != nullptr ? pass.items[i] : static_cast<int32_t>(i);
    }
    __syncwarp();  // all have read their digit's place
    if (valid && lane == __ffs(static_cast<int>(equal)) - 1) mine[digit] += __popc(equal);
    __syncwarp();
  }
}

void RunPass(const Pass& pass, cudaStream_t stream) {
  const size_t shared_bytes = sizeof(int32_t) * kWarps * pass.digits;
  const auto tiles = static_cast<unsigned>(pass.num_tiles);
  CountKernel<<<tiles, kThreads, shared_bytes, stream>>>(pass);
  ScanTilesKernel<<<static_cast<unsigned>(pass.digits), kThreads, 0, stream>>>(pass);
  ScatterKernel<<<tiles, kThreads, shared_bytes, stream>>>(pass);
  CheckLaunch("stable sort");
}

__global__ void __launch_bounds__(kThreads) PlacesKernel(SortedPlacesCudaArgs args) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (n > args.count) return;
  // Keys above those before this place, up to the own one, begin here; one place past the end
  // stands for the key num_keys.
  const int64_t previous = n == 0 ? -1 : args.sorted_keys[n - 1];
  const int64_t key = n == args.count ? args.num_keys : args.sorted_keys[n];
  for (int64_t k = previous + 1; k <= key; ++k) args.offsets[k] = static_cast<int32_t>(n);
  if (n == args.count) return;
  const int32_t item = args.sorted_items[n];
  const bool in_range = key < args.num_keys;
  if (args.place_of_item != nullptr) {
    args.place_of_item[item] = in_range ? static_cast<int32_t>(n) : -1;
  }
  if (args.row_of_place != nullptr && in_range && n < args.num_rows) {
    args.row_of_place[n] = static_cast<int32_t>(item / args.slots_per_row);
  }
}

}  // namespace

int64_t StableSortWorkspaceInts(int64_t count, int64_t num_keys) {
  const int64_t digits = int64_t{1} << PassBits(num_keys), tiles = CeilDiv(count, kTile);
  const int64_t buffers = NumPasses(num_keys) > 1 ? 2 * count : 0;
  return digits * tiles + digits + buffers;
}

void StableSortCuda(const StableSortCudaArgs& args, void* stream) {
  if (args.count == 0) return;
  const int passes = NumPasses(args.num_keys), bits = PassBits(args.num_keys);
  Pass pass;
  pass.count = args.count;
  pass.num_tiles = static_cast<int32_t>(CeilDiv(args.count, kTile));
  pass.digits = 1 << bits;
  pass.first = args.first;
  pass.num_keys = args.num_keys;
  pass.counts = args.workspace;
  pass.totals = pass.counts + int64_t{pass.digits} * pass.num_tiles;
  pass.keys = args.keys;
  pass.items = nullptr;
  int32_t* const spare = pass.totals + pass.digits;
  for (int p = 0; p < passes; ++p) {
    // The last pass writes the result, those before it alternate.
    const bool to_result = (passes - 1 - p) % 2 == 0;
    pass.shift = p * bits;
    pass.keys_out = to_result ? args.sorted_keys : spare;
    pass.items_out = to_result ? args.sorted_items : spare + args.count;
    RunPass(pass, AsStream(stream));
    pass.keys = pass.keys_out;
    pass.items = pass.items_out;
  }
}

void SortedPlacesCuda(const SortedPlacesCudaArgs& args, void* stream) {
  PlacesKernel<<<static_cast<unsigned>(CeilDiv(args.count + 1, kThreads)), kThreads, 0,
                 AsStream(stream)>>>(args);
  CheckLaunch("sorted places");
}

}  // namespace baleen
