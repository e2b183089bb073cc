// Indexer backward, kernel 5: dq, dw and the integer sums of dk. See indexer_backward_cuda.cu for
// who does what.
#pragma once

#include "kernels/ops/indexer_backward_params.cuh"

namespace baleen::indexer_backward {

__device__ __forceinline__ void BulkAddS32(int* global, uint32_t shared, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(global),
      "r"(shared), "r"(bytes)
      : "memory");
}

constexpr int kKeyStages = 3;
constexpr int kStagedRowBytes = 512 + 32;  // padded against bank conflicts
constexpr int kStagedWarpRows = 16;        // a warp stages, and has reduced, 16 rows of its own
constexpr int kGradientThreads = 384;

// What one consumer warpgroup and its two producer warps share.
struct alignas(1024) Station {
  uint8_t q[kTileBytes];
  uint8_t keys[kKeyStages][kTileBytes];
  uint8_t marks[kTileKeys * 128];  // [64 keys, 64 heads]: delta 1[a > 0], bf16
  uint8_t staged[kTileKeys * kStagedRowBytes];
  float w[kHeads];
  int ids[kKeyStages][kTileKeys];
  float deltas[kKeyStages][kTileKeys];
  float factors[kKeyStages][kTileKeys];  // delta 2^exponent
  uint64_t q_full, q_empty, key_full[kKeyStages], key_empty[kKeyStages];
};

// In shared tiles consumer 0 stages its integers in the staging rows of station tile % 2
// (`filled`), consumer 1 adds its own there, issues the reduction, and hands the rows back
// (`returned`): warp by warp, as a warp of one consumer has the same rows as that warp of the
// other.
struct GradientShared {
  Station station[2];
  uint64_t filled[2][4], returned[2][4];
};
static_assert(sizeof(GradientShared) <= 232448, "sm_90 gives a block 227 KiB");

// One row's queries and weights.
__device__ void LoadQueries(Station& st, const IndexerBackwardArgs& args, int64_t row, int thread) {
  const uint4* q = static_cast<const uint4*>(args.q_TIJ) + row * args.num_heads * 16;
#pragma unroll 4
  for (int i = 0; i < 16; ++i) {
    const int line = i % 8 * 8 + thread / 8, run = i / 8, chunk = thread % 8;
    const bool valid = line < args.num_heads;
    cuda::CopyAsync16(
        cuda::SharedAddress(st.q) + run * kRunBytes + cuda::SwizzledOffset(line, chunk),
        q + (valid ? line * 16 + run * 8 + chunk : 0), valid);
  }
  if (thread < kHeads / 4) {
    const bool valid = 4 * thread < args.num_heads;
    cuda::CopyAsync16(cuda::SharedAddress(st.w + 4 * thread),
                      args.w_TI + row * args.num_heads + (valid ? 4 * thread : 0), valid);
  }
  cuda::CopyAsyncArrive(&st.q_full);
}

