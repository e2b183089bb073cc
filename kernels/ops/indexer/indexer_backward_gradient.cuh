// Indexer backward, kernel 5: dq, dw and the integer sums of dk. See indexer_backward_cuda.cu for
// who does what.
#pragma once

#include "kernels/ops/indexer/indexer_backward_params.cuh"

namespace baleen::indexer_backward {

__device__ __forceinline__ void BulkAddS32(int* global, uint32_t shared, uint32_t bytes) {
  asm volatile(
      "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.s32 [%0], [%1], %2;" ::"l"(global),
      "r"(shared), "r"(bytes)
      : "memory");
}

constexpr int kKeyStages = 3;
constexpr int kConsumerColumns = kDim / 2;
constexpr int kStagedRowBytes = 4 * kConsumerColumns + 32;  // padded against bank conflicts
constexpr int kStagedWarpRows = 16;  // a warp stages, and has reduced, 16 rows of its own
constexpr int kGradientThreads = 384;
constexpr int kConsumerRows = kGroupRows / 2;

// What a tile's slots are, beside their keys.
struct TileSlots {
  int ids[kTileKeys];                      // -1: none
  uint32_t deltas[kGroupRows][kTileKeys];  // bf16, twice
  int sets[2];                             // rows that the first and the other 32 slots have
  float scales[kTileKeys];                 // 2^exponent
};

struct GradientShared {
  // Of each consumer's two rows: [run][row][64 heads][128 bytes], so that they are one operand.
  uint8_t q[2][2][kConsumerRows][kRunBytes];
  uint8_t keys[kKeyStages][kTileBytes];
  uint8_t marks[kGroupRows][kRunBytes];  // [64 keys, 64 heads]: delta w 1[A > 0], bf16
  uint8_t staged[2][kTileKeys * kStagedRowBytes];
  float w[kGroupRows][kHeads];
  // bf16 pairs of the weights as used: [c][j] has heads 8 j + 2 c, + 1.
  uint32_t used_w[kGroupRows][4][8];
  TileSlots slots[kKeyStages];
  uint64_t q_full, q_empty, key_full[kKeyStages], key_empty[kKeyStages];
};
static_assert(sizeof(GradientShared) <= 232448, "sm_90 gives a block 227 KiB");

// Named barriers: all marks are written; the other consumer's products have read those of consumer
// c (kMarksRead + c).
enum NamedBarriers { kMarks = 1, kMarksRead = 2 };

// --- Producer: 128 threads -----------------------------------------------------------------------

// The queries and weights of a group. Warp r prepares the weights of row r.
__device__ void LoadQueries(GradientShared& sh, const IndexerBackwardArgs& args, int64_t first_row,
                            int thread) {
  const uint4* q = static_cast<const uint4*>(args.q_TIJ) + first_row * args.num_heads * 16;
#pragma unroll 4
  for (int i = 0; i < kGroupRows * 8; ++i) {
    const int r = i / 8, line = i % 4 * 16 + thread / 8, run = i / 4 % 2, chunk = thread % 8;
    const bool valid = first_row + r < args.num_rows && line < args.num_heads;
    cuda::CopyAsync16(
        cuda::SharedAddress(sh.q[r / 2][run][r % 2]) + cuda::SwizzledOffset(line, chunk),
        q + (valid ? (r * args.num_heads + line) * 16 + run * 8 + chunk : 0), valid);
  }
  cuda::CopyAsyncArrive(&sh.q_full);
  const int r = thread / 32, lane = thread % 32;
  if (first_row + r < args.num_rows) {
    const float* w = args.w_TI + (first_row + r) * args.num_heads;
    const float smallest = SmallestWeight(LargestWeight(w, args.num_heads));
    float2 pair = make_float2(0, 0);  // heads 2 lane, + 1
    if (2 * lane < args.num_heads) pair = __ldg(reinterpret_cast<const float2*>(w) + lane);
    *reinterpret_cast<float2*>(&sh.w[r][2 * lane]) = pair;
    sh.used_w[r][lane % 4][lane / 4] =
        cuda::PackBf16(UsedWeight(pair.x, smallest), UsedWeight(pair.y, smallest));
  }
  cuda::BarrierArrive(&sh.q_full);
}

// Asks L2 for the queries of a group to come.
__device__ void PrefetchQueries(const IndexerBackwardArgs& args, int64_t first_row, int thread) {
  const char* q = static_cast<const char*>(args.q_TIJ);
  const int64_t row_bytes = int64_t{args.num_heads} * kDim * 2;
  const int64_t begin = first_row * row_bytes;
  const int64_t end = min((first_row + kGroupRows) * row_bytes, args.num_rows * row_bytes);
  for (int64_t at = begin + thread * 128; at < end; at += 128 * 128) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(q + at));
  }
}

