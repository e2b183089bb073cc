// Grouped GEMM over the experts of a rank: persistent blocks, TMA and wgmma, no padding of rows.
//
//   kForward         Y[rows of l, out] = X[rows of l, in] W_l^T     M rows, N out, K in
//   kBackwardInput   dX[rows of l, in] = dY[rows of l, out] W_l     M rows, N in,  K out
//   ...OfTwo         the same + dY' W'_l: K runs over a second pair behind the first
//   kBackwardWeight  dW_l[out, in]    += dY^T X over l's rows       M out,  N in,  K rows
//
// Roofline (H100, per SM and clock: 4096 FLOP, 128 B of shared memory). A tile of 128 x 256 costs
// 1024 clocks of tensor cores for each 64 of K and 48 KB of loads: 48 B a clock and SM, 8.2 TB/s at
// 700 TF, which is all that L2 delivers (8 to 10 TB/s measured); 128 x 128 would want 64 B. Shared
// memory: wgmma m64n256k16 reads 10 KB in 128 clocks, 80 B a clock, and 48 B a clock arrive: full.
// So two consumers of 64 x 256 (128 accumulators a thread) share one B, and where an expert has
// rows for two tiles, two blocks (a cluster) have one above the other and each loads half of B for
// both: 32 B a clock. HBM: a wave of 132 tiles covers about 2048 x 2048 (grouped_matmul_tiles.cuh),
// 58 MB for K = 7168 in 65 us: 0.9 TB/s. Below about 270 rows an expert the weights' bytes bind
// instead.
//
//   producer    one thread of the third warpgroup: walks the tiles, fills 4 stages of A [128, 64]
//               and B [256, 64] by tensor copies. It runs up to 4 stages into the next tile while
//               the consumers store the last one.
//   2 consumers each 64 rows of the tile: 4 wgmma a stage, one stage in flight; the stage before is
//               handed back when its products are done.
//
// Rows of an expert: any number. A tile's rows begin at the expert's first row + 128 i, whatever
// its alignment: TMA counts rows. What it loads beyond the expert's end are rows of the next one:
// as M they are computed and never stored (a consumer with no row at all skips its products); as K
// (kBackwardWeight) both operands' rows are overwritten by zeros in shared memory before the
// products of the expert's last stage. Beyond the matrix TMA delivers zeros, so K needs no multiple
// of 64 elsewhere.
//
// Stores. bf16: a warp turns its 16 x 256 through 4 KB of its own in two halves, so that rows leave
// as runs of 256 bytes, masked by row and column. fp32 gradient: an element moves 8 bytes for 2
// FLOP a row of its expert: at 1024 rows HBM alone needs as long as the products. The producer
// therefore prefetches the tile's dW into L2 evenly over its stages, and the consumers read, add
// and write from registers: measured 30000 clocks a tile beside 16 a row of products, more than HBM
// needs (20000); NOTES_gemm.md of the bench has the reasons. Every element is one sum over all of K
// in one accumulator and one addition: deterministic.
#include <algorithm>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/barrier_at.cuh"
#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.cuh"
#include "kernels/cuda/vector.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/ops/linear/grouped_matmul_cuda.h"
#include "kernels/ops/linear/grouped_matmul_plain.cuh"
#include "kernels/ops/linear/grouped_matmul_store.cuh"
#include "kernels/ops/linear/grouped_matmul_tiles.cuh"

