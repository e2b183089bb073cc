// Backward of sparse MQA attention on Hopper (spec 2.5), with the KL target as a by-product.
//
// A thread block takes one query and one tile of 64 heads and walks over the query's keys in blocks
// of 64. A block costs, in steps of m64 x n64 x k16: S 36, dP 32, dq 36, dkv 68 = 5504 cycles.
//
//   warpgroup 0  S = q K^T, P = exp(scale S - lse), dP = do V^T, dS = scale P (dP - delta); P and
//   dS
//                as bf16 to shared memory; dq columns 0-255; target = sum of P over the heads
//   warpgroup 1  dq columns 256-447; then dkv = P^T do + dS^T q in 18 chunks of 32 columns, P^T and
//                dS^T held in registers, one chunk multiplying while the one before is sent away
//   warpgroup 2  dq columns 448-575; gathers the next block's keys with cp.async
//
// Shared memory is full: q 72 K, do 64 K, K 72 K, P and dS 16 K. So K has one buffer, and what
// decides the speed is how soon its pieces come free: dq follows dS at once, and each piece is
// gathered anew while dkv, which does not need K, multiplies. Registers are full too: dq takes
// 288 x 128, split 4 : 3 : 2 between the warpgroups (208, 200, 96 a thread); S and dP share 32.
//
// The two head tiles of a query with 128 heads form a cluster. Each sends half of its dkv chunks to
// the other (bf16, through the memory of P and dS, free once both are in registers) and sends on
// the sum of the other half: half the traffic to memory, and each row leaves once.
//
// Rows of dkv leave in one of two ways (sparse_scatter_cuda.cuh):
//   kFixed    each (query, key) row is stored as bf16 at its place in a workspace sorted by key; a
//             second kernel adds the rows of a key in the order of the queries. Reproducible bits.
//   kArrival  fp32 vector reductions into [S, C] sums in whatever order.
//
// Roofline per query of 128 heads and 2048 keys, H100: 1.44 GFLOP, 1.82 us at 794 TF. kFixed: 2.36
// MB written to memory and read again, 0.8 us each at 3 TB/s, the write behind the arithmetic.
// kArrival: 4.7 MB of reductions, 1.45 us at 3.25 TB/s inside L2, 2.9 us and more beyond it. For 64
// heads the traffic is the same for half the arithmetic.
#include <algorithm>

#include "kernels/ops/sparse_attention_backward_cuda.h"
#include "kernels/ops/sparse_attention_backward_keys.cuh"

namespace baleen {
namespace {

using namespace sparse_backward;  // NOLINT: the other parts of this kernel

// --- Warpgroup 2: gathers K, finds the places of the dkv rows, dq columns 448-575. ---

template <ScatterOrder kOrder, bool kPair>
__device__ __forceinline__ void RunLoader(const Params& params, Shared& s, int t, int tile,
                                          int num_blocks) {
  const int thread = ThreadInRole(), lane = thread % 32;
  const SparseAttentionBackwardArgs& args = params.args;
  const int32_t* ids = args.ids_TK + size_t(t) * args.num_selected;
  const uint64_t k_columns = DescriptorMnMajor(SharedAddress(s.k) + 7 * kPieceBytes, kPieceBytes);
  const uint64_t ds_heads = DescriptorKMajor(SharedAddress(s.ds));
  // Eight threads a row of 128 bytes, sixteen rows at a time.
  const int first_row = thread / 8, chunk = thread % 8;
  const uint8_t* kv = static_cast<const uint8_t*>(args.kv_SC) + chunk * 16;
  const uint32_t to = SharedAddress(s.k) + SwizzledOffset(first_row, chunk);

  // Threads 0-63 look after one key of the block each; its id is loaded a block ahead.
  int32_t next_id = thread < kBlock ? __ldg(ids + thread) : -1;

  float dq[64] = {};
  auto multiply_dq = [&](int i) {
    BarrierWait(&s.pds_full, i & 1);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      WgmmaBf16<128, false, true>::Shared(dq, Advance(ds_heads, step * 32),
                                          Advance(k_columns, step * 2048), true);
    }
    WgmmaCommit();
    WgmmaWait<0>();
    PinRegisters(dq);
    if (lane == 0) {
      BarrierArrive(&s.pds_empty);
      if constexpr (kPair) BarrierArrivePeer(&s.stage_open, ClusterRank() ^ 1);
    }
  };

