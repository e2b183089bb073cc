// Dense indexer loss, kernels 4 to 8: gradients from masks and delta. See
// dense_indexer_loss_cuda.cu for who does what.
//
// Both gradients are products whose A has the elements mask & delta, formed in registers from the
// stored bits, and whose B is a [64, 128] tile from the copy engine:
//   dq of a row    [64 heads, 128] = sum over key tiles of (mask & delta)^T [64, 64 keys] k
//   dk of a tile   [64 keys, 128]  = sum over rows of (mask & delta w) [64, 64 heads] q
// A block has four such results, two for each consumer warpgroup (64 registers each); a stage of
// its ring is one B, with the bits and deltas of all four. A consumer forms the A of one result
// while the products of the other run; earlier it must not: those before may still read the
// registers.
#pragma once

#include "kernels/ops/indexer/dense_indexer_loss_params.cuh"

namespace baleen::dense_indexer_loss {

constexpr int kGradientStages = 11;
constexpr int kResults = 4;

struct alignas(128) GradientStage {
  uint32_t masks[kResults][kMaskWords];
  __nv_bfloat16 deltas[kResults][kTileKeys];
  uint32_t w[kHeads / 2];  // key gradient only: the row's weights, as in w_TX
  uint32_t touched;        // key gradient only: bit i = the row's window touches key tile i
};

struct GradientShared {
  uint8_t b[kGradientStages][kTileBytes];
  GradientStage stages[kGradientStages];
  uint64_t full[kGradientStages], empty[kGradientStages];
};
constexpr int kGradientSharedBytes = static_cast<int>(sizeof(GradientShared));
static_assert(kGradientSharedBytes <= 232448, "sm_90 gives a block 227 KiB");

__device__ __forceinline__ void InitGradientBarriers(GradientShared& sh) {
  if (threadIdx.x == 0) {
    for (int i = 0; i < kGradientStages; ++i) {
      cuda::BarrierInit(&sh.full[i], 1);
      cuda::BarrierInit(&sh.empty[i], 8);  // the consumer warps
    }
    cuda::FenceBarrierInit();
  }
  __syncthreads();
}

// The top bits of two bytes of x as a mask for two bf16: kSelector has 8 + byte twice for each
// half.
template <uint32_t kSelector>
__device__ __forceinline__ uint32_t SpreadSigns(uint32_t x) {
  uint32_t y;  // __byte_perm knows no sign selectors
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(y) : "r"(x), "n"(kSelector));
  return y;
}

// An 8 x 8 tile of 16-bit elements that the warp holds in accumulator layout, transposed.
__device__ __forceinline__ uint32_t Transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

__device__ __forceinline__ uint32_t MultiplyPair(uint32_t x, uint32_t y) {
  const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(x),
                                         reinterpret_cast<const __nv_bfloat162&>(y));
  return reinterpret_cast<const uint32_t&>(product);
}

// (mask & delta)^T of one row and key tile as A of 4 steps of 16 keys: this warp's 16 heads. The
// masks are transposed as bits: an element of the transposed 8 x 8 tile carries one bit of each of
// the 16 tiles (4 steps, 2 halves of keys, 2 halves of heads).
__device__ __forceinline__ void FormQueryOperand(const GradientStage& stage, int result,
                                                 uint32_t (&a)[4][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  const uint4* from = reinterpret_cast<const uint4*>(&stage.deltas[result][lane % 4 * 16]);
  const uint4 first = from[0], second = from[1];
  const uint32_t pairs[4][2] = {
      {first.x, first.y}, {first.z, first.w}, {second.x, second.y}, {second.z, second.w}};
  // Byte 2 r + e, bits 7 - 2 step and 6 - 2 step: heads 16 warp + 2 (lane % 4) + e and + 8.
  uint32_t bits = 0;
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    const uint32_t word = stage.masks[result][32 * step + lane] << (2 * warp);
    bits |= (word & 0xC0C0C0C0u) >> (2 * step);
  }
  bits = Transpose(__byte_perm(bits, 0, 0x3120));  // elements: e; now byte 2 e + r
#pragma unroll
  for (int step = 0; step < 4; ++step) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t shifted = bits << (2 * step + half);
      a[step][half] = SpreadSigns<0xAA88>(shifted) & pairs[step][0];
      a[step][2 + half] = SpreadSigns<0xBB99>(shifted) & pairs[step][1];
    }
  }
}

