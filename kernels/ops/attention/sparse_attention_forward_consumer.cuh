// Sparse attention forward, part 2: the two warpgroups that multiply. See
// sparse_attention_forward_cuda.cu for the whole.
#pragma once

#include "kernels/ops/attention/sparse_attention_forward_tile.cuh"

namespace baleen::sparse_forward {

// One of the two consumers. Block b belongs to warpgroup b % 2, which makes its scores and P; both
// warpgroups multiply every P with their half of V.
template <int warpgroup, bool kPacked>
struct Consumer {
  Shared& s;
  const int warp, lane;
  uint32_t own_uses = 0, other_uses = 0;  // of the two buffers, by the turns before this one
  float o[2][64];                         // two quarters of the columns of V
  float o_largest[2];                     // the maximum that o (and sum) is relative to
  float sum[2];

  __device__ __forceinline__ void Begin() {
#pragma unroll
    for (int x = 0; x < 128; ++x) o[x / 64][x % 64] = 0;
    // In a pack a row may have no key for blocks, and P = exp(-inf - maximum) must be 0 there.
    o_largest[0] = o_largest[1] = kPacked ? -1e30f : -INFINITY;
    sum[0] = sum[1] = 0;
  }

  // The parity of a block's phase of its buffer's barriers.
  __device__ __forceinline__ uint32_t OwnPhase(int block) const {
    return (own_uses + (block >> 1)) & 1;
  }
  __device__ __forceinline__ uint32_t OtherPhase(int block) const {
    return (other_uses + (block >> 1)) & 1;
  }

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

  // Waits for P of the other warpgroup's block; it is relative to `largest`.
  __device__ __forceinline__ void AwaitOther(int block, float (&largest)[2]) const {
    BarrierWait(&s.published[1 - warpgroup], OtherPhase(block));
    largest[0] = s.largest[warp * 16 + lane / 4];
    largest[1] = s.largest[warp * 16 + lane / 4 + 8];
  }

  // o += P V for the other's block, P from shared memory.
  __device__ __forceinline__ void MultiplyOther(int block) {
    float largest[2];
    AwaitOther(block, largest);
    MultiplyOther(block, largest);
  }
  __device__ __forceinline__ void MultiplyOther(int block, const float (&largest)[2]) {
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
    FinishAndRelease(block);
    Release(block, kRopeGroup);  // where P was
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
  __device__ __forceinline__ void Release(int block, int group) {
    if (lane == 0) BarrierArrive(&s.k_empty[block & 1][group]);
  }

  // S = Q K^T, pieces in the order of their arrival; -inf where the row's query has not selected
  // the key.
  __device__ __forceinline__ void MakeScores(int b, int num_blocks, const int (&query)[2],
                                             float (&scores)[32]) {
    constexpr uint32_t buffer = warpgroup;
    const uint32_t phase = OwnPhase(b);
    const uint64_t q = Opaque(DescriptorKMajor(SharedAddress(s.q)));
    const uint64_t k =
        Opaque(DescriptorKMajor(SharedAddress(s.k[0]) + buffer * (kPiecesC * kPieceBytes)));
#pragma unroll
    for (int group = 0; group < kGroups; ++group) {
      // A fence costs some 60 clocks: one for the first two groups, one for the others.
      if (group == 0 || group == 2) {
#pragma unroll
        for (int next = group; next < (group == 0 ? 2 : kGroups); ++next) {
          BarrierWait(&s.k_full[buffer][next], phase);
        }
        FenceProxyAsync();
      }
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
    uint32_t valid[2][2];  // of the two rows, the keys of the two halves of the block
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      valid[half][0] = s.valid[buffer][query[half]][0];
      valid[half][1] = s.valid[buffer][query[half]][1];
    }
    WgmmaWait<0>();
    PinRegisters(scores);
    if (b + 2 >= num_blocks && lane == 0) BarrierArrive(&s.q_empty);
    if ((valid[0][0] & valid[0][1] & valid[1][0] & valid[1][1]) != ~0u) {
#pragma unroll
      for (int x = 0; x < 32; ++x) {
        const uint32_t word = valid[x >> 1 & 1][x / 16] >> (2 * (lane % 4));
        if (!(word >> (8 * (x / 4 % 4) + (x & 1)) & 1)) scores[x] = -INFINITY;
      }
    }
  }

  // The new maximum of each row, over the four lanes that share it, and of the blocks before.
  __device__ __forceinline__ void FindLargest(const float (&scores)[32], float scale_log2,
                                              const float (&before)[2], float (&largest)[2]) const {
    largest[0] = largest[1] = -INFINITY;
#pragma unroll
    for (int x = 0; x < 32; ++x) largest[x >> 1 & 1] = fmaxf(largest[x >> 1 & 1], scores[x]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(~0u, largest[half], 1));
      largest[half] = fmaxf(largest[half], __shfl_xor_sync(~0u, largest[half], 2));
      largest[half] = fmaxf(largest[half] * scale_log2, before[half]);
    }
  }