namespace baleen {
namespace {

using namespace grouped_matmul;  // NOLINT: tile walk, stores, plain kernel

constexpr int kTileM = 128;
constexpr int kTileN = 256;
constexpr int kDepth = 64;  // of K a stage: one 128-byte line of bf16
constexpr int kStages = 4;
constexpr int kThreads = 384;
constexpr int kClusterRows = 512;  // an expert's rows along M from which on two blocks share B
constexpr int kConsumerThreads = 256;
constexpr int kConsumerRows = 64;
constexpr int kRunBytes = 64 * 128;  // a box of 64 lines
constexpr int kABytes = kTileM * kDepth * 2;
constexpr int kBBytes = kTileN * kDepth * 2;
constexpr int kRowBarrier = 1;  // named: both consumers, around zeroed rows

// Swizzled atoms start at multiples of 1024.
struct Shared {
  uint8_t a[kStages][kABytes];
  uint8_t b[kStages][kBBytes];
  uint8_t output[kConsumerThreads / 32][kWarpOutput];
  uint64_t full[kStages], empty[kStages];
};
static_assert(sizeof(Shared) <= 232448, "sm_90 gives a block 227 KiB");

struct Params {
  Extents extents;
  void* result;
  bool add;  // kBackwardWeight: to what the result holds
};
template <GroupedProduct kProduct>
struct Maps {
  CUtensorMap a[kPairs<kProduct>], b[kPairs<kProduct>];
};

// Tiles of all blocks of a cluster, one below the other.
template <GroupedProduct kProduct, int kCluster>
using Walk = TileWalk<kProduct, kTileM * kCluster, kTileN>;

template <GroupedProduct kProduct>
__device__ __forceinline__ int DepthOf(const Extents& extents, const Tile& tile) {
  if constexpr (kProduct == GroupedProduct::kForward) return extents.in;
  if constexpr (kProduct == GroupedProduct::kBackwardWeight) return tile.rows;
  return extents.out;
}

__device__ __forceinline__ int StepsOf(int depth) { return (depth + kDepth - 1) / kDepth; }

// K as the stages cover it: a second pair begins with a stage of its own.
template <GroupedProduct kProduct>
__device__ __forceinline__ int DepthOfAll(const Extents& extents, const Tile& tile) {
  const int depth = DepthOf<kProduct>(extents, tile);
  return kPairs<kProduct> == 1 ? depth : kPairs<kProduct> * StepsOf(depth) * kDepth;
}

// The dW rows [first, last) of a tile on their way into L2.
__device__ __forceinline__ void PrefetchGradient(const Params& params, const Tile& tile, int first,
                                                 int last) {
  const Extents& extents = params.extents;
  const uint32_t bytes = min(kTileN, extents.in - tile.n) * sizeof(float);
  last = min(last, extents.out - tile.m);
  for (int row = first; row < last; ++row) {
    const float* const address =
        static_cast<const float*>(params.result) +
        (static_cast<int64_t>(tile.expert) * extents.out + tile.m + row) * extents.in + tile.n;
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(bytes)
                 : "memory");
  }
}

// A tile of B for every block of the cluster: lands at the same address in each, and on each one's
// barrier.
template <int kCluster>
__device__ __forceinline__ void LoadShared(uint32_t shared, const CUtensorMap* map, int column,
                                           int row, uint64_t* barrier) {
  if constexpr (kCluster == 1) {
    cuda::TensorLoad(shared, map, column, row, barrier);
  } else {
    constexpr uint16_t kAll = (1 << kCluster) - 1;
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"
        ".multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared),
        "l"(map), "r"(column), "r"(row), "r"(cuda::SharedAddress(barrier)), "h"(kAll)
        : "memory");
  }
}

