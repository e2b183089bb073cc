// Forward of sparse MQA attention on Hopper (spec 1.7).
//
// A thread block takes one query and one tile of 64 heads and walks over the query's keys in blocks
// of 64. K is loaded once for both uses (V = its first 512 columns) into one of two buffers.
//
//   warpgroups 0, 1  block b belongs to warpgroup b % 2, which makes S = q K^T, the new running
//                    maximum and P. Both keep half of o's columns (64 x 256, 128 registers) and
//                    multiply every P with their half of V: their own from registers, the other's
//                    from shared memory. One takes exponentials while the other multiplies.
//   warpgroup 2      gathers K with cp.async, group by group as its pieces come free
//
// Warpgroup 0 multiplies the other's block before its own scores, warpgroup 1 after them, behind
// its exponentials. So the scores of two blocks need nothing from each other, and the chain from
// one block's P to the next one's is paid once in two blocks.
//
// The running maximum is handed over with P, so both halves of o have the same reference and the
// order of the blocks is fixed: the result is bitwise reproducible. P lies where the block's rope
// piece was, which only the scores read.
//
// Roofline per query and tile, 2048 keys: tensor 0.285 GFLOP, 32 x 2176 cycles; gather 2.36 MB, at
// 640 TF 5.3 TB/s of L2 reads against a measured ceiling of 8 (random ids, up to 32K keys). Shared
// memory traffic is at the limit of the tensor time for S (n = 64: both operands read from it).
#include <cmath>

#include "kernels/cuda/launch.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/ops/sparse_attention_forward_cuda.h"
#include "kernels/ops/sparse_attention_tiles_cuda.cuh"

namespace baleen {
namespace {

using namespace cuda;  // NOLINT: the device wrappers

constexpr int kThreads = 384;
constexpr int kHalf = kV / 2;  // columns of o a warpgroup keeps

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

struct __align__(1024) Shared {
  uint8_t q[kPiecesC * kPieceBytes];
  uint8_t k[2][kPiecesC * kPieceBytes];
  float largest[kHeadTile];  // running maximum of the last published block, times log2 e
  float sum[2][kHeadTile];   // of exponentials, by warpgroup
  uint32_t valid[2][2];      // which keys of the block exist
  uint64_t k_full[2][kGroups], k_empty[2][kGroups], valid_full[2];
  uint64_t published[2];  // by owner: P and the maximum of its block are there
};
static_assert(sizeof(Shared) <= 227 * 1024, "one block a multiprocessor");

// One of the two consumers. Block b belongs to warpgroup b % 2, which makes its scores and P; both
// warpgroups multiply every P with their half of V.
template <int warpgroup>
struct Consumer {
  Shared& s;
  const int warp, lane;
  float o[2][64] = {};                          // two quarters of the columns of V
  float o_largest[2] = {-INFINITY, -INFINITY};  // the maximum that o (and sum) is relative to
  float sum[2] = {};

  // Makes o relative to a new maximum; most blocks leave it as it is.
  __device__ __forceinline__ void Rescale(const float (&largest)[2]) {
    if (__any_sync(~0u, largest[0] != o_largest[0] || largest[1] != o_largest[1])) {
      const float factor[2] = {Exp2(o_largest[0] - largest[0]), Exp2(o_largest[1] - largest[1])};
#pragma unroll
      for (int x = 0; x < 128; ++x) o[x / 64][x % 64] *= factor[x >> 1 & 1];
      sum[0] *= factor[0];
      sum[1] *= factor[1];
      o_largest[0] = largest[0];
      o_largest[1] = largest[1];
    }
  }

  __device__ __forceinline__ uint64_t ValueDescriptor(int buffer) const {
    return DescriptorMnMajor(
        SharedAddress(s.k[0]) + buffer * (kPiecesC * kPieceBytes) + warpgroup * 4 * kPieceBytes,
        kPieceBytes);
  }