  // Hands P and the maximum of the own block to the other.
  __device__ __forceinline__ void Publish(const uint32_t (&p)[4][4], const float (&largest)[2]) {
    // The rope piece is P's place once all of this warpgroup is through with its scores.
    NamedSync(2 + warpgroup, 128);
    const uint32_t row =
        SharedAddress(s.k[warpgroup]) + kRopePiece * kPieceBytes + (warp * 16 + (lane & 15)) * 128;
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      const uint32_t address = row + (((2 * step + lane / 16) ^ (lane & 7)) << 4);
      StoreMatrix4(address, p[step][0], p[step][1], p[step][2], p[step][3]);
    }
    if (lane % 4 == 0) {
      s.largest[warp * 16 + lane / 4] = largest[0];
      s.largest[warp * 16 + lane / 4 + 8] = largest[1];
    }
    FenceProxyAsync();
    __syncwarp();
    if (lane == 0) BarrierArrive(&s.published[warpgroup]);
  }

  // o += P V of the own block, P from registers.
  __device__ __forceinline__ void MultiplyOwn(int b, const uint32_t (&p)[4][4]) {
    const uint64_t v = Opaque(ValueDescriptor(warpgroup));
    WgmmaFence();
#pragma unroll
    for (int quarter = 0; quarter < 2; ++quarter) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        WgmmaBf16<128, false, true>::Registers(
            o[quarter], p[step], Advance(v, quarter * 2 * kPieceBytes + step * 2048), true);
      }
      WgmmaCommit();
    }
    FinishAndRelease(b);
  }

  // 1 / sum of each row and its lse in the base 2. Both warpgroups have the same maximum now; add
  // the two sums.
  __device__ __forceinline__ void Total(uint32_t parity, float (&inverse)[2], float (&lse)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
      sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
      if (lane % 4 == 0) s.sum[parity][warpgroup][warp * 16 + lane / 4 + 8 * half] = sum[half];
    }
    NamedSync(1, 256);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + lane / 4 + 8 * half;
      const float total = s.sum[parity][0][row] + s.sum[parity][1][row];
      const bool empty = kPacked && total == 0;
      inverse[half] = empty ? 0 : 1.0f / total;
      lse[half] = empty ? -INFINITY : o_largest[half] + log2f(total);
    }
  }

  // Writes lse and o.
  __device__ __forceinline__ void Store(const SparseAttentionForwardArgs& args, const Rows& rows,
                                        uint32_t parity) {
    float inverse[2], lse[2];
    Total(parity, inverse, lse);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp * 16 + lane / 4 + 8 * half;
      if (warpgroup == 0 && lane % 4 == 0 && row < rows.count) {
        args.lse_TH[rows.first + row] = lse[half] * kLn2;
      }
    }
    // Each warp's 16 rows x 256 columns in eight stages of 32 columns. Rows of 64 bytes, their
    // chunks of 16 exchanged so that neither side of the stage has bank conflicts.
    const uint32_t stage = SharedAddress(s.stage[warpgroup * 4 + warp]);
    const uint32_t to_row = lane & 15, from_row = lane / 4;
    uint8_t* o_row = static_cast<uint8_t*>(args.o_THV) +
                     ((rows.first + warp * 16 + from_row) * kV + warpgroup * kHalf) * 2 +
                     lane % 4 * 16;