// Producer: 64 threads. Ids come two tiles ahead, delta and exponent one, so that no tile waits for
// a chain of loads.
__device__ void Produce(Station& st, const Params& params, int64_t first_row, int64_t row_step,
                        int thread) {
  const IndexerBackwardArgs& args = params.args;
  const int tiles = params.num_tiles;
  const auto id_at = [&](int64_t row, int tile, int slot) {
    if (tile >= tiles) {
      row += row_step;
      tile -= tiles;
    }
    const int i = tile * kTileKeys + slot;
    return row < args.num_rows && i < args.topk ? __ldg(params.ids_TK + row * args.topk + i) : -1;
  };
  const auto delta_at = [&](int64_t row, int tile, int slot, int id) {
    return id >= 0 ? params.delta_TK[(row + (tile >= tiles ? row_step : 0)) * args.topk +
                                     (tile >= tiles ? tile - tiles : tile) * kTileKeys + slot]
                   : 0.0f;
  };
  int gather_ids[8], own_id, produced = 0, q_produced = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) gather_ids[i] = id_at(first_row, 0, i * 8 + thread / 8);
  own_id = id_at(first_row, 0, thread);
  float delta = delta_at(first_row, 0, thread, own_id);
  int exponent = own_id >= 0 ? __ldg(params.exponent_S + own_id) : 0;
  for (int64_t row = first_row; row < args.num_rows; row += row_step) {
    // q has one stage: it is asked for when as many keys are on their way as can be before it is
    // free.
    const int q_before = min(kKeyStages, tiles) - 1;
    for (int tile = 0; tile < tiles; ++tile, ++produced) {
      if (tile == q_before) {
        cuda::BarrierWait(&st.q_empty, (q_produced++ & 1) ^ 1);
        LoadQueries(st, args, row, thread);
      }
      // Ask for the next tile's ids before this tile's stage is free.
      int next_ids[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) next_ids[i] = id_at(row, tile + 1, i * 8 + thread / 8);
      const int next_own = id_at(row, tile + 1, thread);

      const int stage = produced % kKeyStages;
      cuda::BarrierWait(&st.key_empty[stage], (produced / kKeyStages & 1) ^ 1);
      const uint32_t keys = cuda::SharedAddress(st.keys[stage]);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const int line = i % 8 * 8 + thread / 8, run = i / 8, chunk = thread % 8;
        const int id = gather_ids[i % 8];
        cuda::CopyAsync16(keys + run * kRunBytes + cuda::SwizzledOffset(line, chunk),
                          static_cast<const uint4*>(args.k_SJ) +
                              static_cast<int64_t>(max(id, 0)) * 16 + run * 8 + chunk,
                          id >= 0);
      }
      cuda::CopyAsyncArrive(&st.key_full[stage]);
      st.ids[stage][thread] = own_id;
      st.deltas[stage][thread] = delta;
      st.factors[stage][thread] = delta * PowerOfTwo(exponent);
      cuda::BarrierArrive(&st.key_full[stage]);

      own_id = next_own;
      delta = delta_at(row, tile + 1, thread, own_id);
      exponent = own_id >= 0 ? __ldg(params.exponent_S + own_id) : 0;
#pragma unroll
      for (int i = 0; i < 8; ++i) gather_ids[i] = next_ids[i];
    }
  }
}

// Halfwords of ones where the value is positive.
__device__ __forceinline__ uint32_t PositiveMask(float low, float high) {
  return (low > 0 ? 0x0000ffffu : 0u) | (high > 0 ? 0xffff0000u : 0u);
}

// Rows of dK, times their factors, as integers into the staging rows: stored, or added to what is
// there.
template <bool kAdd>
__device__ __forceinline__ void StageRows(uint8_t* staged, const float (&dk)[64], float factor_low,
                                          float factor_high, int row, int column) {
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float factor = r == 0 ? factor_low : factor_high;
      int2* place = reinterpret_cast<int2*>(staged + (row + 8 * r) * kStagedRowBytes +
                                            (8 * j + 2 * column) * 4);
      int2 x = make_int2(__float2int_rn(dk[4 * j + 2 * r] * factor),
                         __float2int_rn(dk[4 * j + 2 * r + 1] * factor));
      if constexpr (kAdd) {
        const int2 other = *place;
        x.x += other.x;
        x.y += other.y;
      }
      *place = x;
    }
  }
}

// Adds the rows that this warp's lanes 0..15 name to the sums of dk. All lanes have written
// `staged`.
__device__ __forceinline__ void ReduceRows(const Params& params, uint8_t* staged, int id) {
  cuda::FenceProxyAsync();
  __syncwarp();
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * kStagedWarpRows + lane;
  if (lane < kStagedWarpRows && id >= 0) {
    BulkAddS32(params.sum_SJ + static_cast<int64_t>(id) * kDim,
               cuda::SharedAddress(staged + row * kStagedRowBytes), kDim * sizeof(int));
  }
  cuda::BulkCommit();
}

