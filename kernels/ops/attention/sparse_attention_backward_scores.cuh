// Sparse attention backward, part 1: what all warpgroups share, and warpgroup 0, which makes the
// scores. See sparse_attention_backward_cuda.cu for the whole.
#pragma once

#include <cmath>

#include "kernels/cuda/warp.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/ops/attention/sparse_attention_backward_cuda.h"
#include "kernels/ops/attention/sparse_attention_backward_schedule_cuda.h"
#include "kernels/ops/attention/sparse_attention_packs_cuda.h"
#include "kernels/ops/attention/sparse_attention_tiles_cuda.cuh"
#include "kernels/ops/attention/sparse_scatter_cuda.cuh"

namespace baleen::sparse_backward {

using namespace cuda;  // NOLINT: the device wrappers

constexpr int kChunk = 32;  // columns of dkv between two sends
constexpr int kThreads = 384;

// The blocks of a pair (cluster of two, one for each head tile of a query) send each other partial
// chunks of dkv through a ring of slots in the memory of P and dS.
constexpr int kSlots = 4;
constexpr int kSlotBytes = kBlock * kChunk * 2;

// Pieces of K move in four groups, in this order. dq's columns follow the same split: the last to
// read a group is the loader itself, then scores, key gradients, scores.
constexpr int kGroups = 4;
__device__ constexpr int GroupBegin(int group) {
  constexpr int kBegin[kGroups] = {7, 0, 4, 2};
  return kBegin[group];
}
__device__ constexpr int GroupEnd(int group) { return GroupBegin(group) + (group == 2 ? 3 : 2); }

// Shared memory, 1024-byte aligned.
struct __align__(1024) Shared {
  uint8_t q[kPiecesC * kPieceBytes];
  uint8_t d_o[kPiecesV * kPieceBytes];
  uint8_t k[kPiecesC * kPieceBytes];
  uint8_t p[kPieceBytes];
  uint8_t ds[kPieceBytes];
  float target_part[2][4][kBlock];  // [1][0] holds delta until the first block is through
  int32_t ids[kBlock];
  int32_t row[2][kBlock];  // where the dkv row of each key of the block goes, -1 = nowhere
  uint32_t valid[2][kMostPackedQueries][2];  // which keys of the block a query of the pack selected
  uint64_t k_full[kGroups], k_empty[kGroups];  // k_empty[0] unused: the loader's own
  uint64_t pds_full, pds_empty, valid_full, row_full;
  uint64_t stage_open, received[kSlots], credit[kSlots];  // of a pair, see the key gradients
};
static_assert(sizeof(Shared) <= 227 * 1024, "one block a multiprocessor");

// What the device chose (SparseAttentionBackwardChoiceInts); a kernel for the other of packs and
// single queries does nothing.
enum Choice { kChosenChunk, kSlotRows, kNumSlots, kGroupRows };
template <bool kPacked>
__device__ __forceinline__ bool NotChosen(const int32_t* choice) {
  return choice != nullptr && (__ldg(choice + kChosenChunk) != 0) != kPacked;
}

// Packs of queries (sparse_attention_packs_cuda.h) look like queries of 64 heads; these are the
// single ones.
struct Packs {
  const int32_t* counts_I;
  int num_rows;  // of q: all queries' heads
  int num_queries, queries_a_pack, num_selected;
};

struct Params {
  SparseAttentionBackwardArgs args;  // of packs: T packs of H = 64 and their unions
  Packs packs;
  const int32_t* choice;  // null: there was none
  ScatterIndex index;
  SparseBackwardSchedule schedule;
  uint8_t* rows;    // bf16 rows of dkv sorted by key, SparseBackwardSchedule::kRing buffers
  int first_token;  // of the launch; its queries are counted from here
  int num_tiles;    // of 64 heads: 1, or 2 that add their rows
};
template <bool kPacked>
__device__ __forceinline__ SparseBackwardSchedule ScheduleOf(const Params& params) {
  SparseBackwardSchedule schedule = params.schedule;
  if constexpr (kPacked) schedule.chunk = __ldg(params.choice + kChosenChunk);
  return schedule;
}
template <bool kPacked>
__device__ __forceinline__ int ChunkOf(const Params& params, int t) {
  return (t - params.first_token) / ScheduleOf<kPacked>(params).chunk;
}
// Where the rows of a chunk begin, and the chunk whose rows lay there before.
template <bool kPacked>
__device__ __forceinline__ int BufferOf(const Params& params, int chunk) {
  if constexpr (kPacked) {
    return chunk % __ldg(params.choice + kNumSlots) * __ldg(params.choice + kSlotRows);
  }
  return chunk % SparseBackwardSchedule::kRing * params.schedule.chunk * params.args.num_selected;
}
template <bool kPacked>
__device__ __forceinline__ int ChunkBefore(const Params& params, int chunk) {
  return chunk - (kPacked ? __ldg(params.choice + kNumSlots) : SparseBackwardSchedule::kRing);
}

// The rows of q, do, o, dq and lse that a thread block has, counted in heads.
struct Rows {
  size_t first;
  int count;  // at most 64
};
template <bool kPacked>
__device__ __forceinline__ Rows RowsOf(const Params& params, int t, int tile) {
  const int heads = params.args.num_heads;
  if constexpr (kPacked) {  // the last pack may have fewer queries
    return {size_t(t) * kHeadTile, min(kHeadTile, params.packs.num_rows - t * kHeadTile)};
  }
  return {size_t(t) * heads + tile * kHeadTile, min(kHeadTile, heads - tile * kHeadTile)};
}

// Warpgroups 0 and 1 start bringing the tile's rows of q and do...
__device__ __forceinline__ void StartQueries(const Params& params, Shared& s, const Rows& rows) {
  const SparseAttentionBackwardArgs& args = params.args;
  LoadTile<kPiecesC>(SharedAddress(s.q),
                     static_cast<const uint8_t*>(args.q_THC) + rows.first * kRowBytes, rows.count,
                     threadIdx.x, 256);
  LoadTile<kPiecesV>(SharedAddress(s.d_o),
                     static_cast<const uint8_t*>(args.do_THV) + rows.first * kV * 2, rows.count,
                     threadIdx.x, 256);
  CopyAsyncCommit();
}
// ... and wait for each other's.
__device__ __forceinline__ void AwaitQueries() {
  CopyAsyncWait<0>();
  FenceProxyAsync();
  NamedSync(3, 256);
}

// Writes 64 x (columns) accumulators as bf16 rows of dq. `d` starts at column `first`.
template <int kCount>
__device__ __forceinline__ void StoreDq(const Params& params, const Rows& rows, int first,
                                        const float (&d)[kCount]) {
  const int warp = (threadIdx.x / 32) % 4, lane = threadIdx.x % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + lane / 4 + half * 8;
    if (row >= rows.count) continue;
    uint32_t* out =
        reinterpret_cast<uint32_t*>(static_cast<uint8_t*>(params.args.dq_THC) +
                                    (rows.first + row) * kRowBytes + (first + 2 * (lane % 4)) * 2);
#pragma unroll
    for (int j = 0; j < kCount / 4; ++j) {
      out[j * 4] = PackBf16(d[4 * j + 2 * half], d[4 * j + 2 * half + 1]);
    }
  }
}

