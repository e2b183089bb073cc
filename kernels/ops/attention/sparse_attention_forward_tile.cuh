// Sparse attention forward, part 1: what the warpgroups share, and the work of a thread block. See
// sparse_attention_forward_cuda.cu for the whole.
#pragma once

#include <cmath>

#include "kernels/cuda/warp.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/ops/attention/sparse_attention_forward_cuda.h"
#include "kernels/ops/attention/sparse_attention_packs_cuda.h"
#include "kernels/ops/attention/sparse_attention_tiles_cuda.cuh"

namespace baleen::sparse_forward {

using namespace cuda;  // NOLINT: the device wrappers

constexpr int kThreads = 384;
constexpr int kHalf = kV / 2;  // columns of o a warpgroup keeps
constexpr float kLn2 = 0.6931471805599453f;

// Pieces of K move in five groups, in the order they come free: quarters of V, left half (warpgroup
// 0) and right half (warpgroup 1) in turn, and the rope piece, whose place P takes once the scores
// are made.
constexpr int kGroups = 5;
constexpr int kRopeGroup = 4, kRopePiece = 8;
__device__ constexpr int GroupBegin(int group) {
  constexpr int kBegin[kGroups] = {0, 4, 2, 6, kRopePiece};
  return kBegin[group];
}
__device__ constexpr int GroupEnd(int group) {
  return GroupBegin(group) + (group == kRopeGroup ? 1 : 2);
}

constexpr int kStageBytes = 1024;  // of o a warp: 16 rows of 32 columns

struct __align__(1024) Shared {
  uint8_t q[kPiecesC * kPieceBytes];
  uint8_t k[2][kPiecesC * kPieceBytes];
  uint8_t stage[8][kStageBytes];
  float largest[kHeadTile];    // running maximum of the last published block, times log2 e
  float sum[2][2][kHeadTile];  // of exponentials, by parity of the turn and warpgroup
  uint32_t valid[2][kMostPackedQueries][2];  // which keys of the block a query of the pack selected
  int num_blocks;                            // of the turn whose q is here
  uint64_t q_full, q_empty;
  uint64_t k_full[2][kGroups], k_empty[2][kGroups], valid_full[2];
  uint64_t published[2];  // by owner: P and the maximum of its block are there
};
static_assert(sizeof(Shared) <= 227 * 1024, "one block a multiprocessor");

// A thread block takes turn blockIdx.x, then gridDim.x further on, and so on: a whole work, or a
// part of one of the last.
struct Turn {
  int work, part, num_parts;
  int slot;  // of the part in args.parts, -1 = a whole work
};
using Plan = SparseAttentionForwardPlan;
__device__ __forceinline__ Turn TurnOf(const Plan& plan, int turn) {
  if (turn < plan.whole) return {turn, 0, 1, -1};
  const int slot = turn - plan.whole;
  return {plan.whole + slot % plan.divided, slot / plan.divided, plan.parts, slot};
}

// Where parts leave o, in the order in which the threads of both warpgroups hold it, and lse (in
// the base 2).
constexpr int kPartVectors = 32;  // of 4 elements, of each thread
__device__ __forceinline__ float4* PartO(const SparseAttentionForwardArgs& args, int slot) {
  return reinterpret_cast<float4*>(args.parts) + size_t(slot) * (kPartVectors * 256);
}
__device__ __forceinline__ float* PartsLse(const SparseAttentionForwardArgs& args,
                                           const Plan& plan) {
  return args.parts + size_t(plan.divided) * plan.parts * (kHeadTile * kV);
}

// A work: some rows of q (a tile of a query's heads, or all heads of a pack of queries) with one
// list of keys.
struct Rows {
  size_t first;  // of q, o and lse, counted in heads
  int count;     // at most 64
};
template <bool kPacked>
__device__ __forceinline__ Rows RowsOf(const SparseAttentionForwardArgs& args, int work) {
  const int heads = args.num_heads;
  if constexpr (kPacked) {
    const int queries = args.queries_a_pack, first = work * queries;
    return {size_t(first) * heads, min(queries, args.num_tokens - first) * heads};
  } else {
    const int num_tiles = (heads + kHeadTile - 1) / kHeadTile;
    const int head = work % num_tiles * kHeadTile;
    return {size_t(work / num_tiles) * heads + head, min(kHeadTile, heads - head)};
  }
}
template <bool kPacked>
__device__ __forceinline__ const int32_t* ListOf(const SparseAttentionForwardArgs& args, int work) {
  const int num_tiles = kPacked ? 1 : (args.num_heads + kHeadTile - 1) / kHeadTile;
  return args.ids_TK + size_t(work / num_tiles) * args.num_selected;
}
// How many blocks of keys the work has: asked for early, counted later.
template <bool kPacked>
__device__ __forceinline__ int32_t AskForBlocks(const SparseAttentionForwardArgs& args, int work) {
  if constexpr (kPacked) return __ldg(args.counts_I + work);
  return FirstIdOfLanesBlock(ListOf<kPacked>(args, work), args.num_selected);
}
template <bool kPacked>
__device__ __forceinline__ int CountAskedBlocks(int32_t answer) {
  return kPacked ? (answer + kBlock - 1) / kBlock : CountBlocks(answer);
}

// The key of a list's entry, -1 = none; and whether a query of the pack selected it.
template <bool kPacked>
__device__ __forceinline__ int32_t KeyOf(int32_t entry) {
  if constexpr (!kPacked) return entry;
  return uint32_t(entry) > kPackedKeyMask ? int32_t(uint32_t(entry) & kPackedKeyMask) : -1;
}
template <bool kPacked>
__device__ __forceinline__ bool Selected(int32_t entry, int query) {
  return kPacked ? entry >> (kPackedKeyBits + query) & 1 : entry >= 0;
}

}  // namespace baleen::sparse_forward