// Who may write which staging rows, as seen by one warp of a consumer.
struct StagingTurns {
  unsigned filled_parity = 0, returned_parity = 0;  // of the next wait; one bit a station
  bool lent = false;                                // consumer 0: its own rows are with consumer 1
  int owed = -1;  // consumer 1: station whose rows it has to hand back to consumer 0
};

// Consumer 1, when its reductions have read their rows: hands back what it owes.
__device__ __forceinline__ void HandBack(GradientShared& sh, StagingTurns& turns) {
  cuda::BulkWaitRead<0>();
  __syncwarp();
  if (turns.owed >= 0 && threadIdx.x % 32 == 0) {
    cuda::BarrierArrive(&sh.returned[turns.owed][threadIdx.x % 128 / 32]);
  }
  turns.owed = -1;
}

__device__ __forceinline__ void WaitReturned(GradientShared& sh, StagingTurns& turns, int station) {
  cuda::BarrierWait(&sh.returned[station][threadIdx.x % 128 / 32],
                    turns.returned_parity >> station & 1);
  turns.returned_parity ^= 1u << station;
}

// A tile's dK, as integers, into the sums: through the own staging rows, or together with the other
// consumer's.
__device__ __forceinline__ void AddTile(GradientShared& sh, const Params& params,
                                        StagingTurns& turns, int warpgroup, int tile,
                                        int joint_tiles, const float (&dk)[64], float factor_low,
                                        float factor_high, int line, int column, int id) {
  const int warp = threadIdx.x % 128 / 32, station = tile % 2;
  uint8_t* own = sh.station[warpgroup].staged;
  uint8_t* shared = sh.station[station].staged;
  if (warpgroup == 0) {
    cuda::BulkWaitRead<0>();
    __syncwarp();
    if (tile < joint_tiles) {
      if (station == 1 || turns.lent) WaitReturned(sh, turns, station);
      StageRows<false>(shared, dk, factor_low, factor_high, line, column);
      __syncwarp();
      if (threadIdx.x % 32 == 0) cuda::BarrierArrive(&sh.filled[station][warp]);
      if (station == 0) turns.lent = true;
    } else {
      if (turns.lent) WaitReturned(sh, turns, 0);
      turns.lent = false;
      StageRows<false>(own, dk, factor_low, factor_high, line, column);
      ReduceRows(params, own, id);
    }
  } else {
    HandBack(sh, turns);
    if (tile < joint_tiles) {
      cuda::BarrierWait(&sh.filled[station][warp], turns.filled_parity >> station & 1);
      turns.filled_parity ^= 1u << station;
      StageRows<true>(shared, dk, factor_low, factor_high, line, column);
      ReduceRows(params, shared, id);
      // Consumer 0's own rows always go back; consumer 1's are lent again only for another shared
      // tile of this row.
      if (station == 0 || tile + 2 < joint_tiles) turns.owed = station;
    } else {
      StageRows<false>(own, dk, factor_low, factor_high, line, column);
      ReduceRows(params, own, id);
    }
  }
}

// dq = g w dQ and dw = g q . dQ of one row of queries; a thread has heads `head` and head + 8.
__device__ __forceinline__ void WriteQueryGradients(const Station& st,
                                                    const IndexerBackwardArgs& args,
                                                    const float (&dq)[64], int64_t row, int head,
                                                    int column) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int h = head + 8 * r;
    const float scale = args.grad_scale * st.w[h];
    uint32_t* out =
        static_cast<uint32_t*>(args.dq_TIJ) + (row * args.num_heads + h) * (kDim / 2) + column;
    float dw = 0;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float x = dq[4 * j + 2 * r], y = dq[4 * j + 2 * r + 1];
      const float2 q = UnpackBf16(*reinterpret_cast<const uint32_t*>(
          st.q + j / 8 * kRunBytes + cuda::SwizzledOffset(h, j % 8) + 4 * column));
      dw = fmaf(q.x, x, fmaf(q.y, y, dw));
      if (h < args.num_heads) out[4 * j] = cuda::PackBf16(scale * x, scale * y);
    }
    dw += __shfl_xor_sync(kAllLanes, dw, 1);
    dw += __shfl_xor_sync(kAllLanes, dw, 2);
    if (column == 0 && h < args.num_heads)
      args.dw_TI[row * args.num_heads + h] = args.grad_scale * dw;
  }
}

