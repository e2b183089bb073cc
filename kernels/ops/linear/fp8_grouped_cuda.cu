// Grouped GEMM over the experts of a rank in block FP8: the persistent blocks, the walk and the
// loads of grouped_matmul_cuda.cu, with sums that are promoted every 128 of K.
//
// Roofline (H100, per SM and clock: 8192 FLOP). A tile of 128 x 192 costs 768 clocks of tensor
// cores for each 128 of K and 40.5 KB of loads: 53 B a clock and SM, more than L2's 35 to 43; so
// where an expert has rows for two tiles, a cluster of two blocks loads B once: 37 B. Promotion: an
// element costs one FMA for 128 products, 96 a thread, 192 issue slots of each of the SM's four
// schedulers for both consumers beside 768 clocks: hidden, because one consumer promotes while the
// other's products run. The tensor cores keep about 13 bits of a sum of 128 products; the fp32 sums
// of K / 128 such are exact beside that.
//
//   producer    one thread of the third warpgroup: walks the tiles, fills the stages of A [128,
//   128],
//               B [kTileN, 128] and A's scales [132] by tensor copies
//   2 consumers each 64 rows of the tile: 4 wgmma a stage into sums of their own, which then are
//               scaled and added to the tile's: 2 x 96 accumulators a thread
//
// Rows of an expert: any number; what a tile loads beyond its end is computed and never stored.
// Beyond the matrix TMA delivers zeros. K is a multiple of 128: the quantiser fills it with zeros.
#include <cuda_bf16.h>

#include <algorithm>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/barrier_at.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_fp8.cuh"
#include "kernels/ops/linear/fp8_grouped_cuda.h"
#include "kernels/ops/linear/grouped_matmul_tiles.cuh"

