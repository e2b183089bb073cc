// Backward of sparse MQA attention on Hopper, with the KL target as a by-product.
//
// A thread block takes one query and one tile of 64 heads and walks over the query's keys in blocks
// of 64. A block costs, in steps of m64 x n64 x k16: S 36, dP 32, dq 36, dkv 68 = 5504 cycles.
//
//   warpgroup 0  S = q K^T, P = exp(scale S - lse), dP = do V^T, dS = scale P (dP - delta), both
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
// Each (query, key) row of dkv is stored as bf16 at its place in a buffer sorted by key; thread
// blocks of the same launch, started between those of later queries, add the rows of a key in the
// order of the queries (sparse_attention_backward_schedule_cuda.h). So the bits are reproducible,
// and the sum's memory traffic runs beside the arithmetic.
//
// Of 16 or 32 heads, four or two neighbouring queries may go together as one of 64 rows, over the
// union of their lists (sparse_attention_packs_cuda.h): a bit a query and key says whose P counts,
// and a key's row of dkv is stored once for all of them.
//
// Roofline per query of 128 heads and 2048 keys, H100: 1.44 GFLOP, 1.82 us at 794 TF; rows 2.36 MB
// written and read again, 1.57 us at the 3 TB/s of a copy, both at once. For 64 heads the traffic
// is the same for half the arithmetic: at most 459 TF. fp32 reductions, 4.7 MB, would take 1.45 us
// inside L2 and 2.9 us and more beyond it.
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/ops/attention/sparse_attention_backward_cuda.h"
#include "kernels/ops/attention/sparse_attention_backward_keys.cuh"
#include "kernels/ops/attention/sparse_attention_backward_packs.cuh"