  for (int i = 0; i < num_blocks; ++i) {
    const uint32_t parity = i & 1;
    const int32_t id = next_id;
    if (i > 0) multiply_dq(i - 1);
    if (thread < kBlock) {
      s.ids[thread] = id;
      const uint32_t valid = __ballot_sync(~0u, id >= 0);
      if (lane == 0) {
        s.valid[parity][thread / 32] = valid;
        BarrierArrive(&s.valid_full);
      }
    }
    NamedSync(2, 128);  // ids are there and all warps are done with pieces 7 and 8
    // Read at once: a shared load between copies would queue up behind them.
    int32_t from[4];
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) from[pass] = s.ids[pass * 16 + first_row];
    if (thread < kBlock && i + 1 < num_blocks) next_id = __ldg(ids + (i + 1) * kBlock + thread);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (i > 0 && group > 0) BarrierWait(&s.k_empty[group], parity ^ 1);
      GatherPieces(to, kv, from, GroupBegin(group), GroupEnd(group));
      CopyAsyncArrive(&s.k_full[group]);
    }
    if (thread < kBlock) {
      int32_t place = id;
      if (kOrder == ScatterOrder::kFixed && id >= 0) {
        place = ScatterPlace(params.index, t - params.first_token, id) * params.rows_per_place +
                (kPair ? 0 : tile);
      }
      s.row[parity][thread] = place;
      __syncwarp();
      if (lane == 0) BarrierArrive(&s.row_full);
    }
  }
  multiply_dq(num_blocks - 1);
  StoreDq(params, t, tile, 448, dq);
}

template <ScatterOrder kOrder, bool kPair>
__global__ void __launch_bounds__(kThreads, 1)
    SparseAttentionBackwardKernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared& s = *reinterpret_cast<Shared*>(shared_bytes);
  const SparseAttentionBackwardArgs& args = params.args;
  const int t = params.first_token + blockIdx.x / params.num_tiles;
  const int tile = blockIdx.x % params.num_tiles;
  const int thread = threadIdx.x;

  const int32_t first_id =
      FirstIdOfLanesBlock(args.ids_TK + size_t(t) * args.num_selected, args.num_selected);
  if (thread == 0) {
    for (uint64_t& barrier : s.k_full) BarrierInit(&barrier, 128);
    for (uint64_t& barrier : s.k_empty) BarrierInit(&barrier, 4);
    BarrierInit(&s.pds_full, 4);
    BarrierInit(&s.pds_empty, 8);
    BarrierInit(&s.valid_full, 2);
    BarrierInit(&s.row_full, 2);
    BarrierInit(&s.stage_open, 8);
    for (int slot = 0; slot < kSlots; ++slot) {
      BarrierInit(&s.received[slot], 4);
      BarrierInit(&s.credit[slot], 4);
    }
    FenceBarrierInit();
  }
  __syncthreads();
  if constexpr (kPair) ClusterSync();  // the peer's barriers exist
  if (thread < 256) StartQueries(params, s, t, tile);
  const int num_blocks = CountBlocks(first_id);

  if (num_blocks == 0) {
    CopyAsyncWait<0>();
    uint32_t* dq = reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(args.dq_THC) +
                                               size_t(t) * args.num_heads * kRowBytes);
    const int first = tile * kHeadTile;
    const int last = min(first + kHeadTile, args.num_heads);
    for (int x = first * kC / 2 + thread; x < last * kC / 2; x += kThreads) dq[x] = 0;
    if (params.num_tiles == 1) {
      for (int x = thread; x < args.num_selected; x += kThreads) {
        args.target_TK[size_t(t) * args.num_selected + x] = 0;
      }
    }
    return;
  }

  const int warpgroup = thread / 128;
  if (warpgroup == 0) {
    RaiseRegisters<208>();
    AwaitQueries();
    RunScores(params, s, t, tile, num_blocks);
  } else if (warpgroup == 1) {
    RaiseRegisters<200>();
    RunKeyGradients<kOrder, kPair>(params, s, t, tile, num_blocks);
  } else {
    LowerRegisters<96>();
    RunLoader<kOrder, kPair>(params, s, t, tile, num_blocks);
  }
  // A block's shared memory must outlive its peer's last arrivals.
  if constexpr (kPair) {
    __syncwarp();
    ClusterSync();
  }
}

// --- Host ---

size_t AlignUp(size_t bytes) { return (bytes + 255) / 256 * 256; }
int NumTiles(const SparseAttentionBackwardArgs& args) {
  return (args.num_heads + kHeadTile - 1) / kHeadTile;
}
// The tiles of a query are summed before their row is stored when they are a pair.
int RowsPerPlace(const SparseAttentionBackwardArgs& args) {
  return NumTiles(args) == 2 ? 1 : NumTiles(args);
}

// The parts of the workspace; `base` may be null when only the size is wanted.
struct Workspace {
  ScatterIndex index;
  void* rows;
  size_t mask_bytes, rows_bytes, bytes;
};
Workspace Divide(const SparseAttentionBackwardArgs& args, ScatterOrder order, int chunk,
                 void* base) {
  Workspace w = {};
  auto take = [&](size_t bytes) {
    uint8_t* at = static_cast<uint8_t*>(base) + w.bytes;
    w.bytes += AlignUp(bytes);
    return static_cast<void*>(at);
  };
  const size_t keys = args.num_keys;
  if (order == ScatterOrder::kFixed) {
    w.mask_bytes = size_t((chunk + 31) / 32) * keys * 4;
    w.index.masks_WS = static_cast<uint32_t*>(take(w.mask_bytes));
    w.index.ranks_WS = static_cast<int32_t*>(take(w.mask_bytes));
    w.index.starts_S = static_cast<int32_t*>(take(keys * 4));
    w.index.counts_S = static_cast<int32_t*>(take(keys * 4));
    w.index.cursor = static_cast<int32_t*>(take(4));
    w.index.num_keys = args.num_keys;
    w.rows_bytes = size_t(chunk) * args.num_selected * RowsPerPlace(args) * kRowBytes;
  } else {
    w.rows_bytes = keys * kC * 4;
  }
  w.rows = take(w.rows_bytes);
  return w;
}

