// Building blocks of the general attention kernels: fp32 tiles of 64 x 64 in shared memory,
// products of them with 4 x 4 results a thread, and the keys that the rows of a tile see.
//
// Thread (y, x) of 16 x 16 has the results of tile rows y + 16 i. Of a transposed product it has
// the columns x + 16 j (neighbours read neighbouring tile rows: no bank conflicts with a stride of
// 68 floats), of a plain one the columns 4 x + j.
#pragma once

#include <cstdint>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/attention/attention_general_cuda.h"

namespace baleen::cuda {

inline constexpr int kTile = 64;
inline constexpr int kTileThreads = 256;
inline constexpr int kTileBytes = kTile * (kTile + 4) * static_cast<int>(sizeof(float));
static_assert(kTile == kKeysPerWord, "a word of seen keys is a row of a tile");
// A block holds the sums of up to so many tiles of columns; wider heads take several blocks, each
// of which computes the probabilities again.
inline constexpr int kMaxSlices = 4;

using Tile = float (*)[kTile + 4];

// The `index`th tile of dynamic shared memory.
__device__ __forceinline__ Tile SharedTile(int index) {
  extern __shared__ __align__(16) float tiles[];
  return reinterpret_cast<Tile>(tiles + index * kTile * (kTile + 4));
}

__device__ __forceinline__ int ThreadRow() { return static_cast<int>(threadIdx.x) / 16; }
__device__ __forceinline__ int ThreadCol() { return static_cast<int>(threadIdx.x) % 16; }

// One head of x [rows, H, width].
template <typename T>
struct HeadRows {
  const T* data;
  int64_t rows, width, row_stride;
  bool vectors;  // 16-byte accesses are aligned

  __device__ HeadRows(const void* x, int64_t rows, int64_t num_heads, int64_t width, int head)
      : data(static_cast<const T*>(x) + head * width),
        rows(rows),
        width(width),
        row_stride(num_heads * width),
        vectors(width % kLanes<T> == 0 && reinterpret_cast<uintptr_t>(x) % 16 == 0) {}
};

// tile = x[row .., col ..], zeros beyond its ends. All threads; no barrier inside.
template <typename T>
__device__ __forceinline__ void LoadTile(const HeadRows<T>& x, int64_t row, int64_t col,
                                         Tile tile) {
  constexpr int kWidth = kLanes<T>, kVectors = kTile / kWidth;
#pragma unroll
  for (int n = 0; n < kTile * kVectors / kTileThreads; ++n) {
    const int i = static_cast<int>(threadIdx.x) + n * kTileThreads;
    const int r = i / kVectors, c = i % kVectors * kWidth;
    float values[kWidth] = {};
    const T* const from = x.data + (row + r) * x.row_stride + col + c;
    if (row + r < x.rows) {
      if (x.vectors) {
        if (col + c < x.width) Load<T, kWidth>(from, values);
      } else {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) {
          if (col + c + e < x.width) values[e] = static_cast<float>(from[e]);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < kWidth; e += 4) {
      *reinterpret_cast<float4*>(&tile[r][c + e]) =
          make_float4(values[e], values[e + 1], values[e + 2], values[e + 3]);
    }
  }
}

// sums[i][j] += a[y + 16 i] . b[x + 16 j] over `depth` columns (of zeros up to the next multiple
// of 4).
__device__ __forceinline__ void AddTransposed(Tile a, Tile b, int depth, float (&sums)[4][4]) {
  const int y = ThreadRow(), x = ThreadCol();
#pragma unroll 4
  for (int d = 0; d < depth; d += 4) {
    float4 left[4], right[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = *reinterpret_cast<const float4*>(&a[y + 16 * i][d]);
#pragma unroll
    for (int j = 0; j < 4; ++j) right[j] = *reinterpret_cast<const float4*>(&b[x + 16 * j][d]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sums[i][j] += left[i].x * right[j].x;
        sums[i][j] += left[i].y * right[j].y;
        sums[i][j] += left[i].z * right[j].z;
        sums[i][j] += left[i].w * right[j].w;
      }
    }
  }
}

// sums[i][j] += sum over n of a[y + 16 i][n] b[n][4 x + j].
__device__ __forceinline__ void AddPlain(Tile a, Tile b, float (&sums)[4][4]) {
  const int y = ThreadRow(), x = ThreadCol();
#pragma unroll 4
  for (int n = 0; n < kTile; n += 4) {
    float left[4][4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      *reinterpret_cast<float4*>(left[i]) = *reinterpret_cast<const float4*>(&a[y + 16 * i][n]);
    }
#pragma unroll
    for (int m = 0; m < 4; ++m) {
      float right[4];
      *reinterpret_cast<float4*>(right) = *reinterpret_cast<const float4*>(&b[n + m][4 * x]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += left[i][m] * right[j];
      }
    }
  }
}

// sums += the rows of `a` times the rows of `b`, over the whole width, through the tiles 0 and 1.
// Begins with a barrier: what was read of those tiles before may be overwritten.
template <typename T>
__device__ __forceinline__ void AddRowProducts(const HeadRows<T>& a, int64_t a_row,
                                               const HeadRows<T>& b, int64_t b_row,
                                               float (&sums)[4][4]) {
  for (int64_t col = 0; col < a.width; col += kTile) {
    __syncthreads();
    LoadTile(a, a_row, col, SharedTile(0));
    LoadTile(b, b_row, col, SharedTile(1));
    __syncthreads();
    const int64_t left = a.width - col;
    AddTransposed(SharedTile(0), SharedTile(1), left < kTile ? static_cast<int>(left) : kTile,
                  sums);
  }
}

// sums[s] += weights x rows `row`.. of `values`, columns first_col + 64 s .., through tile 1.
// Begins with a barrier: `weights` may have been written just before.
template <typename T, int kSlices>
__device__ __forceinline__ void AddWeightedRows(Tile weights, const HeadRows<T>& values,
                                                int64_t row, int64_t first_col,
                                                float (&sums)[kSlices][4][4]) {
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
    const int64_t col = first_col + s * kTile;
    if (col >= values.width) break;
    __syncthreads();
    LoadTile(values, row, col, SharedTile(1));
    __syncthreads();
    AddPlain(weights, SharedTile(1), sums[s]);
  }
}

// Calls store(tile row, column, value) for the results of a thread that lie before num_cols.
template <int kSlices, typename Store>
__device__ __forceinline__ void ForEachResult(const float (&sums)[kSlices][4][4], int64_t first_col,
                                              int64_t num_cols, Store store) {
#pragma unroll
  for (int s = 0; s < kSlices; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int64_t col = first_col + s * kTile + 4 * ThreadCol() + j;
        if (col < num_cols) store(i, ThreadRow() + 16 * i, col, sums[s][i][j]);
      }
    }
  }
}