namespace baleen {
namespace {

using namespace sparse_backward;  // NOLINT: the other parts of this kernel

// --- Warpgroup 2: gathers K, finds the places of the dkv rows, dq columns 448-575. ---

template <bool kPair, bool kPacked>
__device__ __forceinline__ void RunLoader(const Params& params, Shared& s, int t, int tile,
                                          int num_blocks) {
  const int thread = ThreadInRole(), lane = thread % 32;
  const SparseAttentionBackwardArgs& args = params.args;
  const int32_t* ids = args.ids_TK + size_t(t) * args.num_selected;
  const int query = t - params.first_token;
  const int chunk = ChunkOf<kPacked>(params, t), buffer = BufferOf<kPacked>(params, chunk);
  const uint64_t k_columns = DescriptorMnMajor(SharedAddress(s.k) + 7 * kPieceBytes, kPieceBytes);
  const uint64_t ds_heads = DescriptorKMajor(SharedAddress(s.ds));
  // Eight threads a row of 128 bytes, sixteen rows at a time.
  const int first_row = thread / 8, part = thread % 8;
  const uint8_t* kv = static_cast<const uint8_t*>(args.kv_SC) + part * 16;
  const uint32_t to = SharedAddress(s.k) + SwizzledOffset(first_row, part);

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
    const int32_t entry = next_id;
    const int32_t id = !kPacked                            ? entry
                       : uint32_t(entry) <= kPackedKeyMask ? -1
                                                           : entry & int32_t(kPackedKeyMask);
    if (i > 0) multiply_dq(i - 1);
    if (thread < kBlock) {
      s.ids[thread] = id;
      if constexpr (!kPacked) {
        const uint32_t valid = __ballot_sync(~0u, id >= 0);
        if (lane == 0) {
          s.valid[parity][0][thread / 32] = valid;
          BarrierArrive(&s.valid_full);
        }
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
      if constexpr (kPacked) {  // behind the copies, which take longer
#pragma unroll
        for (int x = 0; x < kMostPackedQueries; ++x) {
          const uint32_t valid = __ballot_sync(~0u, entry >> (kPackedKeyBits + x) & 1);
          if (lane == 0) s.valid[parity][x][thread / 32] = valid;
        }
        if (lane == 0) BarrierArrive(&s.valid_full);
      }
      s.row[parity][thread] = id < 0 ? -1 : buffer + ScatterPlace(params.index, chunk, query, id);
      __syncwarp();
      if (lane == 0) BarrierArrive(&s.row_full);
    }
  }
  multiply_dq(num_blocks - 1);
  StoreDq(params, RowsOf<kPacked>(params, t, tile), 448, dq);
}

// One thread block's share of the keys of an earlier chunk: adds up their sorted rows.
template <bool kShort, bool kPacked>
__device__ __forceinline__ void RunSum(const Params& params, uint8_t* shared_bytes, int sum,
                                       int tile) {
  using Stage = SumStage<kShort>;
  static_assert(sizeof(Stage) * kThreads / 32 <= sizeof(Shared), "");
  const SparseBackwardSchedule schedule = ScheduleOf<kPacked>(params);
  const int chunk = sum / schedule.SumsAChunk();
  const int blocks = schedule.SumsAChunk() * params.num_tiles;
  const int block = sum % schedule.SumsAChunk() * params.num_tiles + tile;
  const int warp = __shfl_sync(~0u, threadIdx.x / 32, 0);
  Stage& stage = reinterpret_cast<Stage*>(shared_bytes)[warp];
  if (threadIdx.x % 32 == 0) {
    BarrierInit(&stage.full[0], 1);
    BarrierInit(&stage.full[1], 1);
    FenceBarrierInit();
  }
  if (threadIdx.x == 0) {
    AwaitCount(&params.index.written_C[chunk], schedule.QueriesOfChunk(chunk) * params.num_tiles);
    AwaitCount(&params.index.turns_B[block], chunk);  // the same keys of the chunk before
  }
  __syncthreads();
  FenceProxyAsyncAll();  // the copy engine reads what other blocks' threads stored
  SumSortedRows<kShort>(
      params.index, chunk,
      params.rows + size_t(BufferOf<kPacked>(params, chunk)) * kScatterRowBytes<kShort>,
      block + warp * blocks, blocks * (kThreads / 32), params.args.dkv_SC, stage);
  __syncthreads();
  if (threadIdx.x == 0) {
    Announce(&params.index.turns_B[block]);
    Announce(&params.index.summed_C[chunk]);
  }
}

template <bool kPair, bool kPacked>
__global__ void __launch_bounds__(kThreads, 1)
    SparseAttentionBackwardKernel(const __grid_constant__ Params params) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared& s = *reinterpret_cast<Shared*>(shared_bytes);
  const SparseAttentionBackwardArgs& args = params.args;
  if (NotChosen<kPacked>(params.choice)) return;
  const SparseBackwardSchedule schedule = ScheduleOf<kPacked>(params);
  // The grid is for any chunk of packs.
  if (kPacked && blockIdx.x >= schedule.NumItems()) return;
  const SparseBackwardItem item = schedule.Item(blockIdx.x / params.num_tiles);
  const int tile = blockIdx.x % params.num_tiles;
  if (item.is_sum) {
    RunSum<!kPair, kPacked>(params, shared_bytes, item.index, tile);
    return;
  }
  const int t = params.first_token + item.index;
  const int thread = threadIdx.x;

  const int32_t first_id =
      kPacked ? __ldg(params.packs.counts_I + t)
              : FirstIdOfLanesBlock(args.ids_TK + size_t(t) * args.num_selected, args.num_selected);
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
  const Rows rows = RowsOf<kPacked>(params, t, tile);
  if (thread < 256) StartQueries(params, s, rows);
  const int num_blocks = kPacked ? (first_id + kBlock - 1) / kBlock : CountBlocks(first_id);

  if (num_blocks == 0) {
    CopyAsyncWait<0>();
    uint32_t* dq =
        reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(args.dq_THC) + rows.first * kRowBytes);
    for (int x = thread; x < rows.count * kC / 2; x += kThreads) dq[x] = 0;
    if constexpr (kPacked) {
      if (thread < 128) PackedTarget().Finish(params, t, thread);
    } else if (params.num_tiles == 1) {
      for (int x = thread; x < args.num_selected; x += kThreads) {
        args.target_TK[size_t(t) * args.num_selected + x] = 0;
      }
    }
    if (thread == 0) AnnounceRows<kPacked>(params, t);
    return;
  }