// Issues A = K q^T.
__device__ __forceinline__ void MultiplyScores(float (&a)[32], uint32_t keys, uint32_t q) {
  cuda::WgmmaFence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const uint32_t offset = step / 4 * kRunBytes + step % 4 * 32;
    cuda::WgmmaBf16<kHeads, false, false>::Shared(a, cuda::DescriptorKMajor(keys + offset),
                                                  cuda::DescriptorKMajor(q + offset), step > 0);
  }
  cuda::WgmmaCommit();
}

__device__ void Consume(GradientShared& sh, const Params& params, int64_t first_row,
                        int64_t row_step, int warpgroup) {
  Station& st = sh.station[warpgroup];
  const IndexerBackwardArgs& args = params.args;
  const int thread = threadIdx.x % 128, lane = thread % 32, column = lane % 4;
  const int line = thread / 32 * 16 + lane / 4;  // this thread's accumulator rows: line, line + 8
  const uint32_t marks = cuda::SharedAddress(st.marks), q = cuda::SharedAddress(st.q);
  StagingTurns turns;
  int consumed = 0, q_consumed = 0;
  for (int64_t row = first_row; row < args.num_rows; row += row_step, ++q_consumed) {
    const int joint_tiles = params.joint_tiles[row / 2];
    if (warpgroup == 1 && joint_tiles > 1) {
      // Lend consumer 0 the own rows for the first odd shared tile.
      HandBack(sh, turns);
      if (lane == 0) cuda::BarrierArrive(&sh.returned[1][thread / 32]);
    }
    cuda::BarrierWait(&st.q_full, q_consumed & 1);
    cuda::FenceProxyAsync();
    uint32_t weights[8];  // bf16 pairs of heads 8 j + 2 column
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      weights[j] = cuda::PackBf16(st.w[8 * j + 2 * column], st.w[8 * j + 2 * column + 1]);
    }
    float dq[64], a[32];
    cuda::BarrierWait(&st.key_full[consumed % kKeyStages], consumed / kKeyStages & 1);
    cuda::FenceProxyAsync();
    MultiplyScores(a, cuda::SharedAddress(st.keys[consumed % kKeyStages]), q);
    cuda::WgmmaWait<0>();
    cuda::PinRegisters(a);
    for (int tile = 0; tile < params.num_tiles; ++tile, ++consumed) {
      const int stage = consumed % kKeyStages;
      const uint32_t keys = cuda::SharedAddress(st.keys[stage]);
      const uint32_t delta_low = cuda::PackBf16(st.deltas[stage][line], st.deltas[stage][line]);
      const uint32_t delta_high =
          cuda::PackBf16(st.deltas[stage][line + 8], st.deltas[stage][line + 8]);
      const float factor_low = st.factors[stage][line], factor_high = st.factors[stage][line + 8];
      const int id = st.ids[stage][thread / 32 * kStagedWarpRows + lane % kStagedWarpRows];

      // The mask, with the weights in registers and with delta in shared memory.
      uint32_t operand[4][4];
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        uint32_t mark[4];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int j = 2 * step + half;
          const uint32_t low = PositiveMask(a[4 * j], a[4 * j + 1]),
                         high = PositiveMask(a[4 * j + 2], a[4 * j + 3]);
          operand[step][2 * half] = low & weights[j];
          operand[step][2 * half + 1] = high & weights[j];
          mark[2 * half] = low & delta_low;
          mark[2 * half + 1] = high & delta_high;
        }
        // Lane l addresses row l % 8 of matrix l / 8: matrices 1 and 3 are 8 keys further, 2 and 3
        // 8 heads.
        const int key = thread / 32 * 16 + lane % 16, chunk = 2 * step + lane / 16;
        cuda::StoreMatrix4(marks + cuda::SwizzledOffset(key, chunk), mark[0], mark[1], mark[2],
                           mark[3]);
      }
      cuda::FenceProxyAsync();
      cuda::NamedSync(1 + warpgroup, 128);

      // dK = (mask w) q, dQ += marks^T K.
      float dk[64];
      cuda::WgmmaFence();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        cuda::WgmmaBf16<kDim, false, true>::Registers(
            dk, operand[step], cuda::DescriptorMnMajor(q + step * 2048, kRunBytes), step > 0);
      }
      cuda::WgmmaCommit();
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        cuda::WgmmaBf16<kDim, true, true>::Shared(
            dq, cuda::DescriptorMnMajor(marks + step * 2048, kRunBytes),
            cuda::DescriptorMnMajor(keys + step * 2048, kRunBytes), tile > 0 || step > 0);
      }
      cuda::WgmmaCommit();
      // The next tile's A runs beside the staging of this one; after the last tile it is computed
      // again, unused.
      uint32_t next_keys = keys;
      if (tile + 1 < params.num_tiles) {
        const int next = consumed + 1;
        cuda::BarrierWait(&st.key_full[next % kKeyStages], next / kKeyStages & 1);
        cuda::FenceProxyAsync();
        next_keys = cuda::SharedAddress(st.keys[next % kKeyStages]);
      }
      MultiplyScores(a, next_keys, q);
      cuda::WgmmaWait<2>();
      cuda::PinRegisters(dk);
      AddTile(sh, params, turns, warpgroup, tile, joint_tiles, dk, factor_low, factor_high, line,
              column, id);
      cuda::WgmmaWait<0>();
      cuda::PinRegisters(dq);
      cuda::PinRegisters(a);
      cuda::BarrierArrive(&st.key_empty[stage]);
      cuda::NamedSync(1 + warpgroup, 128);  // every warp's products have read the marks
    }
    WriteQueryGradients(st, args, dq, row, line, column);
    cuda::BarrierArrive(&st.q_empty);
  }
  HandBack(sh, turns);
  cuda::BulkWait<0>();
}