// Asks for stage `stage` of A and B: K from k on. A block loads its part of B for all of them.
template <GroupedProduct kProduct, int kCluster>
__device__ __forceinline__ void LoadStage(Shared& sh, const Extents& extents, const Tile& tile,
                                          int k, int stage, const CUtensorMap& a_map,
                                          const CUtensorMap& b_map) {
  constexpr int kRuns = kTileN / 64 / kCluster;  // of B a block loads
  uint64_t* const full = &sh.full[stage];
  const int first_run = kCluster == 1 ? 0 : static_cast<int>(cuda::ClusterRank()) * kRuns;
  const uint32_t a = cuda::SharedAddress(sh.a[stage]),
                 b = cuda::SharedAddress(sh.b[stage]) + first_run * kRunBytes;
  const int n = tile.n + first_run * 64;
  cuda::BarrierArriveExpect(full, kABytes + kBBytes);
  if constexpr (kProduct == GroupedProduct::kBackwardWeight) {
    for (int run = 0; run < kTileM / 64; ++run) {
      cuda::TensorLoad(a + run * kRunBytes, &a_map, tile.m + run * 64, tile.row_begin + k, full);
    }
    for (int run = 0; run < kRuns; ++run) {
      LoadShared<kCluster>(b + run * kRunBytes, &b_map, n + run * 64, tile.row_begin + k, full);
    }
  } else {
    cuda::TensorLoad(a, &a_map, k, tile.row_begin + tile.m, full);
    const int weight_row = tile.expert * extents.out;
    if constexpr (kProduct == GroupedProduct::kForward) {
      LoadShared<kCluster>(b, &b_map, k, weight_row + n, full);
    } else {
      // The last stage may hold rows of the next expert: A is zero there.
      for (int run = 0; run < kRuns; ++run) {
        LoadShared<kCluster>(b + run * kRunBytes, &b_map, n + run * 64, weight_row + k, full);
      }
    }
  }
}

// The next tile of this block, false behind the last. Blocks of a cluster walk in step.
template <int kCluster, typename AnyWalk>
__device__ __forceinline__ bool NextTile(AnyWalk& walk, int& index, Tile& tile) {
  const bool found = walk.Seek(index, tile);
  index += gridDim.x / kCluster;
  if constexpr (kCluster > 1) tile.m += static_cast<int>(cuda::ClusterRank()) * kTileM;
  return found;
}

template <GroupedProduct kProduct, int kCluster>
__device__ void Produce(Shared& sh, const Params& params, const Maps<kProduct>& maps) {
  Walk<kProduct, kCluster> walk(params.extents);
  Tile tile;
  int stage = 0, index = blockIdx.x / kCluster;
  uint32_t phase = 1;
  while (NextTile<kCluster>(walk, index, tile)) {
    const int steps = StepsOf(DepthOf<kProduct>(params.extents, tile));
    for (int step = 0; step < kPairs<kProduct> * steps; ++step) {
      const int pair = kPairs<kProduct> > 1 && step >= steps ? 1 : 0;
      cuda::BarrierWait(&sh.empty[stage], phase);
      LoadStage<kProduct, kCluster>(sh, params.extents, tile, (step - pair * steps) * kDepth, stage,
                                    maps.a[pair], maps.b[pair]);
      if constexpr (kProduct == GroupedProduct::kBackwardWeight) {
        if (params.add) {
          PrefetchGradient(params, tile, kTileM * step / steps, kTileM * (step + 1) / steps);
        }
      }
      if (++stage == kStages) {
        stage = 0;
        phase ^= 1;
      }
    }
  }
}

// Issues d (+)= A B over one stage, this consumer's 64 rows.
template <GroupedProduct kProduct>
__device__ __forceinline__ void Multiply(float (&d)[128], uint32_t a, uint32_t b, bool accumulate) {
  constexpr bool kTransA = kProduct == GroupedProduct::kBackwardWeight;
  constexpr bool kTransB = kProduct != GroupedProduct::kForward;
  // Opaque: else the descriptors of all steps are kept in registers across the loop.
  const uint64_t first_a =
      cuda::Opaque(kTransA ? cuda::DescriptorMnMajor(a, kRunBytes) : cuda::DescriptorKMajor(a));
  const uint64_t first_b =
      cuda::Opaque(kTransB ? cuda::DescriptorMnMajor(b, kRunBytes) : cuda::DescriptorKMajor(b));
  cuda::WgmmaFence();
#pragma unroll
  for (int step = 0; step < kDepth / 16; ++step) {
    cuda::WgmmaBf16<kTileN, kTransA, kTransB>::Shared(
        d, cuda::Advance(first_a, step * (kTransA ? 2048 : 32)),
        cuda::Advance(first_b, step * (kTransB ? 2048 : 32)), accumulate || step > 0);
  }
  cuda::WgmmaCommit();
}