__device__ __forceinline__ float DotBf16(const uint4& a, const uint4& b) {
  const uint32_t x[4] = {a.x, a.y, a.z, a.w}, y[4] = {b.x, b.y, b.z, b.w};
  float sum = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    sum += LowBf16(x[j]) * LowBf16(y[j]) + HighBf16(x[j]) * HighBf16(y[j]);
  }
  return sum;
}

// Adds columns of two lanes 2 kWidth apart; each keeps kWidth of 2 kWidth columns, in front.
template <int kWidth>
__device__ __forceinline__ void HalveColumns(float (&sums)[16], int lane) {
  const bool upper = lane & (2 * kWidth);
#pragma unroll
  for (int c = 0; c < kWidth; ++c) {
    const float give = upper ? sums[c] : sums[c + kWidth];
    const float keep = upper ? sums[c + kWidth] : sums[c];
    sums[c] = keep + __shfl_xor_sync(~0u, give, 2 * kWidth);
  }
}

// --- Warpgroup 0: scores, probabilities, KL target, dq columns 0-255. ---

// The target of a pack: each query's heads are whole warps. A query's slots are its keys ascending
// (else RestoreListOrder moves them afterwards).
struct PackedTarget {
  int begin[2] = {};  // the next slot of queries thread / 64 and thread / 64 + 2