__global__ void __launch_bounds__(kGradientThreads, 1) GradientKernel(const Params params) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  GradientShared& sh = *reinterpret_cast<GradientShared*>(raw_shared);
  if (threadIdx.x == 0) {
    for (Station& st : sh.station) {
      cuda::BarrierInit(&st.q_full, 64);
      cuda::BarrierInit(&st.q_empty, 128);
      for (int i = 0; i < kKeyStages; ++i) {
        cuda::BarrierInit(&st.key_full[i], 128);  // each producer thread twice: copies, stores
        cuda::BarrierInit(&st.key_empty[i], 128);
      }
    }
    for (int i = 0; i < 2; ++i) {
      for (int warp = 0; warp < 4; ++warp) {
        cuda::BarrierInit(&sh.filled[i][warp], 1);
        cuda::BarrierInit(&sh.returned[i][warp], 1);
      }
    }
    cuda::FenceBarrierInit();
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  const int64_t row_step = 2 * gridDim.x;
  if (warpgroup == 2) {
    cuda::LowerRegisters<64>();
    const int half = threadIdx.x % 128 / 64;
    Produce(sh.station[half], params, 2 * blockIdx.x + half, row_step, threadIdx.x % 64);
  } else {
    cuda::RaiseRegisters<216>();
    Consume(sh, params, 2 * blockIdx.x + warpgroup, row_step, warpgroup);
  }
}

}  // namespace baleen::indexer_backward
