// E4M3 codes with one scale for 1 x 128 or 128 x 128 elements.
//
// All hold a tile in registers between finding amax and rounding. Maxima are taken of pairs of
// bf16, which lose nothing. Codes leave in runs of 128 bytes; where the operand is the transpose
// they turn in shared memory, four rows of a column as one word (a thread has adjacent rows).
//
//   rows     a block has 8 rows x 1024 columns, a warp a row; the scales of 8 rows meet in shared
//            memory and leave as whole sectors of 32 bytes
//   columns  a block has 128 rows x 64 columns, a thread 4 rows x 8 columns
//   both     a block has 128 x 128, a thread 8 rows x 8 columns
//   blocks   the same
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

// What values are multiplied by: 1 / 2^e by its exponent, NaN where the scale is not finite.
__device__ __forceinline__ float InverseOf(float scale) {
  const uint32_t bits = __float_as_uint(scale);
  return __uint_as_float(bits >= 0x7F800000u ? 0x7FC00000u : 0x7F000000u - bits);
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

// The greater |x| of two pairs of bf16, each; a NaN loses.
__device__ __forceinline__ uint32_t AbsMaxPairs(uint32_t a, uint32_t b) {
  a &= 0x7FFF7FFFu;
  b &= 0x7FFF7FFFu;
  const __nv_bfloat162 greater = __hmax2(reinterpret_cast<const __nv_bfloat162&>(a),
                                         reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(greater);
}
template <int kFirst, int kLast>
__device__ __forceinline__ uint32_t MaxPairsOverLanes(uint32_t pair) {
#pragma unroll
  for (int distance = kFirst; distance <= kLast; distance *= 2) {
    pair = AbsMaxPairs(pair, __shfl_xor_sync(~0u, pair, distance));
  }
  return pair;
}
__device__ __forceinline__ uint32_t Codes4(uint32_t pair, uint32_t next, float inverse) {
  return Codes4(LowBf16(pair), HighBf16(pair), LowBf16(next), HighBf16(next), inverse);
}

__device__ __forceinline__ float ScaleOfPair(uint32_t pair) {
  return ScaleOf(fmaxf(fmaxf(LowBf16(pair), HighBf16(pair)), 0.0f));
}
__device__ __forceinline__ void LoadPairs(const void* values, int64_t at, uint32_t (&pairs)[4]) {
  const uint4 word = LoadWord<Bf16, 8>(static_cast<const Bf16*>(values) + at);
  pairs[0] = word.x;
  pairs[1] = word.y;
  pairs[2] = word.z;
  pairs[3] = word.w;
}
// The codes of column k of four rows.
__device__ __forceinline__ uint32_t CodesDown(const uint32_t (&a)[4], const uint32_t (&b)[4],
                                              const uint32_t (&c)[4], const uint32_t (&d)[4], int k,
                                              float inverse) {
  const int p = k / 2;
  return k % 2 == 0
             ? Codes4(LowBf16(a[p]), LowBf16(b[p]), LowBf16(c[p]), LowBf16(d[p]), inverse)
             : Codes4(HighBf16(a[p]), HighBf16(b[p]), HighBf16(c[p]), HighBf16(d[p]), inverse);
}
// Scales and inverses of kColumns columns from the warps' maxima; the scales go to memory.
template <int kColumns>
__device__ __forceinline__ void ScaleColumns(const uint32_t (&maxima)[kThreads / 32][kColumns / 2],
                                             int64_t first_column, const Fp8QuantiseCudaArgs& args,
                                             float* inverses) {
  if (threadIdx.x >= kColumns / 2) return;
  uint32_t pair = 0;
#pragma unroll
  for (int warp = 0; warp < kThreads / 32; ++warp) {
    pair = AbsMaxPairs(pair, maxima[warp][threadIdx.x]);
  }
  const float2 scale = {ScaleOf(LowBf16(pair)), ScaleOf(HighBf16(pair))};
  reinterpret_cast<float2*>(inverses)[threadIdx.x] = {InverseOf(scale.x), InverseOf(scale.y)};
  const int64_t column = first_column + 2 * threadIdx.x;
  if (column < args.outer_stored) {
    *reinterpret_cast<float2*>(args.scales + blockIdx.y * args.scale_stride + column) = scale;
  }
}
__device__ __forceinline__ void LoadInverses(const float* from, float (&inverse)[8]) {
  Load<float, 4>(from, reinterpret_cast<float(&)[4]>(inverse[0]));
  Load<float, 4>(from + 4, reinterpret_cast<float(&)[4]>(inverse[4]));
}

constexpr int kRowVectors = 4;             // of a lane, in flight together
constexpr int kRowRuns = 2 * kRowVectors;  // of a block's rows

__global__ void __launch_bounds__(kThreads)
    RowsKernel(const Fp8QuantiseCudaArgs args, uint32_t row_blocks) {
  __shared__ float scales[kRowRuns][kRowsOfBlock];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const uint32_t group = blockIdx.x / row_blocks;
  const int first_run = static_cast<int>(blockIdx.x - group * row_blocks) * kRowRuns;
  const int64_t first_row = int64_t{group} * kRowsOfBlock, row = first_row + warp;
  const int column = first_run * kRun + lane * 8;
  const auto* const values = static_cast<const Bf16*>(args.values) + row * args.columns + column;
  uint4 words[kRowVectors] = {};
#pragma unroll
  for (int j = 0; j < kRowVectors; ++j) {
    if (row < args.rows && column + 256 * j < args.columns) {
      words[j] = LoadWord<Bf16, 8>(values + 256 * j);
    }
  }
  auto* const codes = static_cast<uint8_t*>(args.codes) + row * args.depth_stored + column;
#pragma unroll
  for (int j = 0; j < kRowVectors; ++j) {
    const uint4& w = words[j];
    const uint32_t pair =
        MaxPairsOverLanes<1, 8>(AbsMaxPairs(AbsMaxPairs(w.x, w.y), AbsMaxPairs(w.z, w.w)));
    const float scale = ScaleOfPair(pair);
    if (column + 256 * j >= args.depth_stored) continue;  // half of a warp or all of it
    const float inverse = InverseOf(scale);
    *reinterpret_cast<uint2*>(codes + 256 * j) =
        make_uint2(Codes4(w.x, w.y, inverse), Codes4(w.z, w.w, inverse));
    if (lane % 16 == 0) scales[2 * j + lane / 16][warp] = scale;
  }
  __syncthreads();
  const int run = first_run + threadIdx.x / kRowsOfBlock;
  if (threadIdx.x < kRowRuns * kRowsOfBlock && run * kRun < args.depth_stored) {
    args.scales[run * args.scale_stride + first_row + threadIdx.x % kRowsOfBlock] =
        scales[threadIdx.x / kRowsOfBlock][threadIdx.x % kRowsOfBlock];
  }
}

__global__ void __launch_bounds__(kThreads) ColumnsKernel(const Fp8QuantiseCudaArgs args) {
  // Word w of column c lies at w ^ 4 (c / 8): neither side has bank conflicts.
  __shared__ __align__(16) uint32_t turned[kColumnTile][kRunWords];
  __shared__ __align__(16) uint32_t maxima[kThreads / 32][kColumnTile / 2];  // pairs of columns
  __shared__ __align__(16) float inverses[kColumnTile];
  const int chunk = threadIdx.x % 8, quad = threadIdx.x / 8;  // 8 columns, 4 rows
  const int64_t first_row = int64_t{blockIdx.y} * kRun,
                first_column = int64_t{blockIdx.x} * kColumnTile;
  const int64_t row = first_row + quad * 4, column = first_column + chunk * 8;
  uint32_t v[4][4] = {};  // [row, pair of columns]
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (row + i < args.rows && column < args.columns) {
      LoadPairs(args.values, (row + i) * args.columns + column, v[i]);
    }
  }
  uint32_t amax[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    amax[p] = MaxPairsOverLanes<8, 16>(
        AbsMaxPairs(AbsMaxPairs(v[0][p], v[1][p]), AbsMaxPairs(v[2][p], v[3][p])));
  }
  if (threadIdx.x % 32 < 8) {
    *reinterpret_cast<uint4*>(&maxima[threadIdx.x / 32][chunk * 4]) =
        make_uint4(amax[0], amax[1], amax[2], amax[3]);
  }
  __syncthreads();
  ScaleColumns<kColumnTile>(maxima, first_column, args, inverses);
  __syncthreads();
  float inverse[8];
  LoadInverses(inverses + chunk * 8, inverse);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    turned[chunk * 8 + k][quad ^ chunk * 4] = CodesDown(v[0], v[1], v[2], v[3], k, inverse[k]);
  }
  __syncthreads();
  // Sixteen codes an access: eight threads a column.
  const int part = threadIdx.x % 8 * 4;
#pragma unroll
  for (int c = threadIdx.x / 8; c < kColumnTile; c += kThreads / 8) {
    if (first_column + c >= args.outer_stored) break;
    auto* const codes =
        static_cast<uint8_t*>(args.codes) + (first_column + c) * args.depth_stored + first_row;
    reinterpret_cast<uint4*>(codes)[threadIdx.x % 8] =
        *reinterpret_cast<const uint4*>(&turned[c][part ^ c / 8 * 4]);
  }
}