// mask & (delta w) of one key tile and row as A of 4 steps of 16 heads: this warp's 16 keys.
__device__ __forceinline__ void FormKeyOperand(const GradientStage& stage, int result,
                                               const uint32_t (&w)[8], bool touched,
                                               uint32_t (&a)[4][4]) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32, key = lane / 4;
  const uint2 stored =
      *reinterpret_cast<const uint2*>(&stage.deltas[result][key / 2 * 16 + 4 * warp]);
  const uint32_t own = !touched ? 0x4444 : key % 2 ? 0x3232 : 0x1010;  // byte 4 is 0
  const uint32_t low = __byte_perm(stored.x, 0, own), high = __byte_perm(stored.y, 0, own);
  const uint32_t word = stage.masks[result][32 * warp + lane];
#pragma unroll
  for (int j = 0; j < 8; ++j) {
    a[j / 2][j % 2 * 2] = SpreadSigns<0x9988>(word << j) & MultiplyPair(low, w[j]);
    a[j / 2][j % 2 * 2 + 1] = SpreadSigns<0xBBAA>(word << j) & MultiplyPair(high, w[j]);
  }
}

// Issues d += A b, b [64, 128] with the reduction along its lines.
__device__ __forceinline__ void MultiplyMasked(float (&d)[64], const uint32_t (&a)[4][4],
                                               uint32_t b, bool accumulate) {
  const uint64_t descriptor = cuda::DescriptorMnMajor(b, kRunBytes);
  cuda::WgmmaFence();
#pragma unroll
  for (int step = 0; step < 4; ++step) {
    cuda::WgmmaBf16<kDim, false, true>::Registers(
        d, a[step], cuda::Advance(descriptor, step * 2048), accumulate || step > 0);
  }
  cuda::WgmmaCommit();
}

template <int kCount>
__device__ __forceinline__ void PinOperand(uint32_t (&a)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(a[i][j])::"memory");
  }
}

// Consumes `steps` stages into the two results of the warpgroup. form(stage, m, a) makes the A of
// result m. d is all zero for no steps.
template <class Form>
__device__ __forceinline__ void Accumulate(GradientShared& sh, Ring<kGradientStages>& ring,
                                           int steps, float (&d)[2][64], const Form& form) {
  uint32_t a[2][4][4] = {};
  int previous = 0;
  for (int i = 0; i < steps; ++i, ring.Next()) {
    cuda::BarrierWait(&sh.full[ring.stage], ring.phase);
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      // The products that read a[m] last are done; so, at m = 1, are all of the stage before.
      cuda::WgmmaWait<1>();
      PinOperand(a[m]);
      if (m == 1 && i > 0 && threadIdx.x % 32 == 0) cuda::BarrierArrive(&sh.empty[previous]);
      form(sh.stages[ring.stage], m, a[m]);
      MultiplyMasked(d[m], a[m], cuda::SharedAddress(sh.b[ring.stage]), i > 0);
    }
    previous = ring.stage;
  }
  cuda::WgmmaWait<0>();
  PinOperand(a[0]);
  PinOperand(a[1]);
  cuda::PinRegisters(d[0]);
  cuda::PinRegisters(d[1]);
  if (steps > 0 && threadIdx.x % 32 == 0) cuda::BarrierArrive(&sh.empty[previous]);
  if (steps == 0) {
#pragma unroll
    for (int i = 0; i < 128; ++i) d[i / 64][i % 64] = 0;
  }
}

// --- Queries: dq and dw of four rows a block. ----------------------------------------------------