  // Starts o += P V for the other warpgroup's block, P from shared memory.
  __device__ __forceinline__ void StartOther(int block) {
    BarrierWait(&s.published[block & 1], block >> 1 & 1);
    const float largest[2] = {s.largest[warp * 16 + lane / 4], s.largest[warp * 16 + lane / 4 + 8]};
    Rescale(largest);
    const uint64_t p =
        Opaque(DescriptorKMajor(SharedAddress(s.k[block & 1]) + kRopePiece * kPieceBytes));
    const uint64_t v = Opaque(ValueDescriptor(block & 1));
    WgmmaFence();
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        WgmmaBf16<128, false, true>::Shared(o[quarter], Advance(p, step * 32),
                                            Advance(v, quarter * 2 * kPieceBytes + step * 2048),
                                            true);
      }
      WgmmaCommit();
    }
  }
  // Waits for the quarters that multiply and gives their pieces of K back.
  __device__ __forceinline__ void FinishAndRelease(int block) {
    WgmmaWait<1>();
    Release(block, warpgroup);
    WgmmaWait<0>();
    PinRegisters(o[0]);
    PinRegisters(o[1]);
    Release(block, 2 + warpgroup);
  }
  // P of the other's block is used up as well.
  __device__ __forceinline__ void FinishOther(int block) {
    FinishAndRelease(block);
    Release(block, kRopeGroup);
  }
  __device__ __forceinline__ void Release(int block, int group) {
    if (lane == 0) BarrierArrive(&s.k_empty[block & 1][group]);
  }
};

template <int warpgroup>
__device__ __forceinline__ void RunConsumer(const SparseAttentionForwardArgs& args, Shared& s,
                                            int t, int tile, int num_blocks) {
  const int thread = ThreadInRole();
  Consumer<warpgroup> c = {s, thread / 32, thread % 32};
  const float scale_log2 = args.scale * kLog2e;
  const uint32_t p_row = SharedAddress(s.k[warpgroup]) + kRopePiece * kPieceBytes +
                         (c.warp * 16 + (c.lane & 15)) * 128;

  for (int b = warpgroup; b < num_blocks; b += 2) {
    const uint32_t phase = b >> 1 & 1;
    constexpr uint32_t buffer = warpgroup;
    // Warpgroup 0 finishes the other's block first: its pieces of K are what the loader waits for.
    if (warpgroup == 0 && b > 0) {
      c.StartOther(b - 1);
      c.FinishOther(b - 1);
    }
    float scores[32];
    // S = Q K^T, pieces in the order of their arrival.
    const uint64_t q = Opaque(DescriptorKMajor(SharedAddress(s.q)));
    const uint64_t k =
        Opaque(DescriptorKMajor(SharedAddress(s.k[0]) + buffer * (kPiecesC * kPieceBytes)));
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      BarrierWait(&s.k_full[buffer][group], phase);
      FenceProxyAsync();
      WgmmaFence();
#pragma unroll
      for (int piece = GroupBegin(group); piece < GroupEnd(group); ++piece) {
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          WgmmaBf16<64, false, false>::Shared(scores, Advance(q, piece * kPieceBytes + step * 32),
                                              Advance(k, piece * kPieceBytes + step * 32),
                                              piece > 0 || step > 0);
        }
      }
    }
    WgmmaCommit();
    BarrierWait(&s.valid_full[buffer], phase);
    const uint32_t valid_low = s.valid[buffer][0], valid_high = s.valid[buffer][1];
    WgmmaWait<0>();
    PinRegisters(scores);
    // Warpgroup 1 multiplies the other's block behind its exponentials, so that the scores of both
    // never wait for each other.
    if (warpgroup == 1) c.StartOther(b - 1);
    if ((valid_low & valid_high) != ~0u) {
#pragma unroll
      for (int x = 0; x < 32; ++x) {
        const int column = 8 * (x / 4) + 2 * (c.lane % 4) + (x & 1);
        const uint32_t word = x / 4 < 4 ? valid_low : valid_high;
        if (!(word >> (column & 31) & 1)) scores[x] = -INFINITY;
      }
    }
    // The new maximum of each row, over the four lanes that share it.
    float largest[2] = {-INFINITY, -INFINITY};
#pragma unroll
    for (int x = 0; x < 32; ++x) largest[x >> 1 & 1] = fmaxf(largest[x >> 1 & 1], scores[x]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(~0u, largest[half], 1));
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(~0u, largest[half], 2));
      largest[half] = fmaxf(largest[half] * scale_log2, c.o_largest[half]);
    }
    // P = exp(scale S - maximum), bf16 for the matrix unit; the sum takes it unrounded.
    uint32_t p[4][4];
    float block_sum[2] = {};