// A place in this block's sequence of tiles.
struct Cursor {
  int64_t group;
  int tile, num_tiles;  // of the group; 0 tiles: past the last group
  int first_delta;      // lane l: of set l

  __device__ void Open(const Params& params, int64_t g) {
    group = g;
    tile = 0;
    const bool valid = g < params.num_groups;
    num_tiles = valid ? __ldg(&params.groups[g].num_tiles) : 0;
    first_delta = valid ? __ldg(&params.groups[g].first_delta[threadIdx.x % 16]) : 0;
  }
  __device__ void Advance(const Params& params) {
    if (++tile >= num_tiles && num_tiles > 0) Open(params, group + gridDim.x);
  }
  __device__ int Slot(const Params& params, int slot) const {
    return num_tiles > 0 ? __ldg(params.slots + group * params.num_slots + tile * kTileKeys + slot)
                         : 0;
  }
};

// Slots come a tile ahead of their copies, deltas and exponents just before the stage is waited
// for, so that no tile waits for a chain of loads.
__device__ void Produce(GradientShared& sh, const Params& params) {
  const IndexerBackwardArgs& args = params.args;
  const int thread = threadIdx.x % 128, own = thread % kTileKeys;
  const int first_of_rows = thread / kTileKeys * 2;  // rows whose deltas this thread brings
  Cursor cursor;
  cursor.Open(params, blockIdx.x);
  int gather[4], slot = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) gather[i] = cursor.Slot(params, i * 16 + thread / 8);
  slot = cursor.Slot(params, own);
  int produced = 0, groups = 0;
  while (cursor.num_tiles > 0) {
    // q has one stage: it is asked for when as many keys are on their way as can be before it is
    // free.
    if (cursor.tile == min(kKeyStages, cursor.num_tiles) - 1) {
      cuda::BarrierWait(&sh.q_empty, (groups++ & 1) ^ 1);
      LoadQueries(sh, args, cursor.group * kGroupRows, thread);
      PrefetchQueries(args, (cursor.group + gridDim.x) * kGroupRows, thread);
    }
    const int set = static_cast<unsigned>(slot) >> kSetShift, id = slot & kKeyMask;
    const int first = __shfl_sync(kAllLanes, cursor.first_delta, set) +
                      (cursor.tile * kTileKeys + own) * __popc(set);
    const float* deltas = params.deltas + cursor.group * (int64_t{args.topk} * kGroupRows) + first;
    float delta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int r = first_of_rows + i;
      delta[i] = set >> r & 1 ? __ldg(deltas + __popc(set & ((1 << r) - 1))) : 0.0f;
    }
    const int exponent = set != 0 ? __ldg(params.exponent_S + id) : 0;

    const int sets = __reduce_or_sync(kAllLanes, set);

    const int stage = produced % kKeyStages;
    Cursor next = cursor;
    next.Advance(params);
    int next_gather[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) next_gather[i] = next.Slot(params, i * 16 + thread / 8);
    const int next_slot = next.Slot(params, own);

    cuda::BarrierWait(&sh.key_empty[stage], (produced / kKeyStages & 1) ^ 1);
    const uint32_t keys = cuda::SharedAddress(sh.keys[stage]);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const int line = i % 4 * 16 + thread / 8, run = i / 4, chunk = thread % 8;
      const int word = gather[i % 4];
      cuda::CopyAsync16(keys + run * kRunBytes + cuda::SwizzledOffset(line, chunk),
                        static_cast<const uint4*>(args.k_SJ) +
                            static_cast<int64_t>(word & kKeyMask) * 16 + run * 8 + chunk,
                        word != 0);
    }
    cuda::CopyAsyncArrive(&sh.key_full[stage]);
    TileSlots& out = sh.slots[stage];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      out.deltas[first_of_rows + i][own] = cuda::PackBf16(delta[i], delta[i]);
    if (thread < kTileKeys) {
      out.ids[own] = set != 0 ? id : -1;
      out.scales[own] = PowerOfTwo(exponent);
      if (own % 32 == 0) out.sets[own / 32] = sets;
    }
    cuda::BarrierArrive(&sh.key_full[stage]);

    ++produced;
    cursor = next;
    slot = next_slot;