  // Adds up the parts of the warps for one block of keys.
  __device__ __forceinline__ void Store(const Params& params, const Shared& s, int t,
                                        uint32_t parity, int thread) {
    const int queries = params.packs.queries_a_pack, warps = 4 / queries, key = thread % 64;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int query = thread / 64 + 2 * x, at = t * queries + query;
      if (query >= queries) break;
      const uint32_t low = s.valid[parity][query][0], high = s.valid[parity][query][1];
      const uint32_t word = key < 32 ? low : high;
      if (word >> (key % 32) & 1 && at < params.packs.num_queries) {
        float sum = s.target_part[parity][query * warps][key];
        if (warps == 2) sum += s.target_part[parity][query * warps + 1][key];
        const int slot =
            begin[x] + (key < 32 ? 0 : __popc(low)) + __popc(word & ((1u << (key % 32)) - 1));
        params.args.target_TK[size_t(at) * params.packs.num_selected + slot] = sum;
      }
      begin[x] += __popc(low) + __popc(high);
    }
  }
  // Slots without a key.
  __device__ __forceinline__ void Finish(const Params& params, int t, int thread) const {
    const int queries = params.packs.queries_a_pack, selected = params.packs.num_selected;
#pragma unroll
    for (int x = 0; x < 2; ++x) {
      const int query = thread / 64 + 2 * x, at = t * queries + query;
      if (query >= queries || at >= params.packs.num_queries) break;
      for (int slot = begin[x] + thread % 64; slot < selected; slot += 64) {
        params.args.target_TK[size_t(at) * selected + slot] = 0;
      }
    }
  }
};

// Ones in the halves of a pair of P whose keys, 8 j + 2 (lane % 4) and the next, are marked in the
// 64 bits: their bits become the signs of two bytes, and a byte permutation spreads signs.
__device__ __forceinline__ uint32_t SelectedPair(uint32_t low, uint32_t high, int lane, int j) {
  const uint32_t word = j < 4 ? low : high, shift = 7 - 2 * (lane % 4);
  uint32_t ones;
  asm("prmt.b32 %0, %1, %2, %3;"
      : "=r"(ones)
      : "r"(word << shift), "r"(word << (shift - 1)), "r"(0xCC88 + 0x1111 * (j % 4)));
  return ones;
}

