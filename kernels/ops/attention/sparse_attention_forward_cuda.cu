// Forward of sparse MQA attention on Hopper.
//
// A thread block takes one query and one tile of 64 heads (or a pack of queries with fewer heads,
// sparse_attention_packs_cuda.h) and walks over their keys in blocks of 64. K is loaded once for
// both uses (V = its first 512 columns) into one of two buffers.
//
//   warpgroups 0, 1  block b belongs to warpgroup b % 2, which makes S = q K^T, the new running
//                    maximum and P. Both keep half of o's columns (64 x 256, 128 registers) and
//                    multiply every P with their half of V: their own from registers, the other's
//                    from shared memory. One takes exponentials while the other multiplies.
//   warpgroup 2      gathers K with cp.async, group by group as its pieces come free; q comes by
//                    the copy engine (a cp.async that misses L2 holds up the gather behind it)
//
// Warpgroup 0 multiplies the other's block before its own next scores, warpgroup 1 after them and
// their exponentials. So the scores of two blocks need nothing from each other, and the chain from
// one block's P to the next one's is paid once in two blocks.
//
// The running maximum is handed over with P, so both halves of o have the same reference and the
// order of the blocks is fixed: the result is bitwise reproducible. P lies where the block's rope
// piece was, which only the scores read.
//
// One thread block a multiprocessor goes from query to query: the next one's q comes behind the
// last scores, its first keys behind the last products. Those of the last, incomplete turn are
// divided by blocks of keys (sparse_attention_forward_plan_cuda.h).
//
// Roofline per query and tile, 2048 keys: tensor 0.285 GFLOP, 32 x 2176 cycles; gather 2.36 MB, at
// 640 TF 5.3 TB/s of L2 reads against a measured ceiling of 8 (random ids, up to 32K keys). Shared
// memory traffic is at the limit of the tensor time for S (n = 64: both operands read from it).
#include <algorithm>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/tensor_map.cuh"
#include "kernels/ops/attention/sparse_attention_forward_consumer.cuh"
#include "kernels/ops/attention/sparse_attention_forward_parts.cuh"

namespace baleen {
namespace {

using namespace sparse_forward;  // NOLINT: the other parts of this kernel

// The producer: brings q of each turn, and gathers its blocks of keys into the two buffers.
template <bool kPacked>
__device__ __forceinline__ void RunLoader(const SparseAttentionForwardArgs& args, const Plan& plan,
                                          const CUtensorMap& q_map, Shared& s) {
  const int thread = ThreadInRole(), lane = thread % 32;
  const int first_row = thread / 8, chunk = thread % 8;
  const uint8_t* kv = static_cast<const uint8_t*>(args.kv_SC) + chunk * 16;
  const uint32_t to = SharedAddress(s.k[0]) + SwizzledOffset(first_row, chunk);

  // The list's entries a block ahead of the gather, also from one turn to the next.
  int32_t next[4], own = -1;
  auto load_entries = [&](const int32_t* entries) {
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) next[pass] = __ldg(entries + pass * 16 + first_row);
    if (thread < kBlock) own = __ldg(entries + thread);
  };
  int next_turn = blockIdx.x;
  Turn turn = TurnOf(plan, next_turn);
  const int32_t* list = ListOf<kPacked>(args, turn.work) + turn.part * kBlock;
  int32_t asked = AskForBlocks<kPacked>(args, turn.work);
  load_entries(list);
  uint32_t even_uses = 0, odd_uses = 0;  // of the two buffers, by the turns before this one

