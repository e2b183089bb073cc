// Sparse attention backward, part 2: warpgroup 1, which makes and sends the gradients of the keys.
// See sparse_attention_backward_cuda.cu for the whole.
#pragma once

#include "kernels/ops/attention/sparse_attention_backward_scores.cuh"

namespace baleen::sparse_backward {

// --- Warpgroup 1: dq columns 256-447, then dkv in chunks of 32 columns. ---

// All rows of this thread block are stored.
template <bool kPacked>
__device__ __forceinline__ void AnnounceRows(const Params& params, int t) {
  Announce(&params.index.written_C[ChunkOf<kPacked>(params, t)]);
}

// delta = sum over V of o do for the tile's heads, 16 a warp, while the first scores multiply.
__device__ __forceinline__ void StoreDelta(const Params& params, Shared& s, const Rows& rows) {
  const SparseAttentionBackwardArgs& args = params.args;
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32;
  const uint4* o = static_cast<const uint4*>(args.o_THV) + lane;
  const uint4* d_o = static_cast<const uint4*>(args.do_THV) + lane;
#pragma unroll 1
  for (int row = 0; row < 16; row += 4) {
    uint4 a[4][2], b[4][2];
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      const int head = min(warp * 16 + row + x / 2, rows.count - 1);
      const size_t at = (rows.first + head) * (kV / 8) + x % 2 * 32;
      a[x / 2][x % 2] = __ldcs(o + at);
      b[x / 2][x % 2] = __ldg(d_o + at);
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      float sum = DotBf16(a[r][0], b[r][0]) + DotBf16(a[r][1], b[r][1]);
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) s.target_part[1][0][warp * 16 + row + r] = sum;
    }
  }
}

// Where the dkv rows of this thread's two keys go (null = nowhere), this lane's share of each
// store, from `first_chunk` on. The rows are short where one tile makes them
// (sparse_scatter_row_cuda.h): there memory limits. A pair has half of the bytes a product, and no
// time to pack them.
template <bool kShort>
struct KeyRows {
  static constexpr int kBytes = kScatterRowBytes<kShort>;
  uint8_t* row[2];
  uint32_t held[2][5];  // words of short units that wait until they fill 16 bytes

  __device__ __forceinline__ KeyRows(const Params& params, const int32_t* places, int lane,
                                     int first_chunk) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int place = places[lane / 4 + half * 8];
      const uint64_t address = place < 0 ? 0
                                         : reinterpret_cast<uint64_t>(params.rows) +
                                               size_t(place) * kBytes + first_chunk * (kChunk * 2) +
                                               (lane % 4) * 16;
      // The shuffle keeps the compiler from computing it anew between the stores, where it would
      // wait for the stores' registers.
      row[half] = reinterpret_cast<uint8_t*>(__shfl_sync(~0u, address, lane));
    }
  }

  __device__ __forceinline__ void Store(int half, int at, uint32_t a, uint32_t b, uint32_t c,
                                        uint32_t d) const {
    __stcs(reinterpret_cast<uint4*>(row[half] + at), make_uint4(a, b, c, d));
  }

  // Sends chunk `chunk`. All of it is arranged into stores of 16 bytes before the first leaves,
  // else each store waits for the registers of the one before. ready[] holds the two rows in turn.
  __device__ __forceinline__ void Emit(int chunk, const float (&d)[16]) {
    if (kShort && chunk * kChunk < kScatterShortColumns) {
      EmitShort(chunk, d);
      return;
    }
    uint32_t ready[8];
#pragma unroll
    for (int x = 0; x < 8; ++x) {
      const int from = 4 * (x % 4) + 2 * (x / 4);
      ready[x] = PackBf16(d[from], d[from + 1]);
    }
#pragma unroll
    for (int x = 0; x < 8; ++x) asm volatile("" : "+r"(ready[x]));
    const int at = chunk * kChunk * 2 - (kRowBytes - kBytes);  // the last columns are at the end
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t* x = ready + 4 * half;
      if (row[half] != nullptr) Store(half, at, x[0], x[1], x[2], x[3]);
    }
  }

  // Four chunks, two pieces, leave as three stores a row (ScatterUnitPlace, ScatterUnitRest).
  __device__ __forceinline__ void EmitShort(int chunk, const float (&d)[16]) {
    uint32_t words[2][3];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float numbers[8];
#pragma unroll
      for (int x = 0; x < 8; ++x) numbers[x] = d[4 * (x / 2) + 2 * half + x % 2];
      const ShortUnit unit(numbers);
#pragma unroll
      for (int x = 0; x < 3; ++x) {
        words[half][x] = unit.words[x];
        asm volatile("" : "+r"(words[half][x]));  // here, not behind the branches below
      }
    }
    const int at = chunk / 4 * kScatterTwoPiecesBytes, step = chunk % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t(&h)[5] = held[half];
      const uint32_t(&w)[3] = words[half];
      if (step % 2 == 0) {
#pragma unroll
        for (int x = 0; x < 3; ++x) h[x] = w[x];
        continue;
      }
      if (row[half] != nullptr) {
        Store(half, at + step / 2 * 64, h[0], h[1], h[2], w[0]);
        if (step == 3) Store(half, at + 128, h[3], h[4], w[1], w[2]);
      }
      h[3] = w[1];
      h[4] = w[2];
    }
  }
};