namespace baleen {
namespace {

using grouped_matmul::Extents;
using grouped_matmul::Tile;

constexpr int kTileM = 128;
constexpr int kDepth = 128;  // of K a stage: one 128-byte line of codes, one scale
constexpr int kThreads = 384;
constexpr int kClusterRows = 512;  // an expert's rows from which on two blocks share B
constexpr int kConsumerThreads = 256;
constexpr int kConsumerRows = 64;
constexpr int kABytes = kTileM * kDepth;
// The copy engine starts a row of scales at a multiple of 16 bytes, an expert starts anywhere: a
// tile's scales arrive with up to three of the rows before it. A stage's place is a multiple of
// 128.
constexpr int kScaleAlign = 4;
constexpr int kScaleBox = kTileM + kScaleAlign;
constexpr int kScaleStride = 160;
constexpr int kScaleBytes = kScaleBox * 4;
constexpr int kWarpOutput = 16 * 128;  // bytes in which a warp turns 16 rows of 64 columns

template <int kTileN>
constexpr int kStages = kTileN == 128 ? 6 : 5;
// Columns of a tile that share a scale of B whatever the tile.
template <int kTileN>
constexpr int kGroup = kTileN % 128 == 0 ? 128 : 64;

// Swizzled atoms start at multiples of 1024.
template <int kTileN>
struct Shared {
  uint8_t a[kStages<kTileN>][kABytes];
  uint8_t b[kStages<kTileN>][kTileN * kDepth];
  float a_scales[kStages<kTileN>][kScaleStride];
  uint8_t output[kConsumerThreads / 32][kWarpOutput];
  uint64_t full[kStages<kTileN>], empty[kStages<kTileN>];
};
static_assert(sizeof(Shared<128>) <= 232448 && sizeof(Shared<192>) <= 232448,
              "sm_90 gives a block 227 KiB");

struct Params {
  Extents extents;  // in: K; out: columns
  const float* b_scales;
  int64_t b_scale_stride;
  int scale_blocks;  // of an expert's columns
  __nv_bfloat16* result;
};

// Tiles of all blocks of a cluster, one below the other.
template <int kTileN, int kCluster>
using Walk = grouped_matmul::TileWalk<GroupedProduct::kForward, kTileM * kCluster, kTileN>;

// The next tile of this block, false behind the last. Blocks of a cluster walk in step.
template <int kCluster, typename AnyWalk>
__device__ __forceinline__ bool NextTile(AnyWalk& walk, int& index, Tile& tile) {
  const bool found = walk.Seek(index, tile);
  index += gridDim.x / kCluster;
  if constexpr (kCluster > 1) tile.m += static_cast<int>(cuda::ClusterRank()) * kTileM;
  return found;
}

// A tile of B for both blocks of the cluster: lands at the same address in each, and on each one's
// barrier.
__device__ __forceinline__ void LoadForBoth(uint32_t shared, const CUtensorMap* map, int column,
                                            int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
      "l"(map), "r"(column), "r"(row), "r"(cuda::SharedAddress(barrier)), "h"(uint16_t{3})
      : "memory");
}

template <int kTileN, int kCluster>
__device__ void Produce(Shared<kTileN>& sh, const Params& params, const CUtensorMap& a_map,
                        const CUtensorMap& scale_map, const CUtensorMap& b_map) {
  Walk<kTileN, kCluster> walk(params.extents);
  Tile tile;
  int stage = 0, index = blockIdx.x / kCluster;
  uint32_t phase = 1;
  while (NextTile<kCluster>(walk, index, tile)) {
    const int row = tile.row_begin + tile.m;
    const int weight_row = tile.expert * params.extents.out + tile.n;
    for (int k = 0; k < params.extents.in; k += kDepth) {
      cuda::BarrierWait(&sh.empty[stage], phase);
      uint64_t* const full = &sh.full[stage];
      cuda::BarrierArriveExpect(full, kABytes + kScaleBytes + kTileN * kDepth);
      cuda::TensorLoad(cuda::SharedAddress(sh.a[stage]), &a_map, k, row, full);
      cuda::TensorLoad(cuda::SharedAddress(sh.a_scales[stage]), &scale_map,
                       row / kScaleAlign * kScaleAlign, k / kDepth, full);
      const uint32_t b = cuda::SharedAddress(sh.b[stage]);
      if constexpr (kCluster == 1) {
        cuda::TensorLoad(b, &b_map, k, weight_row, full);
      } else {
        constexpr int kHalf = kTileN / 2;
        const int first = static_cast<int>(cuda::ClusterRank()) * kHalf;
        LoadForBoth(b + first * kDepth, &b_map, k, weight_row + first, full);
      }
      if (++stage == kStages<kTileN>) {
        stage = 0;
        phase ^= 1;
      }
    }
  }
}

// Issues d = A B^T over one stage, this consumer's 64 rows.
template <int kTileN>
__device__ __forceinline__ void Multiply(float (&d)[kTileN / 2], uint32_t a, uint32_t b) {
  const uint64_t first_a = cuda::Opaque(cuda::DescriptorKMajor(a)),
                 first_b = cuda::Opaque(cuda::DescriptorKMajor(b));
  cuda::WgmmaFence();
#pragma unroll
  for (int step = 0; step < kDepth / 32; ++step) {
    if constexpr (kTileN == 128) {
      cuda::WgmmaE4m3N128(d, cuda::Advance(first_a, step * 32), cuda::Advance(first_b, step * 32),
                          step > 0);
    } else {
      cuda::WgmmaE4m3N192(d, cuda::Advance(first_a, step * 32), cuda::Advance(first_b, step * 32),
                          step > 0);
    }
  }
  cuda::WgmmaCommit();
}

// sums += part * scale of the row * scale of the column's block.
template <int kTileN>
__device__ __forceinline__ void Promote(float (&sums)[kTileN / 2], const float (&part)[kTileN / 2],
                                        const float (&a)[2],
                                        const float (&b)[kTileN / kGroup<kTileN>]) {
#pragma unroll
  for (int group = 0; group < kTileN / kGroup<kTileN>; ++group) {
    const float low = a[0] * b[group], high = a[1] * b[group];
#pragma unroll
    for (int j = 0; j < kGroup<kTileN> / 8; ++j) {
      const int i = (group * kGroup<kTileN> / 8 + j) * 4;
      sums[i] = fmaf(part[i], low, sums[i]);
      sums[i + 1] = fmaf(part[i + 1], low, sums[i + 1]);
      sums[i + 2] = fmaf(part[i + 2], high, sums[i + 2]);
      sums[i + 3] = fmaf(part[i + 3], high, sums[i + 3]);
    }
  }
}

// A warp's 16 rows to bf16, 64 columns at a time through `buffer`; `rows` of them exist (may be
// below 1).
template <int kTileN>
__device__ __forceinline__ void Store(const float (&d)[kTileN / 2], uint32_t buffer,
                                      __nv_bfloat16* result, int64_t row, int rows, int n,
                                      int columns) {
  const int lane = threadIdx.x & 31, own_row = lane & 15;
#pragma unroll
  for (int piece = 0; piece < kTileN / 64; ++piece) {
    // Chunk c (8 columns) of row r lies at c ^ (r % 8): neither side has bank conflicts.
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      const float* const v = d + piece * 32 + 4 * j;
      const int chunk = j + (lane >> 4);
      cuda::StoreMatrix4(buffer + own_row * 128 + ((chunk ^ (own_row & 7)) << 4),
                         cuda::PackBf16(v[0], v[1]), cuda::PackBf16(v[2], v[3]),
                         cuda::PackBf16(v[4], v[5]), cuda::PackBf16(v[6], v[7]));
    }
    __syncwarp();
    const int chunk = lane & 7, column = n + piece * 64 + chunk * 8;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int r = 4 * i + (lane >> 3);
      uint32_t words[4];
      cuda::LoadShared16(buffer + r * 128 + ((chunk ^ (r & 7)) << 4), words);
      if (r < rows && column < columns) {
        *reinterpret_cast<uint4*>(result + (row + r) * columns + column) =
            make_uint4(words[0], words[1], words[2], words[3]);
      }
    }
    __syncwarp();
  }
}