#pragma unroll
    for (int i = 0; i < 4; ++i) gather[i] = next_gather[i];
  }
}

// --- Consumers -----------------------------------------------------------------------------------

// Hides where an address comes from: else the descriptors of all steps are kept in registers across
// the loop, and others spill.
__device__ __forceinline__ uint32_t Opaque(uint32_t address) {
  asm volatile("" : "+r"(address));
  return address;
}

// Issues A = K q^T of two rows.
__device__ __forceinline__ void MultiplyScores(float (&a)[64], uint32_t keys, uint32_t q) {
  cuda::WgmmaFence();
#pragma unroll
  for (int step = 0; step < 8; ++step) {
    const int run = step / 4, offset = step % 4 * 32;
    cuda::WgmmaBf16<2 * kHeads, false, false>::Shared(
        a, cuda::DescriptorKMajor(keys + run * kRunBytes + offset),
        cuda::DescriptorKMajor(q + run * kTileBytes + offset), step > 0);
  }
  cuda::WgmmaCommit();
}

// Of a pair of products: bf16 `pair` where they are positive, 0 elsewhere.
__device__ __forceinline__ uint32_t WherePositive(float low, float high, uint32_t pair) {
  const __nv_bfloat162 rounded = __floats2bfloat162_rn(low, high);  // keeps the sign
  return __hgt2_mask(rounded, __float2bfloat162_rn(0.0f)) & pair;
}

__device__ __forceinline__ uint32_t Multiply2(uint32_t a, uint32_t b) {
  const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(a),
                                         reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const uint32_t&>(product);
}

// marks = delta w 1[A > 0] of one row.
__device__ __forceinline__ void WriteMarks(GradientShared& sh, const TileSlots& slots, int r,
                                           const float* a, int line) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const uint32_t marks = cuda::SharedAddress(sh.marks[r]);
  const uint32_t delta_low = slots.deltas[r][line], delta_high = slots.deltas[r][line + 8];
  const uint4* weights = reinterpret_cast<const uint4*>(sh.used_w[r][lane % 4]);
  const uint4 first = weights[0], second = weights[1];
  const uint32_t w[8] = {first.x,  first.y,  first.z,  first.w,
                         second.x, second.y, second.z, second.w};
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    uint32_t mark[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int j = 2 * step + half;
      mark[2 * half] = WherePositive(a[4 * j], a[4 * j + 1], Multiply2(delta_low, w[j]));
      mark[2 * half + 1] = WherePositive(a[4 * j + 2], a[4 * j + 3], Multiply2(delta_high, w[j]));
    }
    // Lane l addresses row l % 8 of matrix l / 8: matrices 1 and 3 are 8 keys further, 2 and 3 8
    // heads.
    const int key = warp * 16 + lane % 16, chunk = 2 * step + lane / 16;
    cuda::StoreMatrix4(marks + cuda::SwizzledOffset(key, chunk), mark[0], mark[1], mark[2],
                       mark[3]);
  }
}

// This consumer's columns of a tile's dK, times its scales, as integers into its staging rows.
__device__ __forceinline__ void StageRows(uint8_t* staged, const float (&dk)[32], float scale_low,
                                          float scale_high, int line, int column) {
  cuda::BulkWaitRead<0>();
  __syncwarp();
#pragma unroll
  for (int j = 0; j < 8; ++j) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float scale = r == 0 ? scale_low : scale_high;
      *reinterpret_cast<int2*>(staged + (line + 8 * r) * kStagedRowBytes +
                               (8 * j + 2 * column) * 4) =
          make_int2(__float2int_rn(dk[4 * j + 2 * r] * scale),
                    __float2int_rn(dk[4 * j + 2 * r + 1] * scale));
    }
  }
  cuda::FenceProxyAsync();
  __syncwarp();
}

// Adds the rows that this warp's lanes 0..15 name to the sums. One at a time: a lane's address has
// to come to the whole warp.
__device__ __forceinline__ void ReduceRows(uint8_t* staged, int* sums, int id) {
  const int lane = threadIdx.x % 32, row = threadIdx.x % 128 / 32 * kStagedWarpRows + lane;
  if (lane < kStagedWarpRows && id >= 0) {
    BulkAddS32(sums + static_cast<int64_t>(id) * kDim,
               cuda::SharedAddress(staged + row * kStagedRowBytes), kConsumerColumns * sizeof(int));
  }
  cuda::BulkCommit();
}

