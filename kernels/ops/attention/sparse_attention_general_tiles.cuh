// General sparse attention on the GPU: what its forward and its backward share.
//
// A block takes a query row and a group of heads and walks over the row's list, 32 slots at a time.
// The listed key rows are gathered into shared memory, in slices of up to kMostSlice columns.
//
//   scores, do.c     a lane is a slot, a warp has one or two heads
//   o, dq            a lane has columns, a warp its heads; sums in shared memory
//   dkv              a lane has columns, a warp four slots; one row a (query row, slot) to memory
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "kernels/cuda/row.cuh"
#include "kernels/ops/attention/sparse_attention_general_cuda.h"

namespace baleen::general_sparse_attention {

using namespace cuda;  // NOLINT: the device helpers

constexpr int kSlots = 32;  // of a step: a lane each
constexpr int kMostWarps = 8;
constexpr int kMostSlice = 640;  // columns of the gathered rows in shared memory
constexpr int kSharedLimit = 227 * 1024;

__host__ __device__ constexpr int PadTo4(int64_t n) { return static_cast<int>((n + 3) / 4 * 4); }

// Sizes of a block. Columns are padded to multiples of 4, with zeros.
struct Tiles {
  int heads_a_warp, warps;
  int c4, v4;  // C and V padded
  int slice;   // columns gathered at a time
  int stride;  // floats between gathered rows: 4 times an odd number, no bank conflicts

  __host__ __device__ int Group() const { return heads_a_warp * warps; }
};

// --- Loads. All threads of the block call them.

// Rows of `width` elements, from a pointer for each row (null: zeros), padded with zeros.
template <typename T, int kWidth, typename RowOf>
__device__ __forceinline__ void LoadRows(float* to, int stride, int rows, int width, int padded,
                                         RowOf row_of) {
  const int vectors = (padded + kWidth - 1) / kWidth;
  for (int i = threadIdx.x; i < rows * vectors; i += blockDim.x) {
    const int row = i / vectors, column = i % vectors * kWidth;
    float values[kWidth] = {};
    const T* const from = row_of(row);
    if (from != nullptr && column < width) Load<T, kWidth>(from + column, values);
#pragma unroll
    for (int k = 0; k < kWidth; ++k) to[row * stride + column + k] = values[k];
  }
}

// The slice of a step's 32 key rows from column `first` on, fenced by barriers on both sides.
template <typename T, int kWidth>
__device__ __forceinline__ void GatherSlice(const SparseAttentionGeneralArgs& args,
                                            const Tiles& tiles, const int32_t* ids, int64_t step,
                                            int first, float* kv) {
  __syncthreads();
  const int width = static_cast<int>(args.width) - first;
  LoadRows<T, kWidth>(kv, tiles.stride, kSlots, width, min(tiles.slice, tiles.c4 - first),
                      [&](int slot) -> const T* {
                        const int64_t k = step * kSlots + slot;
                        const int id = k < args.num_slots ? __ldg(ids + k) : -1;
                        if (id < 0) return nullptr;
                        return static_cast<const T*>(args.kv_SC) + id * args.width + first;
                      });
  __syncthreads();
}

__device__ __forceinline__ float4 At4(const float* address) {
  return *reinterpret_cast<const float4*>(address);
}
__device__ __forceinline__ void AddProducts(float4& sum, const float4& a, const float4& b) {
  sum.x += a.x * b.x;
  sum.y += a.y * b.y;
  sum.z += a.z * b.z;
  sum.w += a.w * b.w;
}
__device__ __forceinline__ void AddScaled(float4& sum, float factor, const float4& a) {
  sum.x += factor * a.x;
  sum.y += factor * a.y;
  sum.z += factor * a.z;
  sum.w += factor * a.w;
}
__device__ __forceinline__ float Total(const float4& sum) {
  return (sum.x + sum.y) + (sum.z + sum.w);
}
__device__ __forceinline__ float WarpMax(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, offset));
  }
  return value;
}

// sums[c] = factor * sums[c] + sum over slots of weights[slot] kv[slot, c], by one warp.
__device__ __forceinline__ void AddWeightedRows(float* sums, float factor, const float* weights,
                                                const float* kv, int stride, int columns) {
  for (int c = 4 * (threadIdx.x % 32); c < columns; c += 128) {
    float4 sum = {0, 0, 0, 0};
#pragma unroll 8
    for (int slot = 0; slot < kSlots; ++slot) {
      AddScaled(sum, weights[slot], At4(kv + slot * stride + c));
    }
    AddScaled(sum, factor, At4(sums + c));
    *reinterpret_cast<float4*>(sums + c) = sum;
  }
}

template <typename T>
__device__ __forceinline__ T FromFloat(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else {
    return __float2bfloat16_rn(value);
  }
}

// --- Host.

inline int SharedBytes(const Tiles& tiles, bool backward) {
  const int a_head = backward ? 2 * tiles.c4 + tiles.v4 + 2 * kSlots : tiles.c4 + tiles.v4 + kSlots;
  return 4 * (tiles.Group() * a_head + kSlots * tiles.stride);
}

// As many heads at a time as there are and as fit.
inline Tiles PlanTiles(const SparseAttentionGeneralArgs& args, bool backward) {
  Tiles tiles = {};
  tiles.c4 = PadTo4(args.width);
  tiles.v4 = PadTo4(args.value_dim);
  tiles.slice = std::min(tiles.c4, kMostSlice);
  tiles.stride = 4 * (tiles.slice / 4 | 1);
  tiles.heads_a_warp = args.num_heads > kMostWarps ? 2 : 1;
  tiles.warps = args.num_heads > kMostWarps / 2 ? kMostWarps : kMostWarps / 2;
  if (SharedBytes(tiles, backward) > kSharedLimit) tiles.heads_a_warp = 1;
  while (SharedBytes(tiles, backward) > kSharedLimit && tiles.warps > 1) tiles.warps /= 2;
  return tiles;
}

// Whole vectors where every row begins on 16 bytes.
inline bool HasVectors(const SparseAttentionGeneralArgs& args, const void* d_o, int lanes) {
  return args.width % lanes == 0 && args.value_dim % lanes == 0 &&
         Aligned16({args.q_THC, args.kv_SC, d_o});
}

// Calls launch(T{}, Width<>, Width<heads a warp>).
template <typename Launch>
void ForInstance(const SparseAttentionGeneralArgs& args, const void* d_o, const Tiles& tiles,
                 Launch launch) {
  ForElement(args.element, [&](auto zero) {
    using T = decltype(zero);
    ForWidth<T>(HasVectors(args, d_o, kLanes<T>), [&](auto width) {
      tiles.heads_a_warp == 2 ? launch(zero, width, Width<2>{}) : launch(zero, width, Width<1>{});
    });
  });
}

template <typename Kernel>
void AllowShared(Kernel* kernel, int bytes) {
  CheckCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
            "shared memory of general sparse attention");
}

}  // namespace baleen::general_sparse_attention
