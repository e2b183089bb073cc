// E4M3 codes with one scale for 1 x 128 or 128 x 128 elements.
//
// All three hold a tile in registers between finding amax and rounding. Codes leave in runs of 128
// bytes; where the operand is the transpose they turn in shared memory, four rows of a column as
// one word (a thread has adjacent rows).
//
//   rows     a warp a row, 256 columns at a time; the scales of 8 rows meet in shared memory and
//            leave as whole sectors of 32 bytes
//   columns  a block has 128 rows x 64 columns, a thread 4 rows x 8 columns
//   blocks   a block has 128 x 128, a thread 8 rows x 8 columns
#include <cuda_fp8.h>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/ops/linear/fp8_quantise_cuda.h"

namespace baleen {
namespace {

using namespace cuda;

using Bf16 = __nv_bfloat16;

constexpr int kRun = 128;        // elements along the depth that share a scale
constexpr int kRowsOfBlock = 8;  // of the rows kernel: a warp each
constexpr int kThreads = 256;
constexpr int kColumnTile = 64;
constexpr int kRunWords = kRun / 4;

// The smallest 2^e with 448 * 2^e >= amax, e >= -126, from amax = m 2^x with m in [1, 2) and 448 =
// 1.75 2^8; 1 for zeros. An amax that is not finite is its own scale: what shares it becomes NaN.
__device__ __forceinline__ float ScaleOf(float amax) {
  const uint32_t bits = __float_as_uint(amax);
  const int exponent = static_cast<int>(bits >> 23);
  if (exponent == 255) return amax;
  if (bits == 0) return 1.0f;
  const int of_scale = exponent - ((bits & 0x7FFFFFu) <= 0x600000u ? 8 : 7);
  return __uint_as_float(static_cast<uint32_t>(max(of_scale, 1)) << 23);
}

// What values are multiplied by; 0 * inf = NaN where the scale is not finite.
__device__ __forceinline__ float InverseOf(float scale) {
  return isfinite(scale) ? 1.0f / scale : 0.0f * scale;
}

// Codes of a and b, a in the low byte.
__device__ __forceinline__ uint32_t CodePair(float a, float b, float inverse) {
  return __nv_cvt_float2_to_fp8x2(make_float2(a * inverse, b * inverse), __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ uint32_t Codes4(float a, float b, float c, float d, float inverse) {
  return CodePair(a, b, inverse) | CodePair(c, d, inverse) << 16;
}

__device__ __forceinline__ float AbsMax(const float (&v)[8], float amax) {
#pragma unroll
  for (int k = 0; k < 8; ++k) amax = fmaxf(amax, fabsf(v[k]));  // passes over NaN
  return amax;
}

// The maximum over lanes that differ in the bits kFirst .. kLast.
template <int kFirst, int kLast>
__device__ __forceinline__ float MaxOverLanes(float value) {
#pragma unroll
  for (int distance = kFirst; distance <= kLast; distance *= 2) {
    value = fmaxf(value, __shfl_xor_sync(~0u, value, distance));
  }
  return value;
}

__global__ void __launch_bounds__(kThreads) RowsKernel(const Fp8QuantiseCudaArgs args) {
  extern __shared__ float scales_of_rows[];  // [depth / 128][8]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t first_row = int64_t{blockIdx.x} * kRowsOfBlock, row = first_row + warp;
  const auto* const values = static_cast<const Bf16*>(args.values) + row * args.columns;
  auto* const codes = static_cast<uint8_t*>(args.codes) + row * args.depth_stored;
  const int columns = row < args.rows ? static_cast<int>(args.columns) : 0;
  const int depth = static_cast<int>(args.depth_stored);
#pragma unroll 4
  for (int column = lane * 8; column < depth + lane * 8; column += 256) {
    float v[8] = {};
    if (column < columns) Load<Bf16, 8>(values + column, v);
    const float scale = ScaleOf(MaxOverLanes<1, 8>(AbsMax(v, 0.0f)));
    if (column >= depth) continue;  // the second half of the warp may be behind the end
    const float inverse = InverseOf(scale);
    *reinterpret_cast<uint2*>(codes + column) = make_uint2(Codes4(v[0], v[1], v[2], v[3], inverse),
                                                           Codes4(v[4], v[5], v[6], v[7], inverse));
    if (lane % 16 == 0) scales_of_rows[column / kRun * kRowsOfBlock + warp] = scale;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < depth / kRun * kRowsOfBlock; i += kThreads) {
    args.scales[i / kRowsOfBlock * args.scale_stride + first_row + i % kRowsOfBlock] =
        scales_of_rows[i];
  }
}

__global__ void __launch_bounds__(kThreads) ColumnsKernel(const Fp8QuantiseCudaArgs args) {
  // Word w of column c lies at w ^ 4 (c / 8): neither side has bank conflicts.
  __shared__ uint32_t turned[kColumnTile][kRunWords];
  __shared__ float maxima[kThreads / 32][kColumnTile];
  const int chunk = threadIdx.x % 8, quad = threadIdx.x / 8;  // 8 columns, 4 rows
  const int64_t first_row = int64_t{blockIdx.y} * kRun,
                first_column = int64_t{blockIdx.x} * kColumnTile;
  const int64_t row = first_row + quad * 4, column = first_column + chunk * 8;
  float v[4][8] = {};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row + i < args.rows && column < args.columns) {
      Load<Bf16, 8>(static_cast<const Bf16*>(args.values) + (row + i) * args.columns + column,
                    v[i]);
    }
  }
  float amax[8];
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    amax[k] = fmaxf(fmaxf(fabsf(v[0][k]), fabsf(v[1][k])), fmaxf(fabsf(v[2][k]), fabsf(v[3][k])));
    amax[k] = MaxOverLanes<8, 16>(amax[k]);
    if (threadIdx.x % 32 < 8) maxima[threadIdx.x / 32][chunk * 8 + k] = amax[k];
  }
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    float all = 0;
#pragma unroll
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      all = fmaxf(all, maxima[warp][chunk * 8 + k]);
    }
    const float scale = ScaleOf(all);
    turned[chunk * 8 + k][quad ^ chunk * 4] =
        Codes4(v[0][k], v[1][k], v[2][k], v[3][k], InverseOf(scale));
    if (quad == 0 && column < args.outer_stored) {
      args.scales[blockIdx.y * args.scale_stride + column + k] = scale;
    }
  }
  __syncthreads();
  const int word = threadIdx.x % 32;
  for (int c = threadIdx.x / 32; c < kColumnTile; c += kThreads / 32) {
    if (first_column + c >= args.outer_stored) break;
    auto* const codes =
        static_cast<uint8_t*>(args.codes) + (first_column + c) * args.depth_stored + first_row;
    reinterpret_cast<uint32_t*>(codes)[word] = turned[c][word ^ c / 8 * 4];
  }
}