// dq = g w dQ and dw = g q . dQ of one row, where `dq` has w dQ with the weights as used; a thread
// has heads `head` and head + 8.
__device__ __forceinline__ void WriteQueryGradients(const GradientShared& sh,
                                                    const IndexerBackwardArgs& args,
                                                    const float (&dq)[64], int r, int64_t row,
                                                    int head, int column) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int h = head + 8 * i;
    const float2 used = UnpackBf16(sh.used_w[r][h % 8 / 2][h / 8]);
    const float scale_dw = args.grad_scale / (h % 2 ? used.y : used.x);
    const float scale_dq = scale_dw * sh.w[r][h];
    uint32_t* out =
        static_cast<uint32_t*>(args.dq_TIJ) + (row * args.num_heads + h) * (kDim / 2) + column;
    float dw = 0;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float x = dq[4 * j + 2 * i], y = dq[4 * j + 2 * i + 1];
      const float2 q = UnpackBf16(*reinterpret_cast<const uint32_t*>(
          sh.q[r / 2][j / 8][r % 2] + cuda::SwizzledOffset(h, j % 8) + 4 * column));
      dw = fmaf(q.x, x, fmaf(q.y, y, dw));
      if (h < args.num_heads) out[4 * j] = cuda::PackBf16(scale_dq * x, scale_dq * y);
    }
    dw += __shfl_xor_sync(kAllLanes, dw, 1);
    dw += __shfl_xor_sync(kAllLanes, dw, 2);
    if (column == 0 && h < args.num_heads) args.dw_TI[row * args.num_heads + h] = scale_dw * dw;
  }
}