template <ScatterOrder kOrder, bool kPair>
cudaError_t LaunchKernel(const Params& params, int num_tokens, cudaStream_t stream) {
  auto* kernel = SparseAttentionBackwardKernel<kOrder, kPair>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared)));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kPair ? 2 : 1;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(num_tokens * params.num_tiles);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

template <ScatterOrder kOrder>
cudaError_t LaunchMain(const Params& params, int num_tokens, cudaStream_t stream) {
  return params.num_tiles == 2 ? LaunchKernel<kOrder, true>(params, num_tokens, stream)
                               : LaunchKernel<kOrder, false>(params, num_tokens, stream);
}

cudaError_t LaunchFixedOrder(Params params, const Workspace& w, int chunk, cudaStream_t stream) {
  const SparseAttentionBackwardArgs& args = params.args;
  for (int first = 0; first < args.num_tokens; first += chunk) {
    const int rows = std::min(chunk, args.num_tokens - first);
    const int words = (rows + 31) / 32;
    cudaError_t error =
        cudaMemsetAsync(w.index.masks_WS, 0, size_t(words) * args.num_keys * 4, stream);
    if (error == cudaSuccess) error = cudaMemsetAsync(w.index.cursor, 0, 4, stream);
    if (error != cudaSuccess) return error;
    MarkSelectedKernel<<<rows, 256, 0, stream>>>(
        w.index, args.ids_TK + size_t(first) * args.num_selected, rows, args.num_selected);
    RankSelectedKernel<<<(args.num_keys + 127) / 128, 128, 0, stream>>>(w.index, words);
    params.first_token = first;
    error = LaunchMain<ScatterOrder::kFixed>(params, rows, stream);
    if (error != cudaSuccess) return error;
    constexpr int kSplit = 4;
    SumSortedRowsKernel<kC, kSplit><<<std::min(args.num_keys, 8192), kC / 8 * kSplit, 0, stream>>>(
        w.index, static_cast<const uint4*>(w.rows), params.rows_per_place, args.dkv_SC);
  }
  return cudaGetLastError();
}

}  // namespace

size_t SparseAttentionBackwardWorkspace(const SparseAttentionBackwardArgs& args, ScatterOrder order,
                                        int chunk) {
  return Divide(args, order, chunk, nullptr).bytes;
}

int SparseAttentionBackwardChunk(const SparseAttentionBackwardArgs& args, int num_multiprocessors,
                                 size_t budget_bytes) {
  const int tiles = NumTiles(args);
  const int wave = std::max(1, num_multiprocessors / tiles);
  const size_t wave_bytes = size_t(wave) * RowsPerPlace(args) * args.num_selected * kRowBytes;
  const size_t waves = std::max<size_t>(1, budget_bytes / wave_bytes);
  return int(std::min<size_t>(waves * wave, std::max(1, args.num_tokens)));
}

cudaError_t LaunchSparseAttentionBackward(const SparseAttentionBackwardArgs& args,
                                          ScatterOrder order, int chunk, void* workspace,
                                          cudaStream_t stream) {
  const Workspace w = Divide(args, order, chunk, workspace);
  Params params = {};
  params.args = args;
  params.index = w.index;
  params.rows = w.rows;
  params.num_tiles = NumTiles(args);
  params.rows_per_place = RowsPerPlace(args);
  if (args.num_tokens == 0) return cudaSuccess;

  cudaError_t error = cudaSuccess;
  if (params.num_tiles > 1) {  // each tile adds its heads' part of the target
    error =
        cudaMemsetAsync(args.target_TK, 0, size_t(args.num_tokens) * args.num_selected * 4, stream);
    if (error != cudaSuccess) return error;
  }
  if (order == ScatterOrder::kFixed) return LaunchFixedOrder(params, w, chunk, stream);

  error = cudaMemsetAsync(w.rows, 0, w.rows_bytes, stream);
  if (error == cudaSuccess) {
    error = LaunchMain<ScatterOrder::kArrival>(params, args.num_tokens, stream);
  }
  if (error != cudaSuccess) return error;
  const size_t pieces = size_t(args.num_keys) * kC / 4;
  AddPermutedKernel<kC><<<unsigned((pieces + 255) / 256), 256, 0, stream>>>(
      static_cast<const float4*>(w.rows), args.dkv_SC, pieces);
  return cudaGetLastError();
}

}  // namespace baleen