// Rows [valid, 64) of K of a stage become zero in A and B; all consumer threads call.
__device__ __forceinline__ void ZeroRows(Shared& sh, int stage, int valid) {
  constexpr int kRuns = (kTileM + kTileN) / 64, kChunks = 8;
  const int chunks = (kDepth - valid) * kChunks;
  for (int run = 0; run < kRuns; ++run) {
    const uint32_t base = run < kTileM / 64
                              ? cuda::SharedAddress(sh.a[stage]) + run * kRunBytes
                              : cuda::SharedAddress(sh.b[stage]) + (run - kTileM / 64) * kRunBytes;
    for (int i = threadIdx.x; i < chunks; i += kConsumerThreads) {
      cuda::StoreShared16(base + valid * 128 + i * 16, 0, 0, 0, 0);
    }
  }
  cuda::FenceProxyAsync();
  cuda::NamedSync(kRowBarrier, kConsumerThreads);
}

template <GroupedProduct kProduct, int kCluster>
__device__ void Consume(Shared& sh, const Params& params, int consumer) {
  const Extents& extents = params.extents;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;  // warp: 0..7
  const uint32_t all_a = cuda::SharedAddress(sh.a) + consumer * kRunBytes,
                 all_b = cuda::SharedAddress(sh.b);
  const uint32_t full = cuda::SharedAddress(sh.full), empty = cuda::SharedAddress(sh.empty);
  const int columns = Walk<kProduct, kCluster>::Columns(extents);
  Walk<kProduct, kCluster> walk(extents);
  Tile tile;
  int stage = 0, previous = 0, index = blockIdx.x / kCluster;
  uint32_t phase = 0;
  float d[128];
  // To every block that loads into this one's stages: lane i tells block i.
  const auto hand_back = [&](int used) {
    if constexpr (kCluster == 1) {
      if (lane == 0) cuda::BarrierArriveAt(empty + 8 * used);
    } else {
      if (lane < kCluster) cuda::BarrierArrivePeer(&sh.empty[used], lane);
    }
  };
  while (NextTile<kCluster>(walk, index, tile)) {
    constexpr bool kGradient = kProduct == GroupedProduct::kBackwardWeight;
    const int depth = DepthOfAll<kProduct>(extents, tile);
    const int rows = (kGradient ? extents.out : tile.rows) - tile.m;
    const auto wait_for_stage = [&](int k) {
      cuda::BarrierWaitAt(full + 8 * stage, phase);
      if (kGradient && depth - k < kDepth) ZeroRows(sh, stage, depth - k);
    };
    const auto next_stage = [&] {
      previous = stage;
      if (++stage == kStages) {
        stage = 0;
        phase ^= 1;
      }
    };
    if (consumer * kConsumerRows >= rows) {  // no row of this consumer
      for (int k = 0; k < depth; k += kDepth) {
        wait_for_stage(k);
        hand_back(stage);
        next_stage();
      }
      continue;
    }
    wait_for_stage(0);
    Multiply<kProduct>(d, all_a + stage * kABytes, all_b + stage * kBBytes, false);
    next_stage();
    for (int k = kDepth; k < depth; k += kDepth) {
      wait_for_stage(k);
      Multiply<kProduct>(d, all_a + stage * kABytes, all_b + stage * kBBytes, true);
      cuda::WgmmaWait<1>();
      hand_back(previous);
      next_stage();
    }
    cuda::WgmmaWait<0>();
    cuda::PinRegisters(d);
    hand_back(previous);
    const int warp_rows = rows - 16 * warp;
    if constexpr (kGradient) {
      const int64_t row = static_cast<int64_t>(tile.expert) * extents.out + tile.m + 16 * warp;
      AddF32(d, static_cast<float*>(params.result), row, warp_rows, tile.n, columns, params.add);
    } else {
      const int64_t row = static_cast<int64_t>(tile.row_begin) + tile.m + 16 * warp;
      StoreBf16(d, cuda::SharedAddress(sh.output[warp]), static_cast<__nv_bfloat16*>(params.result),
                row, warp_rows, tile.n, columns);
    }
  }
}

