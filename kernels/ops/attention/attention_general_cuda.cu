// General attention, forward: a block has 64 query rows of one head and walks the tiles of 64 keys
// that they see, with an online softmax in fp32. Also the marks of listed keys, and the
// probabilities summed over the heads at them.
//
// A row meets the tiles of keys at multiples of 64 in ascending order; a tile of which it sees
// nothing leaves its sums as they are, bit for bit.
#include <cmath>

#include "kernels/ops/attention/attention_general_tiles.cuh"

namespace baleen {
namespace {

using namespace cuda;

constexpr int kForwardTiles = 3;  // two operands and the probabilities

__device__ __forceinline__ float HalfWarpMax(float value) {
#pragma unroll
  for (int lane = 8; lane > 0; lane /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xFFFFFFFFu, value, lane));
  }
  return value;
}
__device__ __forceinline__ float HalfWarpSum(float value) {
#pragma unroll
  for (int lane = 8; lane > 0; lane /= 2) value += __shfl_xor_sync(0xFFFFFFFFu, value, lane);
  return value;
}

// One step of the online softmax of a row: `logits` become exp(logit - largest), 0 for unseen keys.
// Returns the factor that what was summed before is to be multiplied with. NaN stays NaN.
__device__ __forceinline__ float SoftmaxStep(uint64_t seen, float scale, float (&logits)[4],
                                             float& largest, float& sum) {
  float tile_largest = largest;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    logits[j] = seen >> (ThreadCol() + 16 * j) & 1 ? logits[j] * scale : -INFINITY;
    tile_largest = fmaxf(tile_largest, logits[j]);
  }
  tile_largest = HalfWarpMax(tile_largest);
  const float base = tile_largest == -INFINITY ? 0 : tile_largest;
  const float factor = expf(largest - base);  // 0 at the row's first key
  float tile_sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    logits[j] = expf(logits[j] - base);
    tile_sum += logits[j];
  }
  sum = sum * factor + HalfWarpSum(tile_sum);
  largest = tile_largest;
  return factor;
}

template <typename T, int kSlices>
__global__ void __launch_bounds__(kTileThreads)
    AttentionForwardKernel(AttentionCudaArgs args, T* o, float* lse) {
  __shared__ uint64_t seen[kTile];
  // The last rows of a causal window have most to do: they come first.
  const int64_t first_row = (gridDim.x - 1 - static_cast<int64_t>(blockIdx.x)) * kTile;
  const int head = static_cast<int>(blockIdx.y);
  const int64_t first_col = static_cast<int64_t>(blockIdx.z) * kMaxSlices * kTile;
  const HeadRows<T> q(args.q, args.T, args.H, args.Q, head),
      k(args.k, args.S, args.H, args.Q, head), v(args.v, args.S, args.H, args.V, head);
  const Tile probs = SharedTile(2);

  float sums[kSlices][4][4] = {};
  float largest[4], sum[4] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) largest[i] = -INFINITY;
  const TileRange range = TilesOfKeys(args, first_row);
  for (int tile = range.begin; tile < range.end; ++tile) {
    const int64_t first_key = static_cast<int64_t>(tile) * kTile;
    if (!LoadSeen(args, first_row, first_key, seen)) continue;
    float logits[4][4] = {};
    AddRowProducts(q, first_row, k, first_key, logits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = ThreadRow() + 16 * i;
      const float factor = SoftmaxStep(seen[row], args.scale, logits[i], largest[i], sum[i]);
#pragma unroll
      for (int s = 0; s < kSlices; ++s) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[s][i][j] *= factor;
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) probs[row][ThreadCol() + 16 * j] = logits[i][j];
    }
    AddWeightedRows(probs, v, first_key, first_col, sums);
  }

  ForEachResult(sums, first_col, args.V, [&](int i, int row, int64_t col, float value) {
    if (first_row + row >= args.T) return;
    o[((first_row + row) * args.H + head) * args.V + col] =
        static_cast<T>(sum[i] == 0 ? 0.0f : value / sum[i]);
  });
  if (blockIdx.z > 0 || ThreadCol() > 0) return;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t row = first_row + ThreadRow() + 16 * i;
    if (row >= args.T) continue;
    lse[row * args.H + head] = sum[i] == 0 ? -INFINITY : largest[i] + logf(sum[i]);
  }
}