  const int warpgroup = thread / 128;
  if (warpgroup == 0) {
    RaiseRegisters<208>();
    AwaitQueries();
    RunScores<kPacked>(params, s, t, tile, num_blocks);
  } else if (warpgroup == 1) {
    RaiseRegisters<200>();
    RunKeyGradients<kPair, kPacked>(params, s, t, tile, num_blocks);
  } else {
    LowerRegisters<96>();
    RunLoader<kPair, kPacked>(params, s, t, tile, num_blocks);
  }
  // A block's shared memory must outlive its peer's last arrivals.
  if constexpr (kPair) {
    __syncwarp();
    ClusterSync();
  }
}

// --- Host ---

constexpr char kName[] = "sparse attention backward";

// The parts of the workspace.
struct Workspace {
  ScatterIndex index;
  uint8_t* rows;
  size_t counter_bytes;
};
Workspace Divide(const SparseAttentionBackwardLayout& layout, int chunks, int words_a_chunk,
                 int num_keys, void* base) {
  const auto ints = [&](size_t offset) {
    return reinterpret_cast<int32_t*>(static_cast<uint8_t*>(base) + offset);
  };
  Workspace w = {};
  w.counter_bytes = layout.counter_bytes;
  w.index.masks_WS = reinterpret_cast<uint32_t*>(ints(layout.masks_WS));
  w.index.ranks_WS = ints(layout.ranks_WS);
  w.index.starts_CS = ints(layout.starts_CS);
  w.index.counts_CS = ints(layout.counts_CS);
  w.index.cursor_C = ints(layout.counters_C);
  w.index.written_C = w.index.cursor_C + chunks;
  w.index.summed_C = w.index.written_C + chunks;
  w.index.turns_B = w.index.summed_C + chunks;
  w.index.num_keys = num_keys;
  w.index.words_a_chunk = words_a_chunk;
  w.rows = static_cast<uint8_t*>(base) + layout.rows;
  return w;
}

SparseBackwardSchedule ScheduleOfQueries(const SparseAttentionBackwardPlan& plan, int num_queries,
                                         int num_tiles) {
  // A wave of blocks and some; a sum of eight queries takes about as long as a query.
  const int lag = std::min(160 / num_tiles, plan.chunk);
  return {num_queries, plan.chunk, kFewestQueriesASum * num_tiles, lag};
}

template <bool kPair, bool kPacked>
cudaError_t LaunchKernel(const Params& params, int num_items, cudaStream_t stream) {
  auto* kernel = SparseAttentionBackwardKernel<kPair, kPacked>;
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared)));
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster = {};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kPair ? 2 : 1;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(num_items * params.num_tiles);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = sizeof(Shared);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// The index of the rows of a launch's lists; with counts they are unions of packs.
cudaError_t IndexRows(const Params& params, const int32_t* counts_T, size_t counter_bytes,
                      int chunks, cudaStream_t stream) {
  const ScatterIndex& index = params.index;
  const int lists = params.schedule.num_queries, words = (lists + 31) / 32;
  const int width = params.args.num_selected, keys = KeysAMarkBlock(index.num_keys, words);
  const int most = (kMarkMostKeys + 1024) * 4;
  cudaError_t error =
      cudaFuncSetAttribute(MarkSelectedKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) error = cudaMemsetAsync(index.cursor_C, 0, counter_bytes, stream);
  if (error != cudaSuccess) return error;
  MarkSelectedKernel<<<dim3(words, std::max(1, (index.num_keys + keys - 1) / keys)), kMarkThreads,
                       keys * 4, stream>>>(
      index, params.args.ids_TK + size_t(params.first_token) * width,
      counts_T == nullptr ? nullptr : counts_T + params.first_token, kPackedKeyMask, lists, width,
      keys, params.choice);
  RankSelectedKernel<<<dim3(std::max(1, (index.num_keys + 127) / 128), chunks), 128, 0, stream>>>(
      index, words, params.choice);
  return cudaGetLastError();
}