// dq = g w d and dw = g q . d of one row; the thread has heads `head` and head + 8.
__device__ __forceinline__ void WriteQueryGradients(const Params& params, const float (&d)[64],
                                                    int row) {
  const DenseIndexerLossArgs& args = params.args;
  const int lane = threadIdx.x % 32, head = threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const int64_t at = static_cast<int64_t>(row) * kHeads + head + 8 * r;
    const float scale = args.grad_scale * __ldg(args.w_TI + at);
    const uint32_t* q = static_cast<const uint32_t*>(args.q_TIJ) + at * (kDim / 2) + lane % 4;
    uint32_t* out = static_cast<uint32_t*>(args.dq_TIJ) + at * (kDim / 2) + lane % 4;
    float dw = 0;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const uint32_t pair = __ldg(q + 4 * j);
      const float x = d[4 * j + 2 * r], y = d[4 * j + 2 * r + 1];
      dw = fmaf(cuda::LowBf16(pair), x, fmaf(cuda::HighBf16(pair), y, dw));
      out[4 * j] = cuda::PackBf16(scale * x, scale * y);
    }
    dw += __shfl_xor_sync(kAllLanes, dw, 1);
    dw += __shfl_xor_sync(kAllLanes, dw, 2);
    if (lane % 4 == 0) args.dw_TI[at] = args.grad_scale * dw;
  }
}

__device__ __forceinline__ void ProduceForQueries(GradientShared& sh, const Params& params,
                                                  const CUtensorMap& key_map, int first_row,
                                                  KeyRange tiles) {
  constexpr uint32_t kMaskBytes = kMaskWords * 4, kDeltaBytes = kTileKeys * 2;
  const int rows = min(kResults, params.args.num_rows - first_row);
  const uint64_t once = cuda::PolicyEvictFirst();
  Ring<kGradientStages> ring;
  for (int tile = tiles.begin; tile < tiles.end; ++tile, ring.Next()) {
    uint64_t* full = &sh.full[ring.stage];
    GradientStage& stage = sh.stages[ring.stage];
    cuda::BarrierWait(&sh.empty[ring.stage], ring.phase ^ 1);
    cuda::BarrierArriveExpect(full, kTileBytes + rows * (kMaskBytes + kDeltaBytes));
    LoadTile(cuda::SharedAddress(sh.b[ring.stage]), &key_map, tile * kTileKeys, kRunBytes, full);
    for (int u = 0; u < rows; ++u) {
      const int64_t at = static_cast<int64_t>(first_row + u) * params.num_tiles + tile;
      cuda::BulkLoadHint(cuda::SharedAddress(stage.masks[u]), params.mask_TX + at * kMaskWords,
                         kMaskBytes, full, once);
      cuda::BulkLoadHint(cuda::SharedAddress(stage.deltas[u]), params.delta_TX + at * kTileKeys,
                         kDeltaBytes, full, once);
    }
  }
}

// The last rows have the longest windows under a causal mask: they come first.
__global__ void __launch_bounds__(kThreads, 1)
    QueryGradientKernel(const __grid_constant__ Params params,
                        const __grid_constant__ CUtensorMap key_map) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  GradientShared& sh = *reinterpret_cast<GradientShared*>(raw_shared);
  const int first_row = (gridDim.x - 1 - blockIdx.x) * kRowGroup;
  const KeyRange tiles = TilesOfGroup(params, first_row);
  InitGradientBarriers(sh);
  if (threadIdx.x >= 256) {
    cuda::LowerRegisters<24>();
    if (threadIdx.x == 256) ProduceForQueries(sh, params, key_map, first_row, tiles);
  } else {
    cuda::RaiseRegisters<240>();
    const int first_result = threadIdx.x / 128 * 2;
    float d[2][64];
    Ring<kGradientStages> ring;
    Accumulate(sh, ring, tiles.end - tiles.begin, d,
               [&](const GradientStage& stage, int m, uint32_t(&a)[4][4]) {
                 FormQueryOperand(stage, first_result + m, a);
               });
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      const int row = first_row + first_result + m;
      if (row < params.args.num_rows) WriteQueryGradients(params, d[m], row);
    }
  }
}

// --- Keys: dk of 256 keys and a run of rows. -----------------------------------------------------