// A block marks the keys of one row. Marks are or-ed: their order does not matter.
__global__ void MarkSeenKeysKernel(int64_t S, int64_t K, const int32_t* ids, uint64_t* seen) {
  const int64_t row = blockIdx.x, words = CeilDiv(S, kKeysPerWord);
  uint64_t* const own = seen + row * words;
  for (int64_t w = threadIdx.x; w < words; w += blockDim.x) own[w] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < K; i += blockDim.x) {
    const int64_t key = ids[row * K + i];
    if (key < 0 || key >= S) continue;
    atomicOr(reinterpret_cast<unsigned long long*>(own + key / kKeysPerWord),
             1ull << (key % kKeysPerWord));
  }
}

// sums[t, s] = sum over the heads, ascending, of P where t sees s. A block has one tile of it.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    HeadSumsKernel(AttentionCudaArgs args, const float* lse, float* sums) {
  __shared__ uint64_t seen[kTile];
  const int64_t first_key = static_cast<int64_t>(blockIdx.x) * kTile;
  const int64_t first_row = static_cast<int64_t>(blockIdx.y) * kTile;
  if (!LoadSeen(args, first_row, first_key, seen)) return;
  float total[4][4] = {};
  for (int head = 0; head < args.H; ++head) {
    const HeadRows<T> q(args.q, args.T, args.H, args.Q, head),
        k(args.k, args.S, args.H, args.Q, head);
    float logits[4][4] = {};
    AddRowProducts(q, first_row, k, first_key, logits);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t row = first_row + ThreadRow() + 16 * i;
      const float row_lse = row < args.T ? lse[row * args.H + head] : 0;
#pragma unroll
      for (int j = 0; j < 4; ++j) total[i][j] += expf(logits[i][j] * args.scale - row_lse);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int row = ThreadRow() + 16 * i, key = ThreadCol() + 16 * j;
      if (seen[row] >> key & 1) sums[(first_row + row) * args.S + first_key + key] = total[i][j];
    }
  }
}

__global__ void GatherTargetKernel(int64_t S, int64_t K, int64_t count, const int32_t* ids,
                                   const float* sums, float* target) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(blockDim.x) + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * blockDim.x) {
    const int64_t key = ids[i];
    target[i] = key < 0 || key >= S ? 0.0f : sums[i / K * S + key];
  }
}

}  // namespace

void AttentionForwardCuda(const AttentionCudaArgs& args, void* o, float* lse, void* stream) {
  if (args.T == 0 || args.H == 0) return;
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    ForSlices(args.V, [&](auto slices, unsigned groups) {
      const auto kernel = AttentionForwardKernel<T, decltype(slices)::value>;
      AllowTiles(kernel, kForwardTiles);
      const dim3 grid(static_cast<unsigned>(CeilDiv(args.T, kTile)), static_cast<unsigned>(args.H),
                      groups);
      kernel<<<grid, kTileThreads, kForwardTiles * kTileBytes, AsStream(stream)>>>(
          args, static_cast<T*>(o), lse);
    });
  });
  CheckLaunch("attention forward");
}

void MarkSeenKeysCuda(int64_t T, int64_t S, int64_t K, const int32_t* ids, uint64_t* seen,
                      void* stream) {
  if (T == 0 || S == 0) return;
  MarkSeenKeysKernel<<<static_cast<unsigned>(T), kFlatThreads, 0, AsStream(stream)>>>(S, K, ids,
                                                                                      seen);
  CheckLaunch("marks of listed keys");
}

void AttentionTargetCuda(const AttentionCudaArgs& args, const float* lse, int64_t K,
                         const int32_t* ids, float* sums, float* target, void* stream) {
  const int64_t count = args.T * K;
  if (count == 0) return;
  if (args.S > 0) {
    ForElement(args.element, [&](auto zero) {
      const auto kernel = HeadSumsKernel<decltype(zero)>;
      const dim3 grid(static_cast<unsigned>(CeilDiv(args.S, kTile)),
                      static_cast<unsigned>(CeilDiv(args.T, kTile)));
      kernel<<<grid, kTileThreads, 2 * kTileBytes, AsStream(stream)>>>(args, lse, sums);
    });
    CheckLaunch("attention target");
  }
  const int64_t blocks = CeilDiv(count, kFlatThreads);
  GatherTargetKernel<<<static_cast<unsigned>(blocks < 4096 ? blocks : 4096), kFlatThreads, 0,
                       AsStream(stream)>>>(args.S, K, count, ids, sums, target);
  CheckLaunch("attention target of the list");
}

}  // namespace baleen