  for (uint32_t parity = 0; next_turn < plan.turns; parity ^= 1) {
    // A part's blocks are every num_parts-th.
    const int num_blocks =
        (CountAskedBlocks<kPacked>(asked) - turn.part + turn.num_parts - 1) / turn.num_parts;
    const int step = turn.num_parts * kBlock;
    const int first_head = int(RowsOf<kPacked>(args, turn.work).first);
    const bool first = next_turn == int(blockIdx.x);
    next_turn += gridDim.x;
    turn = TurnOf(plan, min(next_turn, plan.turns - 1));
    const int32_t* next_list = ListOf<kPacked>(args, turn.work) + turn.part * kBlock;
    asked = AskForBlocks<kPacked>(args, turn.work);

    if (!first) BarrierWait(&s.q_empty, parity ^ 1);
    if (thread == 0) {
      s.num_blocks = num_blocks;
      if (num_blocks == 0) {
        BarrierArrive(&s.q_full);
      } else {
        // Rows beyond rows.count are those of the next queries: their results are not stored.
        BarrierArriveExpect(&s.q_full, kPiecesC * kPieceBytes);
#pragma unroll
        for (int piece = 0; piece < kPiecesC; ++piece) {
          TensorLoad(SharedAddress(s.q) + piece * kPieceBytes, &q_map, piece * 64, first_head,
                     &s.q_full);
        }
      }
    }
    __syncwarp();
    for (int b = 0; b < num_blocks; ++b) {
      const uint32_t buffer = b & 1, use = (buffer ? odd_uses : even_uses) + (b >> 1);
      const int from[4] = {KeyOf<kPacked>(next[0]), KeyOf<kPacked>(next[1]),
                           KeyOf<kPacked>(next[2]), KeyOf<kPacked>(next[3])};
      const int32_t entry = own;
      load_entries(b + 1 < num_blocks ? list + (b + 1) * step : next_list);
#pragma unroll
      for (int group = 0; group < kGroups; ++group) {
        if (use > 0) BarrierWait(&s.k_empty[buffer][group], (use - 1) & 1);
        if (group == 0 && thread < kBlock) {
#pragma unroll
          for (int query = 0; query < (kPacked ? kMostPackedQueries : 1); ++query) {
            const uint32_t valid = __ballot_sync(~0u, Selected<kPacked>(entry, query));
            if (lane == 0) s.valid[buffer][query][thread / 32] = valid;
          }
          if (lane == 0) BarrierArrive(&s.valid_full[buffer]);
        }
        GatherPieces(to + buffer * (kPiecesC * kPieceBytes), kv, from, GroupBegin(group),
                     GroupEnd(group));
        CopyAsyncArrive(&s.k_full[buffer][group]);
      }
    }
    even_uses += (num_blocks + 1) / 2;
    odd_uses += num_blocks / 2;
    if (num_blocks == 0) load_entries(next_list);
    list = next_list;
  }
}

template <bool kPacked>
__global__ void __launch_bounds__(kThreads, 1)
    SparseAttentionForwardKernel(const __grid_constant__ SparseAttentionForwardArgs args,
                                 const __grid_constant__ Plan plan,
                                 const __grid_constant__ CUtensorMap q_map) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared& s = *reinterpret_cast<Shared*>(shared_bytes);
  if (threadIdx.x == 0) {
    BarrierInit(&s.q_full, 1);
    BarrierInit(&s.q_empty, 8);
    for (int buffer = 0; buffer < 2; ++buffer) {
      for (int group = 0; group < kGroups; ++group) {
        BarrierInit(&s.k_full[buffer][group], 128);
        BarrierInit(&s.k_empty[buffer][group], 4);
      }
      BarrierInit(&s.valid_full[buffer], 2);
      BarrierInit(&s.published[buffer], 4);
    }
    FenceBarrierInit();
  }
  __syncthreads();

  const int warpgroup = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (warpgroup == 0) {
    RaiseRegisters<216>();
    RunConsumer<0, kPacked>(args, plan, s);
  } else if (warpgroup == 1) {
    RaiseRegisters<216>();
    RunConsumer<1, kPacked>(args, plan, s);
  } else {
    LowerRegisters<72>();
    RunLoader<kPacked>(args, plan, q_map, s);
  }
}

template <bool kPacked>
void Launch(const SparseAttentionForwardArgs& args, void* stream) {
  const int num_work =
      SparseAttentionForwardWorks(args.num_tokens, args.num_heads, args.queries_a_pack);
  const Plan plan = args.parts == nullptr ? Plan{num_work, 0, 1, num_work}
                                          : PlanSparseAttentionForward(num_work, args.num_selected);
  auto* kernel = SparseAttentionForwardKernel<kPacked>;
  CheckCuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 int(sizeof(Shared))),
            "shared memory of sparse attention");
  CUtensorMap q_map;
  CheckCuda(MakeTensorMap(&q_map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, args.q_THC,
                          int64_t{args.num_tokens} * args.num_heads, kRowBytes, kHeadTile),
            "map of q");
  const int grid = std::min(plan.turns, NumMultiprocessors());
  kernel<<<grid, kThreads, sizeof(Shared), AsStream(stream)>>>(args, plan, q_map);
  CheckLaunch("sparse attention");
  if (plan.divided == 0) return;
  AddPartsKernel<kPacked><<<dim3(plan.divided, kAddBlocks), 256, 0, AsStream(stream)>>>(args, plan);
  CheckLaunch("sparse attention, parts");
}

}  // namespace

void LaunchSparseAttentionForward(const SparseAttentionForwardArgs& args, void* stream) {
  if (args.num_tokens == 0) return;
  if (args.queries_a_pack > 1) {
    Launch<true>(args, stream);
  } else {
    Launch<false>(args, stream);
  }
}

}  // namespace baleen