#pragma unroll
    for (int x = 0; x < 8; ++x) {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        const float* d = o[x / 4] + 16 * (x % 4) + 8 * part;
        const uint32_t chunk = 2 * part + lane / 16;
        StoreMatrix4(stage + to_row * 64 + ((chunk ^ (to_row >> 1 & 3)) << 4),
                     PackBf16(d[0] * inverse[0], d[1] * inverse[0]),
                     PackBf16(d[2] * inverse[1], d[3] * inverse[1]),
                     PackBf16(d[4] * inverse[0], d[5] * inverse[0]),
                     PackBf16(d[6] * inverse[1], d[7] * inverse[1]));
      }
      __syncwarp();
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t row = from_row + 8 * half;
        uint32_t words[4];
        LoadShared16(stage + row * 64 + ((lane % 4 ^ (row >> 1 & 3)) << 4), words);
        if (int(warp * 16 + row) < rows.count) {
          *reinterpret_cast<uint4*>(o_row + half * (8 * kV * 2) + x * 64) =
              make_uint4(words[0], words[1], words[2], words[3]);
        }
      }
      __syncwarp();
    }
  }

  // Writes a part's lse and o as the threads hold them, for AddPartsKernel; a part without blocks
  // has lse = -inf and no o.
  __device__ __forceinline__ void StorePart(const SparseAttentionForwardArgs& args,
                                            const Plan& plan, int slot, uint32_t parity) {
    float inverse[2], lse[2];
    Total(parity, inverse, lse);
    float* lse_to = PartsLse(args, plan) + slot * kHeadTile + warp * 16 + lane / 4;
    if (warpgroup == 0 && lane % 4 == 0) {
      lse_to[0] = lse[0];
      lse_to[8] = lse[1];
    }
    float4* to = PartO(args, slot) + warpgroup * 128 + warp * 32 + lane;
#pragma unroll
    for (int x = 0; x < kPartVectors; ++x) {
      const float* d = o[x / 16] + 4 * (x % 16);
      to[x * 256] =
          make_float4(d[0] * inverse[0], d[1] * inverse[0], d[2] * inverse[1], d[3] * inverse[1]);
    }
  }
  __device__ __forceinline__ void StoreNoPart(const SparseAttentionForwardArgs& args,
                                              const Plan& plan, int slot) const {
    if (warpgroup == 0 && lane < 16) {
      PartsLse(args, plan)[slot * kHeadTile + warp * 16 + lane] = -INFINITY;
    }
  }

  // A row without keys: o = 0, lse = -inf.
  __device__ __forceinline__ void StoreNothing(const SparseAttentionForwardArgs& args,
                                               const Rows& rows) const {
    const int thread = warpgroup * 128 + warp * 32 + lane;
    uint4* out = reinterpret_cast<uint4*>(static_cast<uint8_t*>(args.o_THV) + rows.first * kV * 2);
    for (int x = thread; x < rows.count * kV / 8; x += 256) out[x] = make_uint4(0, 0, 0, 0);
    if (thread < rows.count) args.lse_TH[rows.first + thread] = -INFINITY;
  }
};

template <int warpgroup, bool kPacked>
__device__ __forceinline__ void RunConsumer(const SparseAttentionForwardArgs& args,
                                            const Plan& plan, Shared& s) {
  const int thread = ThreadInRole();
  Consumer<warpgroup, kPacked> c = {s, thread / 32, thread % 32};
  const float scale_log2 = args.scale * kLog2e;
  int query[2] = {};  // of the pack, by the thread's two rows
  if constexpr (kPacked) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      query[half] =
          min((c.warp * 16 + c.lane / 4 + 8 * half) / args.num_heads, kMostPackedQueries - 1);
    }
  }

  uint32_t parity = 0;
  for (int i = blockIdx.x; i < plan.turns; i += gridDim.x, parity ^= 1) {
    BarrierWait(&s.q_full, parity);
    const int num_blocks = s.num_blocks;
    if (num_blocks <= warpgroup) {  // no scores of its own
      __syncwarp();
      if (c.lane == 0) BarrierArrive(&s.q_empty);
    }
    c.Begin();
    for (int b = warpgroup; b < num_blocks; b += 2) {
      float scores[32], before[2] = {c.o_largest[0], c.o_largest[1]}, largest[2];
      c.MakeScores(b, num_blocks, query, scores);
      if (warpgroup == 1) c.AwaitOther(b - 1, before);
      c.FindLargest(scores, scale_log2, before, largest);
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
      c.Publish(p, largest);
      // Warpgroup 1 multiplies the other's block only now. An instruction of the matrix unit waits
      // for those before it to be nearly through, so nothing hides behind products started earlier,
      // and P would reach warpgroup 0 later.
      if (warpgroup == 1) c.MultiplyOther(b - 1, before);
      c.Rescale(largest);
      c.sum[0] += block_sum[0];
      c.sum[1] += block_sum[1];
      c.MultiplyOwn(b, p);
      // Warpgroup 0 finishes the other's block before its next scores: its pieces of K are what the
      // loader waits for.
      if (warpgroup == 0 && b + 1 < num_blocks) {
        c.MultiplyOther(b + 1);
      }
    }
    if (warpgroup == 1 && (num_blocks & 1)) c.MultiplyOther(num_blocks - 1);
    const Turn turn = TurnOf(plan, i);
    if (turn.slot < 0 && num_blocks > 0) {
      c.Store(args, RowsOf<kPacked>(args, turn.work), parity);
    } else if (turn.slot < 0) {
      c.StoreNothing(args, RowsOf<kPacked>(args, turn.work));
    } else if (num_blocks > 0) {
      c.StorePart(args, plan, turn.slot, parity);
    } else {
      c.StoreNoPart(args, plan, turn.slot);
    }
    c.own_uses += (num_blocks + 1 - warpgroup) / 2;
    c.other_uses += (num_blocks + warpgroup) / 2;
  }
}

}  // namespace baleen::sparse_forward