#pragma unroll
    for (int x = 0; x < 16; ++x) {
      const float low = Exp2(scores[2 * x] * scale_log2 - largest[x & 1]);
      const float high = Exp2(scores[2 * x + 1] * scale_log2 - largest[x & 1]);
      p[x / 4][x % 4] = PackBf16(low, high);
      block_sum[x & 1] += low + high;
    }

    // The rope piece is P's place once all of this warpgroup is through with its scores.
    NamedSync(2 + warpgroup, 128);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t address = p_row + (((2 * step + c.lane / 16) ^ (c.lane & 7)) << 4);
      StoreMatrix4(address, p[step][0], p[step][1], p[step][2], p[step][3]);
    }
    if (c.lane % 4 == 0) {
      s.largest[c.warp * 16 + c.lane / 4] = largest[0];
      s.largest[c.warp * 16 + c.lane / 4 + 8] = largest[1];
    }
    FenceProxyAsync();
    __syncwarp();
    if (c.lane == 0) BarrierArrive(&s.published[warpgroup]);
    if (warpgroup == 1) c.FinishOther(b - 1);

    c.Rescale(largest);
    c.sum[0] += block_sum[0];
    c.sum[1] += block_sum[1];
    const uint64_t v = Opaque(c.ValueDescriptor(buffer));
    WgmmaFence();
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        WgmmaBf16<128, false, true>::Registers(
            c.o[quarter], p[step], Advance(v, quarter * 2 * kPieceBytes + step * 2048), true);
      }
      WgmmaCommit();
    }
    c.FinishAndRelease(b);
  }
  if (((num_blocks - 1) & 1) != warpgroup) {
    c.StartOther(num_blocks - 1);
    c.FinishOther(num_blocks - 1);
  }

  // Both have the same maximum now; add the two sums.
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    c.sum[half] += __shfl_xor_sync(~0u, c.sum[half], 1);
    c.sum[half] += __shfl_xor_sync(~0u, c.sum[half], 2);
    if (c.lane % 4 == 0) s.sum[warpgroup][c.warp * 16 + c.lane / 4 + 8 * half] = c.sum[half];
  }
  NamedSync(1, 256);
  float inverse[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = c.warp * 16 + c.lane / 4 + 8 * half;
    const float total = s.sum[0][row] + s.sum[1][row];
    inverse[half] = 1.0f / total;
    const int head = tile * kHeadTile + row;
    if (warpgroup == 0 && c.lane % 4 == 0 && head < args.num_heads) {
      args.lse_TH[size_t(t) * args.num_heads + head] =
          (c.o_largest[half] + log2f(total)) * 0.6931471805599453f;
    }
  }
  // o through Q's memory, which nobody reads any more: each warp its 16 rows x 256 columns.
  const uint32_t staging = SharedAddress(s.q) + (warpgroup * 4 + c.warp) * 8192;
#pragma unroll
  for (int x = 0; x < 16; ++x) {
    const float* d = c.o[x / 8] + 8 * (x % 8);
    const uint32_t chunk = 2 * x + c.lane / 16;
    StoreMatrix4(staging + (c.lane & 15) * 512 + ((chunk ^ (c.lane & 7)) << 4),
                 PackBf16(d[0] * inverse[0], d[1] * inverse[0]),
                 PackBf16(d[2] * inverse[1], d[3] * inverse[1]),
                 PackBf16(d[4] * inverse[0], d[5] * inverse[0]),
                 PackBf16(d[6] * inverse[1], d[7] * inverse[1]));
  }
  __syncwarp();
  const int first_head = tile * kHeadTile + c.warp * 16;
#pragma unroll 4
  for (int row = 0; row < 16; ++row) {
    if (first_head + row >= args.num_heads) break;
    const uint8_t* from =
        s.q + (warpgroup * 4 + c.warp) * 8192 + row * 512 + ((c.lane ^ (row & 7)) << 4);
    uint4* to = reinterpret_cast<uint4*>(
        static_cast<uint8_t*>(args.o_THV) +
        ((size_t(t) * args.num_heads + first_head + row) * kV + warpgroup * kHalf) * 2);
    to[c.lane] = *reinterpret_cast<const uint4*>(from);
  }
}