// One block a key block: the rows whose windows touch it lie in [first, end).
__global__ void KeyBlockRowsKernel(const Params params) {
  __shared__ int first_row, last_row;
  if (threadIdx.x == 0) {
    first_row = params.args.num_rows;
    last_row = -1;
  }
  __syncthreads();
  const int first_key = static_cast<int>(blockIdx.x) * kKeyBlock;
  int first = params.args.num_rows, last = -1;
#pragma unroll 4
  for (int row = static_cast<int>(threadIdx.x); row < params.args.num_rows; row += blockDim.x) {
    const KeyRange window = RowWindow(params, row);
    if (window.begin < first_key + kKeyBlock && window.end > first_key) {
      first = min(first, row);
      last = row;
    }
  }
  first = __reduce_min_sync(kAllLanes, first);
  last = __reduce_max_sync(kAllLanes, last);
  if (threadIdx.x % 32 == 0) {
    atomicMin(&first_row, first);
    atomicMax(&last_row, last);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    params.key_block_rows[blockIdx.x] =
        last_row < 0 ? make_int2(0, 0) : make_int2(first_row, last_row + 1);
  }
}

// One block: the sums of row counts before each key block.
__global__ void FirstStepKernel(const Params params) {
  __shared__ int sums[1024];
  const int per_thread = (params.num_key_blocks + blockDim.x - 1) / blockDim.x;
  const int from = min(params.num_key_blocks, static_cast<int>(threadIdx.x) * per_thread);
  const int to = min(params.num_key_blocks, from + per_thread);
  int sum = 0;
  for (int b = from; b < to; ++b) sum += params.key_block_rows[b].y - params.key_block_rows[b].x;
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int step = 1; step < 1024; step *= 2) {
    const int other = static_cast<int>(threadIdx.x) >= step ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += other;
    __syncthreads();
  }
  int before = sums[threadIdx.x] - sum;
  for (int b = from; b < to; ++b) {
    params.first_step[b] = before;
    before += params.key_block_rows[b].y - params.key_block_rows[b].x;
  }
  if (threadIdx.x == blockDim.x - 1) params.first_step[params.num_key_blocks] = before;
}

// The steps (key block, row) are cut into equal runs, one for each block of the grid.
__device__ __forceinline__ int RunBegin(const Params& params, int run) {
  const int64_t steps = params.first_step[params.num_key_blocks];
  return static_cast<int>(steps * run / params.num_runs);
}

// Calls visit(key block, first row, rows > 0) for the parts of a run.
template <class Visit>
__device__ __forceinline__ void ForEachPart(const Params& params, int run, const Visit& visit) {
  const int begin = RunBegin(params, run), end = RunBegin(params, run + 1);
  int low = 0, high = params.num_key_blocks;  // first_step[low] <= begin
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (params.first_step[middle] <= begin ? low : high) = middle;
  }
  for (int b = low; b < params.num_key_blocks && params.first_step[b] < end; ++b) {
    const int from = max(begin, params.first_step[b]), to = min(end, params.first_step[b + 1]);
    if (from < to) visit(b, params.key_block_rows[b].x + from - params.first_step[b], to - from);
  }
}

__device__ __forceinline__ void ProduceForKeys(GradientShared& sh, const Params& params,
                                               const CUtensorMap& query_map) {
  constexpr uint32_t kMaskBytes = kResults * kMaskWords * 4, kDeltaBytes = kResults * kTileKeys * 2;
  const uint64_t once = cuda::PolicyEvictFirst();
  Ring<kGradientStages> ring;
  ForEachPart(params, blockIdx.x, [&](int block, int first_row, int rows) {
    for (int row = first_row; row < first_row + rows; ++row, ring.Next()) {
      uint64_t* full = &sh.full[ring.stage];
      GradientStage& stage = sh.stages[ring.stage];
      const KeyRange window = RowWindow(params, row);
      uint32_t touched = 0;
      for (int i = 0; i < kResults; ++i) {
        const int key = block * kKeyBlock + i * kTileKeys;
        touched |= uint32_t{window.begin < key + kTileKeys && window.end > key} << i;
      }
      cuda::BarrierWait(&sh.empty[ring.stage], ring.phase ^ 1);
      stage.touched = touched;
      cuda::BarrierArriveExpect(full, kTileBytes + kMaskBytes + kDeltaBytes + kHeads * 2);
      LoadTile(cuda::SharedAddress(sh.b[ring.stage]), &query_map, row * kHeads, kRunBytes, full);
      const int64_t at = static_cast<int64_t>(row) * params.num_tiles + block * kResults;
      cuda::BulkLoadHint(cuda::SharedAddress(stage.masks), params.mask_TX + at * kMaskWords,
                         kMaskBytes, full, once);
      cuda::BulkLoadHint(cuda::SharedAddress(stage.deltas), params.delta_TX + at * kTileKeys,
                         kDeltaBytes, full, once);
      cuda::BulkLoad(cuda::SharedAddress(stage.w), params.w_TX + static_cast<int64_t>(row) * 32,
                     kHeads * 2, full);
    }
  });
}