// The queries from `first` on, at most a span of them.
cudaError_t LaunchSpan(const SparseAttentionBackwardArgs& args,
                       const SparseAttentionBackwardPlan& plan, const Workspace& w, int first,
                       const int32_t* choice, cudaStream_t stream) {
  Params params = {};
  params.args = args;
  params.choice = choice;
  params.index = w.index;
  params.rows = w.rows;
  params.first_token = first;
  params.num_tiles = SparseAttentionHeadTiles(args);
  const int queries = std::min(plan.span, args.num_tokens - first);
  params.schedule = ScheduleOfQueries(plan, queries, params.num_tiles);

  const cudaError_t error =
      IndexRows(params, nullptr, w.counter_bytes, params.schedule.NumChunks(), stream);
  if (error != cudaSuccess) return error;
  const int items = params.schedule.NumItems();
  return params.num_tiles == 2 ? LaunchKernel<true, false>(params, items, stream)
                               : LaunchKernel<false, false>(params, items, stream);
}

// The packs from `first` on, at most a span of them. `args` are theirs.
cudaError_t LaunchSpanOfPacks(const SparseAttentionBackwardArgs& args, const Packs& packs,
                              const Workspace& w, int first, cudaStream_t stream) {
  const SparseAttentionBackwardPacksPlan& plan = args.packs;
  Params params = {};
  params.args = args;
  params.packs = packs;
  params.choice = args.choice;
  params.index = w.index;
  params.rows = w.rows;
  params.first_token = first;
  params.num_tiles = 1;
  const int count = std::min(plan.span, args.num_tokens - first);
  int items = 0, chunks = 0;
  for (const int chunk : plan.chunks) {  // the device sets the one that it has chosen
    params.schedule = {count, chunk, plan.packs_a_sum, plan.lag};
    items = std::max(items, params.schedule.NumItems());
    chunks = std::max(chunks, params.schedule.NumChunks());
  }

  const cudaError_t error = IndexRows(params, packs.counts_I, w.counter_bytes, chunks, stream);
  if (error != cudaSuccess) return error;
  return LaunchKernel<false, true>(params, items, stream);
}

// All of it with packs, if the device chooses them.
void LaunchPacks(const SparseAttentionBackwardArgs& single, void* workspace, cudaStream_t stream) {
  const SparseAttentionBackwardPacksPlan& plan = single.packs;
  SparseAttentionBackwardArgs args = single;
  static_cast<SparseAttentionBackwardShape&>(args) = plan.shape;
  args.ids_TK = single.entries_IU;
  const int64_t single_blocks =
      int64_t(single.num_tokens) * ((single.num_selected + kBlock - 1) / kBlock);
  ChoosePacksKernel<<<1, kChoosingThreads, 0, stream>>>(plan, single.counts_I, single_blocks,
                                                        single.choice);
  const Packs packs = {single.counts_I, single.num_tokens * single.num_heads, single.num_tokens,
                       plan.queries, single.num_selected};
  const Workspace w = Divide(LayOutSparseAttentionBackward(plan), plan.span / plan.SmallestChunk(),
                             0, args.num_keys, workspace);
  for (int first = 0; first < args.num_tokens; first += plan.span) {
    CheckCuda(LaunchSpanOfPacks(args, packs, w, first, stream), kName);
  }
  RestoreListOrderKernel<<<single.num_tokens, 256, single.num_selected * 8, stream>>>(
      single.ids_TK, single.target_TK, single.num_selected, single.choice);
}

}  // namespace

void LaunchSparseAttentionBackward(const SparseAttentionBackwardArgs& args,
                                   const SparseAttentionBackwardPlan& plan, void* workspace,
                                   void* stream) {
  if (args.num_tokens == 0) return;
  const bool may_pack = args.packs.queries > 1;
  if (may_pack) LaunchPacks(args, workspace, AsStream(stream));
  const Workspace w = Divide(LayOutSparseAttentionBackward(args, plan), plan.span / plan.chunk,
                             plan.chunk / 32, args.num_keys, workspace);
  if (SparseAttentionHeadTiles(args) > 1) {  // each tile adds its heads' part of the target
    const size_t bytes = size_t(args.num_tokens) * args.num_selected * 4;
    CheckCuda(cudaMemsetAsync(args.target_TK, 0, bytes, AsStream(stream)), kName);
  }
  for (int first = 0; first < args.num_tokens; first += plan.span) {
    CheckCuda(LaunchSpan(args, plan, w, first, may_pack ? args.choice : nullptr, AsStream(stream)),
              kName);
  }
  CheckLaunch(kName);
}

}  // namespace baleen