// The maximum over the block, in every thread.
__device__ __forceinline__ float MaxOverBlock(float value) {
  __shared__ float maxima[kThreads / 32];
  value = MaxOverLanes<1, 16>(value);
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kThreads / 32; ++i) value = fmaxf(value, maxima[i]);
  return value;
}

// Four bits spread over five, without the one in which neighbouring groups of 8 rows differ.
__device__ __forceinline__ int Spread(int chunk) { return (chunk & 1) | (chunk & ~1) << 1; }

// Tile (blockIdx.x, blockIdx.y) of [columns, rows] of matrix blockIdx.z.
template <bool kTransposed>
__global__ void __launch_bounds__(kThreads) BlocksKernel(const Fp8QuantiseCudaArgs args) {
  // Word w of column c lies at w ^ Spread(c / 8): neither side has bank conflicts.
  __shared__ uint32_t turned[kTransposed ? kRun : 1][kRunWords];
  const int chunk = threadIdx.x % 16, eight = threadIdx.x / 16;  // 8 columns, 8 rows
  const int64_t first_row = int64_t{blockIdx.y} * kRun, first_column = int64_t{blockIdx.x} * kRun;
  const int64_t row = first_row + eight * 8, column = first_column + chunk * 8;
  const auto* const values =
      static_cast<const Bf16*>(args.values) + blockIdx.z * args.rows * args.columns;
  float v[8][8] = {};
  float amax = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (row + i < args.rows && column < args.columns) {
      Load<Bf16, 8>(values + (row + i) * args.columns + column, v[i]);
    }
    amax = AbsMax(v[i], amax);
  }
  const float scale = ScaleOf(MaxOverBlock(amax)), inverse = InverseOf(scale);
  const unsigned outer_tile = kTransposed ? blockIdx.x : blockIdx.y,
                 depth_tile = kTransposed ? blockIdx.y : blockIdx.x,
                 outer_tiles = kTransposed ? gridDim.x : gridDim.y;
  if (threadIdx.x == 0) {
    args.scales[(int64_t{blockIdx.z} * outer_tiles + outer_tile) * args.scale_stride + depth_tile] =
        scale;
  }
  auto* const codes =
      static_cast<uint8_t*>(args.codes) + blockIdx.z * args.outer_stored * args.depth_stored;
  if constexpr (!kTransposed) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (row + i >= args.rows) break;
      const float(&w)[8] = v[i];
      *reinterpret_cast<uint2*>(codes + (row + i) * args.depth_stored + column) = make_uint2(
          Codes4(w[0], w[1], w[2], w[3], inverse), Codes4(w[4], w[5], w[6], w[7], inverse));
    }
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      uint32_t(&run)[kRunWords] = turned[chunk * 8 + k];
      run[(eight * 2) ^ Spread(chunk)] = Codes4(v[0][k], v[1][k], v[2][k], v[3][k], inverse);
      run[(eight * 2 + 1) ^ Spread(chunk)] = Codes4(v[4][k], v[5][k], v[6][k], v[7][k], inverse);
    }
    __syncthreads();
    const int word = threadIdx.x % 32;
    for (int c = threadIdx.x / 32; c < kRun; c += kThreads / 32) {
      if (first_column + c >= args.outer_stored) break;
      reinterpret_cast<uint32_t*>(codes + (first_column + c) * args.depth_stored +
                                  first_row)[word] = turned[c][word ^ Spread(c / 8)];
    }
  }
}

}  // namespace