// The other half of a pair's sum: chunks 2 j + r of 32 columns belong to the block of rank r, which
// adds the other's bf16 partial to its own and sends the sum on. Warp w of one block talks to warp
// w of the other only, thread to thread, through slot n % kSlots for the n-th chunk since the
// start.
//   stage_open  the receiver's P and dS of this block of keys are used up, their memory is a stage
//   received    a slot is full;  credit  the receiver has read it
struct PairExchange {
  Shared& s;
  const int thread, lane;
  const uint32_t peer, peer_stage, peer_received, own_stage;

  __device__ __forceinline__ PairExchange(Shared& shared, int thread_in_role)
      : s(shared),
        thread(thread_in_role),
        lane(thread_in_role % 32),
        peer(ClusterRank() ^ 1),
        peer_stage(PeerAddress(SharedAddress(shared.p), ClusterRank() ^ 1) + thread_in_role * 16),
        peer_received(PeerAddress(SharedAddress(shared.received), ClusterRank() ^ 1)),
        own_stage(SharedAddress(shared.p) + thread_in_role * 16) {}

  __device__ __forceinline__ void Send(uint32_t n, const float (&d)[16]) const {
    const uint32_t slot = n % kSlots;
    if (n >= kSlots) BarrierWait(&s.credit[slot], n / kSlots & 1 ^ 1);
    const uint32_t to = peer_stage + slot * kSlotBytes;
    const uint32_t full = peer_received + slot * sizeof(uint64_t);
    StorePeer16(to, full, PackBf16(d[0], d[1]), PackBf16(d[2], d[3]), PackBf16(d[4], d[5]),
                PackBf16(d[6], d[7]));
    StorePeer16(to + kSlotBytes / 2, full, PackBf16(d[8], d[9]), PackBf16(d[10], d[11]),
                PackBf16(d[12], d[13]), PackBf16(d[14], d[15]));
  }

  __device__ __forceinline__ void Add(uint32_t n, float (&d)[16]) const {
    const uint32_t slot = n % kSlots;
    if (lane == 0) BarrierArriveExpect(&s.received[slot], kSlotBytes / 4);
    BarrierWait(&s.received[slot], n / kSlots & 1);
#pragma unroll
    for (int part = 0; part < 2; ++part) {
      uint32_t words[4];
      LoadShared16(own_stage + slot * kSlotBytes + part * (kSlotBytes / 2), words);
#pragma unroll
      for (int x = 0; x < 4; ++x) {
        d[8 * part + 2 * x] += LowBf16(words[x]);
        d[8 * part + 2 * x + 1] += HighBf16(words[x]);
      }
    }
  }

  // Gives the slot back, once what was read from it has been used: an arrival at the peer overtakes
  // loads that still wait in the queue behind stores (seen), and would let it write too early.
  __device__ __forceinline__ void GiveBack(uint32_t n) const {
    __syncwarp();
    if (lane == 0) BarrierArrivePeer(&s.credit[n % kSlots], peer);
  }
};

// The order of dkv's chunks of 32 columns, two a piece. A pair makes the chunks it gives two pieces
// ahead of those it keeps, so that the other's have arrived when they are added.
struct Chunk {
  int piece;
  bool given;
};
constexpr int kNumChunks = 2 * kPiecesC;
template <bool kPair>
__device__ constexpr Chunk ChunkAt(int x) {
  if (!kPair) return {x / 2, x % 2 == 1};
  if (x < 2) return {x, true};
  if (x >= kNumChunks - 2) return {x - kPiecesC, false};
  return x % 2 == 0 ? Chunk{x / 2 - 1, false} : Chunk{x / 2 + 1, true};
}