// Four bits spread over five, without the one in which neighbouring groups of 8 rows differ.
__device__ __forceinline__ int Spread(int chunk) { return (chunk & 1) | (chunk & ~1) << 1; }

// Both kinds of runs from one look at the values: tile (blockIdx.x, blockIdx.y) of [columns, rows],
// 128 x 128, a thread 8 rows x 8 columns.
__global__ void __launch_bounds__(kThreads)
    BothKernel(const Fp8QuantiseCudaArgs by_rows, const Fp8QuantiseCudaArgs by_columns) {
  // Word w of column c lies at w ^ Spread(c / 8): neither side has bank conflicts.
  __shared__ uint32_t turned[kRun][kRunWords];
  __shared__ __align__(16) uint32_t maxima[kThreads / 32][kRun / 2];  // pairs of columns
  __shared__ __align__(16) float inverses[kRun];
  const int chunk = threadIdx.x % 16, eight = threadIdx.x / 16;  // 8 columns, 8 rows
  const int64_t first_row = int64_t{blockIdx.y} * kRun, first_column = int64_t{blockIdx.x} * kRun;
  const int64_t row = first_row + eight * 8, column = first_column + chunk * 8;
  uint32_t v[8][4] = {};  // [row, pair of columns]
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (row + i < by_rows.rows && column < by_rows.columns) {
      LoadPairs(by_rows.values, (row + i) * by_rows.columns + column, v[i]);
    }
  }
  // Columns: what the block's warps have seen of each.
  uint32_t amax[4];