// --- Which keys the rows of a tile see.

__device__ __forceinline__ uint64_t LowBits(int64_t count) {
  if (count <= 0) return 0;
  return count >= kTile ? ~uint64_t{0} : (uint64_t{1} << count) - 1;
}

// seen[r]: bit n says whether row first_row + r sees key first_key + n. Returns whether any does;
// behind a barrier. Windows are cut off at S.
__device__ __forceinline__ bool LoadSeen(const AttentionCudaArgs& args, int64_t first_row,
                                         int64_t first_key, uint64_t* seen) {
  uint64_t bits = 0;
  if (threadIdx.x < kTile) {
    const int64_t row = first_row + threadIdx.x;
    if (row < args.T) {
      if (args.seen != nullptr) {
        bits = args.seen[row * CeilDiv(args.S, kKeysPerWord) + first_key / kKeysPerWord];
      } else {
        const int64_t begin = args.begin[row] - first_key, end = args.end[row] - first_key;
        bits = LowBits(end < args.S - first_key ? end : args.S - first_key) & ~LowBits(begin);
      }
    }
    seen[threadIdx.x] = bits;
  }
  return __syncthreads_or(bits != 0) != 0;
}

struct TileRange {
  int begin, end;  // tiles of keys
};

// The tiles of keys that rows first_row .. first_row + 63 may see. All threads; has barriers.
__device__ __forceinline__ TileRange TilesOfKeys(const AttentionCudaArgs& args, int64_t first_row) {
  const int num_tiles = static_cast<int>(CeilDiv(args.S, kTile));
  if (args.seen != nullptr) return {0, num_tiles};
  __shared__ int begin, end;
  if (threadIdx.x == 0) {
    begin = num_tiles;
    end = 0;
  }
  __syncthreads();
  const int64_t row = first_row + threadIdx.x;
  if (threadIdx.x < kTile && row < args.T && args.begin[row] < args.end[row]) {
    atomicMin(&begin, max(args.begin[row], 0) / kTile);
    atomicMax(&end, min(static_cast<int>(CeilDiv(args.end[row], kTile)), num_tiles));
  }
  __syncthreads();
  return {begin, end};
}

// --- Host: launching with as many slices as the widest head takes.

// Calls function(Width<kSlices>{}, groups of kMaxSlices tiles of columns).
template <typename Function>
void ForSlices(int64_t width, Function function) {
  const int64_t slices = CeilDiv(width, kTile);
  const unsigned groups = static_cast<unsigned>(CeilDiv(slices, kMaxSlices));
  if (slices <= 1) return function(Width<1>{}, 1u);
  if (slices == 2) return function(Width<2>{}, 1u);
  if (slices == 3) return function(Width<3>{}, 1u);
  function(Width<kMaxSlices>{}, groups);
}

// More than 48 KiB of shared memory must be asked for.
template <typename Kernel>
void AllowTiles(Kernel kernel, int num_tiles) {
  CheckCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 num_tiles * kTileBytes),
            "shared memory of attention");
}

}  // namespace baleen::cuda
