// What the kernels of the dense indexer loss share; dense_indexer_loss_cuda.cu tells the story.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/barrier.cuh"
#include "kernels/cuda/tensor_map.cuh"
#include "kernels/cuda/warp.cuh"
#include "kernels/cuda/wgmma.cuh"
#include "kernels/cuda/wgmma_bf16.cuh"
#include "kernels/ops/indexer/dense_indexer_loss_cuda.h"

namespace baleen::dense_indexer_loss {

constexpr int kHeads = kDenseIndexerHeads;
constexpr int kDim = 128;                  // J
constexpr int kTileKeys = 64;              // unit of masks and delta
constexpr int kRunBytes = 64 * 128;        // half of a [64, 128] bf16 tile: 64 lines of 128 B
constexpr int kTileBytes = 2 * kRunBytes;  // [64, 128] bf16
constexpr int kMaskWords = 128;            // of one row and tile: 64 heads x 64 keys, in bits
constexpr int kRowGroup = 4;               // rows of a block in scores and query gradient
constexpr int kKeyBlock = 256;             // keys of a block in the key gradient
constexpr int kTargetKeys = 192;           // keys of a block in the target kernel
constexpr int kTargetRows = 128;           // rows of a block there; a cluster has two
constexpr int kPadRows = 2 * kTargetRows;  // chunks are padded to whole clusters
constexpr int kPadKeys = 768;              // and keys to whole blocks of each kind
constexpr int kThreads = 384;              // two consumer warpgroups and one for the producer
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f;

// Clusters of the target kernel so far.
struct TargetWaves {
  int started, finished;
};

// One chunk of rows: row 0 of every [T, ...] pointer is the chunk's first.
//
// Masks: word (t, tile, thread x) holds, for the accumulator layout of wgmma_bf16.cuh with keys as
// rows and heads as columns, 1[a > 0] of thread x's 32 elements: bit 7 - j of byte 2 r + e is row
// + 8 r, column 8 j + 2 (x % 4) + e. Shifted left by j, the four bytes' top bits are the pairs
// (e = 0, 1) of both rows, which one PRMT each spreads to a mask for two bf16.
//
// Delta: bf16, key 8 i + 2 c + e of a tile at 16 c + 2 i + e, so that a thread's keys lie side by
// side.
struct Params {
  DenseIndexerLossArgs args;
  int num_tiles;       // padded keys / 64
  int num_key_blocks;  // of kKeyBlock keys that hold a key
  int num_runs;        // blocks of the key gradient
  __nv_bfloat16* negated_k_SJ;
  float* score_TS;          // [T, padded keys]
  uint32_t* mask_TX;        // [T, tiles, kMaskWords]
  __nv_bfloat16* delta_TX;  // [T, tiles, 64]: pi - p, not scaled by g; 0 outside the windows
  float* lse_T;             // of I
  float* loss_TX;           // [T, padded keys / kTargetKeys] shares of the loss
  uint32_t* w_TX;           // [T, 4, 8] bf16 pairs: (c, j) = weights of heads 8 j + 2 c + {0, 1}
  int2* key_block_rows;     // [key blocks] first row and end of the rows that touch the block
  int* first_step;          // [key blocks + 1] sum of the row counts of the blocks before
  TargetWaves* target_waves;
  float* partial_dk;  // [runs + key blocks][kKeyBlock][128]: of run i and block b at i + b
};

struct KeyRange {
  int begin, end;
};

// The window of a row, clipped; {num_keys, 0} if it has no keys, so that hulls need no case of it.
__device__ __forceinline__ KeyRange RowWindow(const Params& params, int row) {
  const DenseIndexerLossArgs& args = params.args;
  if (row < args.num_rows) {
    const int begin = max(0, __ldg(args.key_begin_T + row));
    const int end = min(args.num_keys, __ldg(args.key_end_T + row));
    if (begin < end) return {begin, end};
  }
  return {args.num_keys, 0};
}

// Key tiles that the windows of a row group touch.
__device__ __forceinline__ KeyRange TilesOfGroup(const Params& params, int first_row) {
  KeyRange hull = {params.args.num_keys, 0};
#pragma unroll
  for (int u = 0; u < kRowGroup; ++u) {
    const KeyRange window = RowWindow(params, first_row + u);
    hull = {min(hull.begin, window.begin), max(hull.end, window.end)};
  }
  if (hull.begin >= hull.end) return {0, 0};
  return {hull.begin / kTileKeys, (hull.end + kTileKeys - 1) / kTileKeys};
}

// The same value in all lanes of a warp, told to the compiler: it can stay in a uniform register.
__device__ __forceinline__ int Uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }
__device__ __forceinline__ KeyRange Uniform(KeyRange x) {
  return {Uniform(x.begin), Uniform(x.end)};
}

// Position in a ring of kStages buffers.
template <int kStages>
struct Ring {
  int stage = 0, phase = 0;
  __device__ __forceinline__ void Next() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// Loads rows [row, row + box rows) of a [rows, 128] bf16 matrix as two runs of swizzled atoms.
__device__ __forceinline__ void LoadTile(uint32_t shared, const CUtensorMap* map, int row,
                                         int run_bytes, uint64_t* barrier) {
  cuda::TensorLoad(shared, map, 0, row, barrier);
  cuda::TensorLoad(shared + run_bytes, map, 64, row, barrier);
}

}  // namespace baleen::dense_indexer_loss