template <bool kPair, bool kPacked>
__device__ __forceinline__ void RunKeyGradients(const Params& params, Shared& s, int t, int tile,
                                                int num_blocks) {
  const int thread = ThreadInRole(), warp = thread / 32, lane = thread % 32;
  const uint64_t k_columns = DescriptorMnMajor(SharedAddress(s.k) + 4 * kPieceBytes, kPieceBytes);
  const uint64_t ds_heads = DescriptorKMajor(SharedAddress(s.ds));
  // Each lane's row address for loading P and dS transposed: this warp's 16 keys, 16 heads a step.
  const uint32_t pds_lane =
      SharedAddress(s.p) + SwizzledOffset(lane / 16 * 8 + lane % 8, 2 * warp + (lane / 8 & 1));
  const uint64_t q_columns = DescriptorMnMajor(SharedAddress(s.q), kPieceBytes);
  const uint64_t do_columns = DescriptorMnMajor(SharedAddress(s.d_o), kPieceBytes);

  const Rows rows_of_q = RowsOf<kPacked>(params, t, tile);
  StoreDelta(params, s, rows_of_q);
  // The buffer the rows go to has been added up and is free.
  const int reused = ChunkBefore<kPacked>(params, ChunkOf<kPacked>(params, t));
  if (reused >= 0 && lane == 0) {
    AwaitCount(&params.index.summed_C[reused],
               ScheduleOf<kPacked>(params).SumsAChunk() * params.num_tiles);
  }
  __syncwarp();
  AwaitQueries();
  NamedSync(4, 256);

  float dq[96] = {};
  float sums[2][16];  // of the chunk that multiplies and of the one that is sent away
  const int rank = kPair ? int(ClusterRank()) : 0;
  const uint32_t kept_side = rank * 64, given_side = 64 - kept_side;
  const PairExchange exchange(s, thread);
  uint32_t p[4][4], ds[4][4];  // transposed: [keys, heads], the A of four steps of 16 heads
  auto multiply_chunk = [&](float(&d)[16], Chunk chunk) {
    const int piece = chunk.piece;
    const uint32_t side = chunk.given ? given_side : kept_side;
    const uint64_t do_now = Opaque(Advance(do_columns, side));
    const uint64_t q_now = Opaque(Advance(q_columns, side));
    WgmmaFence();
    if (piece < kPiecesV) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        WgmmaBf16<kChunk, false, true>::Registers(
            d, p[step], Advance(do_now, piece * kPieceBytes + step * 2048), step > 0);
      }
    }
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      WgmmaBf16<kChunk, false, true>::Registers(d, ds[step],
                                                Advance(q_now, piece * kPieceBytes + step * 2048),
                                                piece < kPiecesV || step > 0);
    }
    WgmmaCommit();
  };

  for (int i = 0; i < num_blocks; ++i) {
    const uint32_t parity = i & 1;
    BarrierWait(&s.pds_full, parity);
    const uint64_t ds_now = Opaque(ds_heads), k_now = Opaque(k_columns);
    WgmmaFence();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      WgmmaBf16<192, false, true>::Shared(dq, Advance(ds_now, step * 32),
                                          Advance(k_now, step * 2048), true);
    }
    WgmmaCommit();
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      LoadMatrix4Transposed(pds_lane + step * 2048, p[step][0], p[step][1], p[step][2], p[step][3]);
      LoadMatrix4Transposed(pds_lane + kPieceBytes + step * 2048, ds[step][0], ds[step][1],
                            ds[step][2], ds[step][3]);
    }
    BarrierWait(&s.row_full, parity);
    KeyRows<!kPair> rows(params, s.row[parity] + warp * 16, lane, rank);
    multiply_chunk(sums[0], ChunkAt<kPair>(0));
    WgmmaWait<1>();
    if (lane == 0) {
      BarrierArrive(&s.k_empty[2]);
      if constexpr (kPair) {
        BarrierArrivePeer(&s.stage_open, exchange.peer);
      } else {
        BarrierArrive(&s.pds_empty);
      }
    }
    if constexpr (kPair) BarrierWait(&s.stage_open, parity);
      // One chunk multiplies while the one before is sent.
#pragma unroll
    for (int x = 0; x < kNumChunks; ++x) {
      if (x + 1 < kNumChunks) {
        multiply_chunk(sums[(x + 1) & 1], ChunkAt<kPair>(x + 1));
        WgmmaWait<1>();
      } else {
        WgmmaWait<0>();
      }
      float(&sum)[16] = sums[x & 1];
      PinRegisters(sum);
      const Chunk chunk = ChunkAt<kPair>(x);
      const uint32_t n = i * kPiecesC + chunk.piece;
      if (kPair && chunk.given) {
        exchange.Send(n, sum);
      } else {
        if constexpr (kPair) exchange.Add(n, sum);
        rows.Emit(2 * chunk.piece + (kPair ? 0 : int(chunk.given)), sum);
        if constexpr (kPair) exchange.GiveBack(n);
      }
    }
    if constexpr (kPair) {
      __syncwarp();
      if (lane == 0) BarrierArrive(&s.pds_empty);
    }
  }
  NamedSync(5, 128);
  if (thread == 0) AnnounceRows<kPacked>(params, t);
  PinRegisters(dq);
  StoreDq(params, rows_of_q, 256, dq);
}

}  // namespace baleen::sparse_backward