// Consumer c has A, marks and dQ of rows 2 c and 2 c + 1 of each group, and columns 64 c .. of dK
// of all four. No product depends on a condition: the compiler would wait for each by itself. Where
// a row has no slots in a tile its deltas, and so its marks, are 0.
__device__ void Consume(GradientShared& sh, const Params& params, int consumer) {
  const IndexerBackwardArgs& args = params.args;
  const int thread = threadIdx.x % 128, lane = thread % 32, column = lane % 4;
  const int line = thread / 32 * 16 + lane / 4;  // this thread's accumulator rows: line, line + 8
  const int first_own = consumer * kConsumerRows, other = consumer ^ 1;
  const uint32_t all_q = cuda::SharedAddress(sh.q), all_marks = cuda::SharedAddress(sh.marks);
  uint8_t* staged = sh.staged[consumer];
  int* sums = params.sum_SJ + consumer * kConsumerColumns;
  int consumed = 0, groups = 0;

  float dq[2][64], a[64];
  // Waits for the keys of tile `consumed` and issues A.
  const auto open_tile = [&] {
    const int stage = consumed % kKeyStages;
    cuda::BarrierWait(&sh.key_full[stage], consumed / kKeyStages & 1);
    cuda::FenceProxyAsync();
    MultiplyScores(a, Opaque(cuda::SharedAddress(sh.keys[stage])),
                   Opaque(all_q) + consumer * 2 * kTileBytes);
  };

  for (int64_t group = blockIdx.x; group < params.num_groups; group += gridDim.x, ++groups) {
    const int num_tiles = __ldg(&params.groups[group].num_tiles);
    cuda::BarrierWait(&sh.q_full, groups & 1);
    cuda::FenceProxyAsync();
    open_tile();
#pragma unroll
    for (int i = 0; i < 64; ++i) dq[0][i] = dq[1][i] = 0;
    for (int tile = 0;;) {
      const int stage = consumed % kKeyStages;
      const TileSlots& slots = sh.slots[stage];

      cuda::WgmmaWait<0>();  // A of this tile and dQ of the one before
      cuda::PinRegisters(a);
      cuda::PinRegisters(dq[0]);
      cuda::PinRegisters(dq[1]);
      if (tile > 0 && lane == 0)
        cuda::BarrierArrive(&sh.key_empty[(consumed + kKeyStages - 1) % kKeyStages]);
      if (consumed > 0) cuda::NamedSync(kMarksRead + consumer, 256);
      const int set = __reduce_or_sync(kAllLanes, slots.sets[0] | slots.sets[1]);
      if (set >> first_own & 1) WriteMarks(sh, slots, first_own, a, line);
      if (set >> first_own & 2) WriteMarks(sh, slots, first_own + 1, a + 32, line);
      const float scale_low = slots.scales[line], scale_high = slots.scales[line + 8];
      const int id = slots.ids[thread / 32 * kStagedWarpRows + lane % kStagedWarpRows];
      cuda::FenceProxyAsync();
      cuda::NamedSync(kMarks, 256);

      const uint32_t keys = Opaque(cuda::SharedAddress(sh.keys[stage]));
      const uint32_t q = Opaque(all_q), marks = Opaque(all_marks);
      float dk[32];
#pragma unroll
      for (int i = 0; i < 32; ++i) dk[i] = 0;
      cuda::WgmmaFence();
      // Of the rows that have slots in the tile.
      for (int rest = set; rest != 0; rest &= rest - 1) {
        const int r = __ffs(rest) - 1;
        const uint32_t row_marks = marks + r * kRunBytes;
        const uint32_t row_q = q + (r / 2 * 2 + consumer) * kTileBytes + r % 2 * kRunBytes;
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          cuda::WgmmaBf16<kConsumerColumns, false, true>::Shared(
              dk, cuda::DescriptorKMajor(row_marks + step * 32),
              cuda::DescriptorMnMajor(row_q + step * 2048, kTileBytes), true);
        }
      }
      cuda::WgmmaCommit();
#pragma unroll
      for (int i = 0; i < kConsumerRows; ++i) {
        if (!(set >> (first_own + i) & 1)) continue;
        cuda::WgmmaFence();
#pragma unroll
        for (int step = 0; step < 4; ++step) {
          cuda::WgmmaBf16<kDim, true, true>::Shared(
              dq[i],
              cuda::DescriptorMnMajor(marks + (first_own + i) * kRunBytes + step * 2048, kRunBytes),
              cuda::DescriptorMnMajor(keys + step * 2048, kRunBytes), true);
        }
      }
      cuda::WgmmaCommit();
      cuda::WgmmaWait<1>();
      cuda::PinRegisters(dk);
      cuda::NamedArrive(kMarksRead + other, 256);
      StageRows(staged, dk, scale_low, scale_high, line, column);
      ++consumed;
      const bool more = ++tile < num_tiles;
      if (!more) {
        ReduceRows(staged, sums, id);
        break;
      }
      open_tile();
      ReduceRows(staged, sums, id);
    }
    cuda::WgmmaWait<0>();
    cuda::PinRegisters(dq[0]);
    cuda::PinRegisters(dq[1]);
    if (lane == 0) cuda::BarrierArrive(&sh.key_empty[(consumed + kKeyStages - 1) % kKeyStages]);
#pragma unroll
    for (int i = 0; i < kConsumerRows; ++i) {
      const int64_t row = group * kGroupRows + first_own + i;
      if (row < args.num_rows)
        WriteQueryGradients(sh, args, dq[i], first_own + i, row, line, column);
    }
    cuda::BarrierArrive(&sh.q_empty);
  }
  if (consumed > 0) cuda::NamedSync(kMarksRead + consumer, 256);  // the other's last arrival
  cuda::BulkWait<0>();
}

__global__ void __launch_bounds__(kGradientThreads, 1) GradientKernel(const Params params) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  GradientShared& sh = *reinterpret_cast<GradientShared*>(raw_shared);
  if (threadIdx.x == 0) {
    // Each producer thread arrives twice: for its copies and for its stores.
    cuda::BarrierInit(&sh.q_full, 256);
    cuda::BarrierInit(&sh.q_empty, 256);
    for (int i = 0; i < kKeyStages; ++i) {
      cuda::BarrierInit(&sh.key_full[i], 256);
      cuda::BarrierInit(&sh.key_empty[i], 8);  // one lane of each consumer warp
    }
    cuda::FenceBarrierInit();
  }
  __syncthreads();
  const int warpgroup = __reduce_max_sync(kAllLanes, threadIdx.x / 128);
  if (warpgroup == 2) {
    cuda::LowerRegisters<56>();
    Produce(sh, params);
  } else {
    cuda::RaiseRegisters<224>();
    Consume(sh, params, warpgroup);
  }
}

}  // namespace baleen::indexer_backward