template <bool kPacked>
__device__ __forceinline__ void RunScores(const Params& params, Shared& s, int t, int tile,
                                          int num_blocks) {
  const int thread = ThreadInRole(), warp = thread / 32, lane = thread % 32;
  const SparseAttentionBackwardArgs& args = params.args;
  const float scale_log2 = args.scale * kLog2e;

  const Rows rows = RowsOf<kPacked>(params, t, tile);
  // The query of a pack that this warp's heads belong to.
  const int query = kPacked ? warp * params.packs.queries_a_pack / 4 : 0;
  PackedTarget packed_target;
  // The two rows (heads) of this thread.
  float lse_log2[2], delta[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = warp * 16 + lane / 4 + half * 8;
    const float lse = row < rows.count ? args.lse_TH[rows.first + row] : INFINITY;
    lse_log2[half] = isinf(lse) ? INFINITY : lse * kLog2e;
  }

  const uint64_t q = DescriptorKMajor(SharedAddress(s.q));
  const uint64_t d_o = DescriptorKMajor(SharedAddress(s.d_o));
  const uint64_t k = DescriptorKMajor(SharedAddress(s.k));
  const uint64_t k_columns = DescriptorMnMajor(SharedAddress(s.k), kPieceBytes);
  const uint32_t store_offset =
      SharedAddress(s.p) + (warp * 16 + (lane & 15)) * 128;  // row of this lane's stmatrix address
  const uint32_t store_chunk = lane / 16;
  constexpr uint32_t kDsAfterP = kPieceBytes;

  float dq_left[64] = {}, dq_right[64] = {};
  for (int i = 0; i < num_blocks; ++i) {
    const uint32_t parity = i & 1;
    float scores[32];
    auto multiply = [](float(&d)[32], uint64_t a, uint64_t b, int piece, bool first) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        WgmmaBf16<64, false, false>::Shared(d, Advance(a, piece * kPieceBytes + step * 32),
                                            Advance(b, piece * kPieceBytes + step * 32),
                                            !(first && step == 0));
      }
    };
    const uint64_t q_now = Opaque(q), k_now = Opaque(k);
    // S = Q K^T, pieces in the order of their arrival.
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      BarrierWait(&s.k_full[group], parity);
      FenceProxyAsync();
      WgmmaFence();
#pragma unroll
      for (int piece = GroupBegin(group); piece < GroupEnd(group); ++piece) {
        multiply(scores, q_now, k_now, piece, piece == GroupBegin(0));
      }
    }
    WgmmaCommit();

    // P = exp(scale S - lse).
    BarrierWait(&s.valid_full, parity);
    const uint32_t valid_low = s.valid[parity][query][0], valid_high = s.valid[parity][query][1];
    WgmmaWait<0>();
    PinRegisters(scores);
#pragma unroll
    for (int x = 0; x < 32; ++x) {
      scores[x] = Exp2(scores[x] * scale_log2 - lse_log2[(x >> 1) & 1]);
    }
    if (!kPacked && (valid_low & valid_high) != ~0u) {
#pragma unroll
      for (int x = 0; x < 32; ++x) {
        const int column = 8 * (x / 4) + 2 * (lane % 4) + (x & 1);
        const uint32_t word = x / 4 < 4 ? valid_low : valid_high;
        if (!(word >> (column & 31) & 1)) scores[x] = 0;
      }
    }

    // From here on P is what the matrix unit will see: rounded to bf16.
    uint32_t p_packed[16];
#pragma unroll
    for (int x = 0; x < 16; ++x) {
      p_packed[x] = PackBf16(scores[2 * x], scores[2 * x + 1]);
      if constexpr (kPacked) p_packed[x] &= SelectedPair(valid_low, valid_high, lane, x / 2);
      asm volatile("" : "+r"(p_packed[x]));
    }

    // dP = dO V^T in the registers of S, then dS = scale P (dP - delta).
    float(&dp)[32] = scores;
    const uint64_t do_later = Opaque(d_o), k_later = Opaque(k);
    WgmmaFence();
#pragma unroll
    for (int piece = 0; piece < 8; ++piece) multiply(dp, do_later, k_later, piece, piece == 0);
    WgmmaCommit();
    uint32_t ds_packed[4][4];
    if (i == 0) {
      NamedSync(4, 256);  // delta is there
      delta[0] = s.target_part[1][0][warp * 16 + lane / 4];
      delta[1] = s.target_part[1][0][warp * 16 + lane / 4 + 8];
    }
    WgmmaWait<0>();
    PinRegisters(dp);