void Fp8QuantiseRowsCuda(const Fp8QuantiseCudaArgs& args, void* stream) {
  const auto blocks = static_cast<unsigned>(args.outer_stored / kRowsOfBlock);
  const size_t shared =
      static_cast<size_t>(args.depth_stored / kRun * kRowsOfBlock) * sizeof(float);
  if (blocks == 0) return;
  RowsKernel<<<blocks, kThreads, shared, AsStream(stream)>>>(args);
  CheckLaunch("fp8 quantise: rows");
}

void Fp8QuantiseColumnsCuda(const Fp8QuantiseCudaArgs& args, void* stream) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(args.outer_stored, kColumnTile)),
                  static_cast<unsigned>(args.depth_stored / kRun));
  if (grid.x == 0 || grid.y == 0) return;
  ColumnsKernel<<<grid, kThreads, 0, AsStream(stream)>>>(args);
  CheckLaunch("fp8 quantise: columns");
}

void Fp8QuantiseBlocksCuda(const Fp8QuantiseCudaArgs& args, bool transposed, void* stream) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(args.columns, kRun)),
                  static_cast<unsigned>(CeilDiv(args.rows, kRun)),
                  static_cast<unsigned>(args.batch));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (transposed) {
    BlocksKernel<true><<<grid, kThreads, 0, AsStream(stream)>>>(args);
  } else {
    BlocksKernel<false><<<grid, kThreads, 0, AsStream(stream)>>>(args);
  }
  CheckLaunch("fp8 quantise: blocks");
}

}  // namespace baleen