__global__ void __launch_bounds__(kThreads, 1)
    KeyGradientKernel(const __grid_constant__ Params params,
                      const __grid_constant__ CUtensorMap query_map) {
  extern __shared__ __align__(1024) uint8_t raw_shared[];
  GradientShared& sh = *reinterpret_cast<GradientShared*>(raw_shared);
  InitGradientBarriers(sh);
  if (threadIdx.x >= 256) {
    cuda::LowerRegisters<24>();
    if (threadIdx.x == 256) ProduceForKeys(sh, params, query_map);
  } else {
    cuda::RaiseRegisters<240>();
    const int first_result = threadIdx.x / 128 * 2, lane = threadIdx.x % 32;
    Ring<kGradientStages> ring;
    ForEachPart(params, blockIdx.x, [&](int block, int, int rows) {
      float d[2][64];
      Accumulate(sh, ring, rows, d, [&](const GradientStage& stage, int m, uint32_t(&a)[4][4]) {
        const uint4* from = reinterpret_cast<const uint4*>(&stage.w[lane % 4 * 8]);
        const uint4 first = from[0], second = from[1];
        const uint32_t w[8] = {first.x,  first.y,  first.z,  first.w,
                               second.x, second.y, second.z, second.w};
        FormKeyOperand(stage, first_result + m, w, stage.touched >> (first_result + m) & 1, a);
      });
      float* out = params.partial_dk +
                   (static_cast<int64_t>(blockIdx.x) + block) * kKeyBlock * kDim + 2 * (lane % 4);
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        const int key = (first_result + m) * kTileKeys + threadIdx.x % 128 / 32 * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 32; ++i) {
          *reinterpret_cast<float2*>(out + (key + 8 * (i % 2)) * kDim + i / 2 * 8) =
              make_float2(d[m][2 * i], d[m][2 * i + 1]);
        }
      }
    });
  }
}

// dk += g * the runs' parts, in the order of the runs. Four floats a thread.
__global__ void SumKeyGradientKernel(const Params params) {
  const int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x;
  const int64_t key = i / (kDim / 4);
  if (key >= params.args.num_keys) return;
  const int block = static_cast<int>(key / kKeyBlock);
  const int begin = params.first_step[block], end = params.first_step[block + 1];
  if (begin == end) return;
  int run = static_cast<int>(static_cast<int64_t>(begin) * params.num_runs /
                             params.first_step[params.num_key_blocks]);
  float4 sum = make_float4(0, 0, 0, 0);
  for (; run < params.num_runs; ++run) {
    const int from = max(begin, RunBegin(params, run)), to = min(end, RunBegin(params, run + 1));
    if (from >= end) break;
    if (from >= to) continue;
    const float4 part = reinterpret_cast<const float4*>(
        params.partial_dk)[(static_cast<int64_t>(run) + block) * (kKeyBlock * kDim / 4) +
                           i % (kKeyBlock * kDim / 4)];
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  float4* out = reinterpret_cast<float4*>(params.args.dk_SJ) + i;
  float4 dk = *out;
  dk.x = fmaf(params.args.grad_scale, sum.x, dk.x);
  dk.y = fmaf(params.args.grad_scale, sum.y, dk.y);
  dk.z = fmaf(params.args.grad_scale, sum.z, dk.z);
  dk.w = fmaf(params.args.grad_scale, sum.w, dk.w);
  *out = dk;
}

}  // namespace baleen::dense_indexer_loss