#pragma unroll
    for (int x = 0; x < 16; ++x) {
      const float row_delta = delta[x & 1];
      ds_packed[x / 4][x % 4] =
          PackBf16(args.scale * LowBf16(p_packed[x]) * (dp[2 * x] - row_delta),
                   args.scale * HighBf16(p_packed[x]) * (dp[2 * x + 1] - row_delta));
    }

    // Hand P and dS over once the previous ones are used up.
    if (i > 0) BarrierWait(&s.pds_empty, parity ^ 1);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t address = store_offset + (((2 * step + store_chunk) ^ (lane & 7)) << 4);
      const uint32_t* p = p_packed + 4 * step;
      StoreMatrix4(address, p[0], p[1], p[2], p[3]);
      StoreMatrix4(address + kDsAfterP, ds_packed[step][0], ds_packed[step][1], ds_packed[step][2],
                   ds_packed[step][3]);
    }
    FenceProxyAsync();
    __syncwarp();
    if (lane == 0) BarrierArrive(&s.pds_full);

    // dQ[:, 0:256] += dS K, in two halves so that half of K's pieces are free sooner.
    const uint64_t k_right = Opaque(k_columns);
    WgmmaFence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        WgmmaBf16<128, false, true>::Registers(
            half == 0 ? dq_left : dq_right, ds_packed[step],
            Advance(k_right, half * 2 * kPieceBytes + step * 2048), true);
      }
      WgmmaCommit();
    }
    WgmmaWait<1>();
    if (lane == 0) BarrierArrive(&s.k_empty[1]);
    WgmmaWait<0>();
    PinRegisters(dq_left);
    PinRegisters(dq_right);
    if (lane == 0) BarrierArrive(&s.k_empty[3]);
    // The target: P summed over this warp's 16 heads (halve the columns a lane holds at each
    // exchange), then over the warps.
    {
      float sums[16];
#pragma unroll
      for (int c = 0; c < 16; ++c) {
        const uint32_t upper = p_packed[2 * (c / 2)], lower = p_packed[2 * (c / 2) + 1];
        sums[c] = c & 1 ? HighBf16(upper) + HighBf16(lower) : LowBf16(upper) + LowBf16(lower);
      }
      HalveColumns<8>(sums, lane);
      HalveColumns<4>(sums, lane);
      HalveColumns<2>(sums, lane);
      // Left: columns c = 8 b4 + 4 b3 + 2 b2 + {0, 1} of the lane's 16, i.e. key 8 (c / 2) + 2 q.
      const int j = (lane >> 4 & 1) * 4 + (lane >> 3 & 1) * 2 + (lane >> 2 & 1);
      float2* part =
          reinterpret_cast<float2*>(&s.target_part[parity][warp][8 * j + 2 * (lane % 4)]);
      *part = make_float2(sums[0], sums[1]);
    }
    NamedSync(1, 128);
    if constexpr (kPacked) {
      packed_target.Store(params, s, t, parity, thread);
    } else if (thread < kBlock) {
      const float sum = (s.target_part[parity][0][thread] + s.target_part[parity][1][thread]) +
                        (s.target_part[parity][2][thread] + s.target_part[parity][3][thread]);
      float* target = args.target_TK + size_t(t) * args.num_selected + i * kBlock + thread;
      if (params.num_tiles == 1) {
        *target = sum;
      } else {
        atomicAdd(target, sum);  // two tiles onto zero: the same in either order
      }
    }
  }
  if constexpr (kPacked) {
    packed_target.Finish(params, t, thread);
  } else if (params.num_tiles == 1) {
    for (int x = num_blocks * kBlock + thread; x < args.num_selected; x += 128) {
      args.target_TK[size_t(t) * args.num_selected + x] = 0;
    }
  }
  StoreDq(params, rows, 0, dq_left);
  StoreDq(params, rows, 128, dq_right);
}

}  // namespace baleen::sparse_backward