// The scales of B for each group of the tile's columns; those behind the last are never stored.
template <int kTileN>
__device__ __forceinline__ void ScaleRows(const Params& params, const Tile& tile,
                                          const float* (&rows)[kTileN / kGroup<kTileN>]) {
#pragma unroll
  for (int group = 0; group < kTileN / kGroup<kTileN>; ++group) {
    const int block = min((tile.n + group * kGroup<kTileN>) / 128, params.scale_blocks - 1);
    rows[group] = params.b_scales +
                  (int64_t{tile.expert} * params.scale_blocks + block) * params.b_scale_stride;
  }
}

template <int kTileN, int kCluster>
__device__ void Consume(Shared<kTileN>& sh, const Params& params, int consumer) {
  constexpr int kBBytes = kTileN * kDepth, kGroups = kTileN / kGroup<kTileN>;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;  // warp: 0..7
  const uint32_t all_a = cuda::SharedAddress(sh.a) + consumer * kConsumerRows * kDepth,
                 all_b = cuda::SharedAddress(sh.b);
  const uint32_t full = cuda::SharedAddress(sh.full), empty = cuda::SharedAddress(sh.empty);
  Walk<kTileN, kCluster> walk(params.extents);
  Tile tile;
  int stage = 0, index = blockIdx.x / kCluster;
  uint32_t phase = 0;
  float sums[kTileN / 2], part[kTileN / 2];
  // To every block that loads into this one's stages: lane i tells block i.
  const auto hand_back = [&] {
    __syncwarp();
    if constexpr (kCluster == 1) {
      if (lane == 0) cuda::BarrierArriveAt(empty + 8 * stage);
    } else {
      if (lane < kCluster) cuda::BarrierArrivePeer(&sh.empty[stage], lane);
    }
    if (++stage == kStages<kTileN>) {
      stage = 0;
      phase ^= 1;
    }
  };
  while (NextTile<kCluster>(walk, index, tile)) {
    const int steps = params.extents.in / kDepth, rows = tile.rows - tile.m;
    if (consumer * kConsumerRows >= rows) {  // no row of this consumer
      for (int k = 0; k < steps; ++k) {
        cuda::BarrierWaitAt(full + 8 * stage, phase);
        hand_back();
      }
      continue;
    }
    const float* b_scales[kGroups];
    ScaleRows<kTileN>(params, tile, b_scales);
    const int first_scale = (tile.row_begin + tile.m) % kScaleAlign + 16 * warp + lane / 4;
#pragma unroll
    for (int i = 0; i < kTileN / 2; ++i) sums[i] = 0.0f;
    for (int k = 0; k < steps; ++k) {
      cuda::BarrierWaitAt(full + 8 * stage, phase);
      Multiply<kTileN>(part, all_a + stage * kABytes, all_b + stage * kBBytes);
      const float* const of_rows = sh.a_scales[stage] + first_scale;
      const float a[2] = {of_rows[0], of_rows[8]};
      float b[kGroups];
#pragma unroll
      for (int group = 0; group < kGroups; ++group) b[group] = __ldg(b_scales[group] + k);
      cuda::WgmmaWait<0>();
      cuda::PinRegisters(part);
      hand_back();
      Promote<kTileN>(sums, part, a, b);
    }
    Store<kTileN>(sums, cuda::SharedAddress(sh.output[warp]), params.result,
                  int64_t{tile.row_begin} + tile.m + 16 * warp, rows - 16 * warp, tile.n,
                  params.extents.out);
  }
}

template <int kTileN, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    Fp8GroupedKernel(const __grid_constant__ Params params,
                     const __grid_constant__ CUtensorMap a_map,
                     const __grid_constant__ CUtensorMap scale_map,
                     const __grid_constant__ CUtensorMap b_map) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  Shared<kTileN>& sh = *reinterpret_cast<Shared<kTileN>*>(raw_shared);
  if (threadIdx.x == 0) {
    cuda::PrefetchTensorMap(&a_map);
    cuda::PrefetchTensorMap(&scale_map);
    cuda::PrefetchTensorMap(&b_map);
    for (int i = 0; i < kStages<kTileN>; ++i) {
      cuda::BarrierInit(&sh.full[i], 1);
      cuda::BarrierInit(&sh.empty[i], kCluster * kConsumerThreads / 32);  // a lane a consumer warp
    }
    cuda::FenceBarrierInit();
  }
  __syncthreads();
  if constexpr (kCluster > 1) cuda::ClusterSync();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    cuda::LowerRegisters<40>();
    if (threadIdx.x == kConsumerThreads) {
      Produce<kTileN, kCluster>(sh, params, a_map, scale_map, b_map);
    }
  } else {
    cuda::RaiseRegisters<232>();
    Consume<kTileN, kCluster>(sh, params, warpgroup);
  }
  if constexpr (kCluster > 1) {
    // A block's memory and barriers stay until nobody loads into them or arrives.
    __syncwarp();
    cuda::ClusterSync();
  }
}