template <GroupedProduct kProduct, int kCluster>
__global__ void __launch_bounds__(kThreads, 1)
    GroupedMatmulKernel(const __grid_constant__ Params params,
                        const __grid_constant__ Maps<kProduct> maps) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  Shared& sh = *reinterpret_cast<Shared*>(raw_shared);
  if (threadIdx.x == 0) {
    for (int pair = 0; pair < kPairs<kProduct>; ++pair) {
      cuda::PrefetchTensorMap(&maps.a[pair]);
      cuda::PrefetchTensorMap(&maps.b[pair]);
    }
    for (int i = 0; i < kStages; ++i) {
      cuda::BarrierInit(&sh.full[i], 1);
      cuda::BarrierInit(&sh.empty[i], kCluster * kConsumerThreads / 32);  // a lane a consumer warp
    }
    cuda::FenceBarrierInit();
  }
  __syncthreads();
  if constexpr (kCluster > 1) cuda::ClusterSync();
  const int warpgroup = threadIdx.x / 128;
  if (warpgroup == 2) {
    cuda::LowerRegisters<56>();
    if (threadIdx.x == kConsumerThreads) Produce<kProduct, kCluster>(sh, params, maps);
  } else {
    cuda::RaiseRegisters<224>();
    Consume<kProduct, kCluster>(sh, params, warpgroup);
  }
  if constexpr (kCluster > 1) {
    // A block's memory and barriers stay until nobody loads into them or arrives.
    __syncwarp();
    cuda::ClusterSync();
  }
}

Extents ExtentsOf(const GroupedMatmulCudaArgs& args) {
  return {args.offsets_L1, static_cast<int>(args.num_rows), static_cast<int>(args.num_experts),
          static_cast<int>(args.in), static_cast<int>(args.out)};
}

void MakeMap(CUtensorMap* map, const void* base, int64_t rows, int64_t columns, int box_rows) {
  cuda::CheckCuda(cuda::MakeTensorMap(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, base, rows,
                                      columns * 2, box_rows),
                  "grouped_matmul: tensor map");
}

template <GroupedProduct kProduct, int kCluster>
void LaunchTensorCores(const GroupedMatmulCudaArgs& args, const GroupedMatmulPlan& plan,
                       cudaStream_t stream) {
  constexpr bool kForward = kProduct == GroupedProduct::kForward;
  Maps<kProduct> maps;
  for (int pair = 0; pair < kPairs<kProduct>; ++pair) {
    const void* const left = pair == 0 ? args.left : args.second_left;
    const void* const right = pair == 0 ? args.right : args.second_right;
    if constexpr (kProduct == GroupedProduct::kBackwardWeight) {
      MakeMap(&maps.a[pair], left, args.num_rows, args.out, kDepth);
      MakeMap(&maps.b[pair], right, args.num_rows, args.in, kDepth);
    } else {
      MakeMap(&maps.a[pair], left, args.num_rows, kForward ? args.in : args.out, kTileM);
      MakeMap(&maps.b[pair], right, args.num_experts * args.out, args.in,
              kForward ? kTileN / kCluster : kDepth);
    }
  }
  const auto kernel = GroupedMatmulKernel<kProduct, kCluster>;
  cuda::CheckCuda(
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_bytes),
      "grouped_matmul: shared memory");
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
  const Params params = {ExtentsOf(args), args.result, args.add};
  cuda::CheckCuda(cudaLaunchKernelEx(&config, kernel, params, maps), "grouped_matmul");
}

template <GroupedProduct kProduct>
void Launch(const GroupedMatmulCudaArgs& args, const GroupedMatmulPlan& plan, cudaStream_t stream) {
  if (plan.tensor_cores) {
    plan.cluster == 2 ? LaunchTensorCores<kProduct, 2>(args, plan, stream)
                      : LaunchTensorCores<kProduct, 1>(args, plan, stream);
    return;
  }
  cuda::ForElement(args.element, [&](auto element) {
    using T = decltype(element);
    const PlainParams<T> params = {
        ExtentsOf(args),
        {static_cast<const T*>(args.left), static_cast<const T*>(args.second_left)},
        {static_cast<const T*>(args.right), static_cast<const T*>(args.second_right)},
        args.result,
        args.add};
    GroupedPlainKernel<kProduct, T><<<plan.num_blocks, plan.threads, 0, stream>>>(params);
  });
  cuda::CheckLaunch("grouped_matmul");
}

}  // namespace