// The producer: gathers the blocks' keys in turn into the two buffers.
__device__ __forceinline__ void RunLoader(const SparseAttentionForwardArgs& args, Shared& s, int t,
                                          int num_blocks) {
  const int thread = ThreadInRole(), lane = thread % 32;
  const int32_t* ids = args.ids_TK + size_t(t) * args.num_selected;
  const int first_row = thread / 8, chunk = thread % 8;
  const uint8_t* kv = static_cast<const uint8_t*>(args.kv_SC) + chunk * 16;
  const uint32_t to = SharedAddress(s.k[0]) + SwizzledOffset(first_row, chunk);

  int32_t next[4], own = -1;
  auto load_ids = [&](int b) {
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {
      next[pass] = __ldg(ids + b * kBlock + pass * 16 + first_row);
    }
    if (thread < kBlock) own = __ldg(ids + b * kBlock + thread);
  };
  load_ids(0);
  for (int b = 0; b < num_blocks; ++b) {
    const uint32_t phase = b >> 1 & 1, buffer = b & 1;
    const int from[4] = {next[0], next[1], next[2], next[3]};
    const int32_t id = own;
    if (b + 1 < num_blocks) load_ids(b + 1);
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      if (b >= 2) BarrierWait(&s.k_empty[buffer][group], phase ^ 1);
      if (group == 0 && thread < kBlock) {
        const uint32_t valid = __ballot_sync(~0u, id >= 0);
        if (lane == 0) {
          s.valid[buffer][thread / 32] = valid;
          BarrierArrive(&s.valid_full[buffer]);
        }
      }
      GatherPieces(to + buffer * (kPiecesC * kPieceBytes), kv, from, GroupBegin(group),
                   GroupEnd(group));
      CopyAsyncArrive(&s.k_full[buffer][group]);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    SparseAttentionForwardKernel(const __grid_constant__ SparseAttentionForwardArgs args,
                                 int num_tiles) {
  extern __shared__ __align__(1024) uint8_t shared_bytes[];
  Shared& s = *reinterpret_cast<Shared*>(shared_bytes);
  const int t = blockIdx.x / num_tiles, tile = blockIdx.x % num_tiles;
  const int thread = threadIdx.x;

  const int32_t first_id =
      FirstIdOfLanesBlock(args.ids_TK + size_t(t) * args.num_selected, args.num_selected);
  if (thread == 0) {
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
  // Warpgroups 0 and 1 bring the tile's rows of q.
  const size_t first_head = size_t(t) * args.num_heads + tile * kHeadTile;
  const int heads = min(kHeadTile, args.num_heads - tile * kHeadTile);
  if (thread < 256) {
    LoadTile<kPiecesC>(SharedAddress(s.q),
                       static_cast<const uint8_t*>(args.q_THC) + first_head * kRowBytes, heads,
                       thread, 256);
    CopyAsyncCommit();
  }
  const int num_blocks = CountBlocks(first_id);

  if (num_blocks == 0) {
    CopyAsyncWait<0>();
    uint4* o = reinterpret_cast<uint4*>(static_cast<uint8_t*>(args.o_THV) + first_head * kV * 2);
    for (int x = thread; x < heads * kV / 8; x += kThreads) o[x] = make_uint4(0, 0, 0, 0);
    if (thread < heads) args.lse_TH[first_head + thread] = -INFINITY;
    return;
  }

  const int warpgroup = __shfl_sync(~0u, thread / 128, 0);
  if (warpgroup < 2) {
    RaiseRegisters<216>();
    CopyAsyncWait<0>();
    FenceProxyAsync();
    NamedSync(1, 256);
    if (warpgroup == 0) {
      RunConsumer<0>(args, s, t, tile, num_blocks);
    } else {
      RunConsumer<1>(args, s, t, tile, num_blocks);
    }
  } else {
    LowerRegisters<72>();
    RunLoader(args, s, t, num_blocks);
  }
}

}  // namespace

void LaunchSparseAttentionForward(const SparseAttentionForwardArgs& args, void* stream) {
  if (args.num_tokens == 0) return;
  CheckCuda(cudaFuncSetAttribute(SparseAttentionForwardKernel,
                                 cudaFuncAttributeMaxDynamicSharedMemorySize, int(sizeof(Shared))),
            "shared memory of sparse attention");
  const int num_tiles = (args.num_heads + kHeadTile - 1) / kHeadTile;
  SparseAttentionForwardKernel<<<args.num_tokens * num_tiles, kThreads, sizeof(Shared),
                                 AsStream(stream)>>>(args, num_tiles);
  CheckLaunch("sparse attention");
}

}  // namespace baleen