#pragma unroll
  for (int p = 0; p < 4; ++p) {
    amax[p] = AbsMaxPairs(v[0][p], v[1][p]);
#pragma unroll
    for (int i = 2; i < 8; ++i) amax[p] = AbsMaxPairs(amax[p], v[i][p]);
    amax[p] = MaxPairsOverLanes<16, 16>(amax[p]);
  }
  if (threadIdx.x % 32 < 16) {
    *reinterpret_cast<uint4*>(&maxima[threadIdx.x / 32][chunk * 4]) =
        make_uint4(amax[0], amax[1], amax[2], amax[3]);
  }
  // Rows: half a warp has one, and needs nobody else.
  float scales[8];
  auto* const row_codes = static_cast<uint8_t*>(by_rows.codes);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t pair = MaxPairsOverLanes<1, 8>(
        AbsMaxPairs(AbsMaxPairs(v[i][0], v[i][1]), AbsMaxPairs(v[i][2], v[i][3])));
    scales[i] = ScaleOfPair(pair);
    const float inverse = InverseOf(scales[i]);
    if (row + i < by_rows.outer_stored) {
      *reinterpret_cast<uint2*>(row_codes + (row + i) * by_rows.depth_stored + column) =
          make_uint2(Codes4(v[i][0], v[i][1], inverse), Codes4(v[i][2], v[i][3], inverse));
    }
  }
  if (chunk == 0 && row < by_rows.outer_stored) {  // outer_stored is a multiple of 16
    auto* const to =
        reinterpret_cast<float4*>(by_rows.scales + blockIdx.x * by_rows.scale_stride + row);
    to[0] = make_float4(scales[0], scales[1], scales[2], scales[3]);
    to[1] = make_float4(scales[4], scales[5], scales[6], scales[7]);
  }
  __syncthreads();
  ScaleColumns<kRun>(maxima, first_column, by_columns, inverses);
  __syncthreads();
  float inverse[8];
  LoadInverses(inverses + chunk * 8, inverse);
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    uint32_t(&run)[kRunWords] = turned[chunk * 8 + k];
    run[(eight * 2) ^ Spread(chunk)] = CodesDown(v[0], v[1], v[2], v[3], k, inverse[k]);
    run[(eight * 2 + 1) ^ Spread(chunk)] = CodesDown(v[4], v[5], v[6], v[7], k, inverse[k]);
  }
  __syncthreads();
  const int word = threadIdx.x % 32;
  for (int c = threadIdx.x / 32; c < kRun; c += kThreads / 32) {
    if (first_column + c >= by_columns.outer_stored) break;
    reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(by_columns.codes) +
                                (first_column + c) * by_columns.depth_stored + first_row)[word] =
        turned[c][word ^ Spread(c / 8)];
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
  const int64_t row_blocks = CeilDiv(args.depth_stored, kRowRuns * kRun);
  const int64_t blocks = args.outer_stored / kRowsOfBlock * row_blocks;
  if (blocks == 0) return;
  RowsKernel<<<static_cast<unsigned>(blocks), kThreads, 0, AsStream(stream)>>>(
      args, static_cast<uint32_t>(row_blocks));
  CheckLaunch("fp8 quantise: rows");
}

void Fp8QuantiseColumnsCuda(const Fp8QuantiseCudaArgs& args, void* stream) {
  const dim3 grid(static_cast<unsigned>(CeilDiv(args.outer_stored, kColumnTile)),
                  static_cast<unsigned>(args.depth_stored / kRun));
  if (grid.x == 0 || grid.y == 0) return;
  ColumnsKernel<<<grid, kThreads, 0, AsStream(stream)>>>(args);
  CheckLaunch("fp8 quantise: columns");
}

void Fp8QuantiseBothCuda(const Fp8QuantiseCudaArgs& by_rows, const Fp8QuantiseCudaArgs& by_columns,
                         void* stream) {
  const dim3 grid(static_cast<unsigned>(by_rows.depth_stored / kRun),
                  static_cast<unsigned>(by_columns.depth_stored / kRun));
  if (grid.x == 0 || grid.y == 0) return;
  BothKernel<<<grid, kThreads, 0, AsStream(stream)>>>(by_rows, by_columns);
  CheckLaunch("fp8 quantise: both");
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