GroupedMatmulPlan PlanGroupedMatmul(GroupedProduct product, const GroupedMatmulCudaArgs& args,
                                    int num_sms, int cluster) {
  GroupedMatmulPlan plan;
  plan.tensor_cores = args.element == CudaElement::kBF16 && args.in > 0 && args.out > 0 &&
                      args.in % 8 == 0 && args.out % 8 == 0;
  const bool gradient = product == GroupedProduct::kBackwardWeight;
  // An expert's last tile may hold one row: at most so many, however the rows are dealt.
  const int64_t owners = std::min(args.num_experts, args.num_rows);
  // Two blocks share B where an expert has rows for both; else every other block would idle.
  const int64_t m_of_expert = gradient ? args.out : args.num_rows / std::max<int64_t>(owners, 1);
  if (cluster == 0) cluster = m_of_expert >= kClusterRows ? 2 : 1;
  plan.cluster = plan.tensor_cores ? cluster : 1;
  plan.tile_m = plan.tensor_cores ? kTileM * plan.cluster : kPlainTile;
  plan.tile_n = plan.tensor_cores ? kTileN : kPlainTile;
  plan.threads = plan.tensor_cores ? kThreads : kPlainThreads;
  plan.shared_bytes = plan.tensor_cores ? static_cast<int>(sizeof(Shared)) : 0;
  const int64_t row_tiles = gradient ? owners * cuda::CeilDiv(args.out, plan.tile_m)
                                     : (args.num_rows + owners * (plan.tile_m - 1)) / plan.tile_m;
  const int64_t columns = product == GroupedProduct::kForward ? args.out : args.in;
  const int64_t tiles = row_tiles * cuda::CeilDiv(columns, plan.tile_n);
  const int64_t at_once = plan.tensor_cores ? num_sms / plan.cluster : num_sms * 4;
  plan.num_blocks = static_cast<int>(std::min(tiles, at_once)) * plan.cluster;
  return plan;
}

void LaunchGroupedMatmul(GroupedProduct product, const GroupedMatmulCudaArgs& args,
                         const GroupedMatmulPlan& plan, void* stream) {
  if (product == GroupedProduct::kBackwardWeight && !args.add && args.num_experts > 0) {
    FillWithoutRowsKernel<<<dim3(kFillBlocks, static_cast<unsigned>(args.num_experts)),
                            kPlainThreads, 0, cuda::AsStream(stream)>>>(
        ExtentsOf(args), static_cast<float*>(args.result));
    cuda::CheckLaunch("grouped_matmul: zeros");
  }
  if (plan.num_blocks == 0) return;
  switch (product) {
    case GroupedProduct::kForward:
      return Launch<GroupedProduct::kForward>(args, plan, cuda::AsStream(stream));
    case GroupedProduct::kBackwardInput:
      return Launch<GroupedProduct::kBackwardInput>(args, plan, cuda::AsStream(stream));
    case GroupedProduct::kBackwardInputOfTwo:
      return Launch<GroupedProduct::kBackwardInputOfTwo>(args, plan, cuda::AsStream(stream));
    case GroupedProduct::kBackwardWeight:
      return Launch<GroupedProduct::kBackwardWeight>(args, plan, cuda::AsStream(stream));
  }
}

void GroupedMatmulCuda(GroupedProduct product, const GroupedMatmulCudaArgs& args, void* stream) {
  LaunchGroupedMatmul(product, args, PlanGroupedMatmul(product, args, cuda::NumMultiprocessors()),
                      stream);
}

}  // namespace baleen