// Scales [rows, columns] fp32; tiles of one row x 132, not swizzled.
void MakeScaleMap(CUtensorMap* map, const float* base, int64_t rows, int64_t columns) {
  void* entry = nullptr;
  cudaDriverEntryPointQueryResult found;
  cuda::CheckCuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000,
                                                   cudaEnableDefault, &found),
                  "fp8_grouped: tensor map");
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(columns) * sizeof(float)};
  const cuuint32_t box[2] = {kScaleBox, 1}, steps[2] = {1, 1};
  const CUresult result = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(entry)(
      map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, const_cast<float*>(base), sizes, strides, box, steps,
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  cuda::CheckCuda(result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue,
                  "fp8_grouped: tensor map of scales");
}

void MakeCodeMap(CUtensorMap* map, const void* base, int64_t rows, int64_t depth, int box_rows) {
  cuda::CheckCuda(
      cuda::MakeTensorMap(map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, base, rows, depth, box_rows),
      "fp8_grouped: tensor map of codes");
}

template <int kTileN, int kCluster>
void Launch(const Fp8GroupedCudaArgs& args, const Fp8GroupedPlan& plan, cudaStream_t stream) {
  CUtensorMap a_map, scale_map, b_map;
  MakeCodeMap(&a_map, args.a_codes, args.num_rows, args.depth, kTileM);
  MakeScaleMap(&scale_map, args.a_scales, args.depth / kDepth, args.a_scale_stride);
  MakeCodeMap(&b_map, args.b_codes, args.num_experts * args.columns, args.depth, kTileN / kCluster);
  const auto kernel = Fp8GroupedKernel<kTileN, kCluster>;
  cuda::CheckCuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes),
      "fp8_grouped: shared memory");
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {kCluster, 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(plan.num_blocks);
  config.blockDim = dim3(plan.threads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  const Params params = {
      {args.offsets_L1, static_cast<int>(args.num_rows), static_cast<int>(args.num_experts),
       static_cast<int>(args.depth), static_cast<int>(args.columns)},
      args.b_scales,
      args.b_scale_stride,
      static_cast<int>(cuda::CeilDiv(args.columns, 128)),
      static_cast<__nv_bfloat16*>(args.result)};
  cuda::CheckCuda(cudaLaunchKernelEx(&config, kernel, params, a_map, scale_map, b_map),
                  "fp8_grouped");
}

}  // namespace

Fp8GroupedPlan PlanFp8Grouped(const Fp8GroupedCudaArgs& args, int num_sms, int cluster,
                              int tile_n) {
  Fp8GroupedPlan plan;
  // An expert's last tile may hold one row: at most so many, however the rows are dealt.
  const int64_t owners = std::min(args.num_experts, args.num_rows);
  if (cluster == 0) {
    cluster = args.num_rows / std::max<int64_t>(owners, 1) >= kClusterRows ? 2 : 1;
  }
  if (tile_n == 0) tile_n = args.columns <= 128 ? 128 : 192;
  plan.cluster = cluster;
  plan.tile_m = kTileM * cluster;
  plan.tile_n = tile_n;
  plan.threads = kThreads;
  plan.shared_bytes = static_cast<int>(tile_n == 128 ? sizeof(Shared<128>) : sizeof(Shared<192>));
  const int64_t row_tiles = (args.num_rows + owners * (plan.tile_m - 1)) / plan.tile_m;
  const int64_t tiles = row_tiles * cuda::CeilDiv(args.columns, tile_n);
  plan.num_blocks = static_cast<int>(std::min<int64_t>(tiles, num_sms / cluster)) * cluster;
  return plan;
}

void LaunchFp8Grouped(const Fp8GroupedCudaArgs& args, const Fp8GroupedPlan& plan, void* stream) {
  if (plan.num_blocks == 0) return;
  const auto launch = plan.tile_n == 128 ? (plan.cluster == 2 ? Launch<128, 2> : Launch<128, 1>)
                                         : (plan.cluster == 2 ? Launch<192, 2> : Launch<192, 1>);
  launch(args, plan, cuda::AsStream(stream));
}

void Fp8GroupedCuda(const Fp8GroupedCudaArgs& args, void* stream) {
  LaunchFp8Grouped(args, PlanFp8Grouped(args, cuda::NumMultiprocessors()), stream);
}

}  // namespace baleen
