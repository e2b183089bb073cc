// Shapes and loads shared by the forward and backward of sparse attention (absorbed MQA form).
//
// Every tile in shared memory is a row of pieces: 64 rows x 64 columns of bf16 (64 x 128 bytes,
// 128-byte swizzle), so a piece serves as a K-major operand along its columns and as an MN-major
// operand along its rows. Legend: C = 576 columns of q and kv, V = 512 of them are the value.
#pragma once

#include <cstdint>

#include "kernels/cuda/async_copy.cuh"
#include "kernels/cuda/wgmma.cuh"

namespace baleen::cuda {

constexpr int kC = 576, kV = 512;
constexpr int kHeadTile = 64;  // rows of the matrix instruction
constexpr int kBlock = 64;     // keys a block
constexpr int kPieceBytes = 64 * 128;
constexpr int kPiecesC = kC / 64, kPiecesV = kV / 64;
constexpr int kRowBytes = kC * 2;  // of q, kv, dq
constexpr float kLog2e = 1.4426950408889634f;

// The thread within its warpgroup, read anew so that the roles of a kernel share no registers
// before they part.
__device__ __forceinline__ int ThreadInRole() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread % 128;
}

// Blocks of a row that hold a key; padding stands only at a row's end and a row has 32 blocks at
// most, so each warp finds out by itself: lane b asks for the first id of block b (early), all
// count.
__device__ __forceinline__ int32_t FirstIdOfLanesBlock(const int32_t* ids, int num_selected) {
  const int lane = threadIdx.x % 32;
  return lane < num_selected / kBlock ? __ldg(ids + lane * kBlock) : -1;
}
__device__ __forceinline__ int CountBlocks(int32_t first_id) {
  return __popc(__ballot_sync(~0u, first_id >= 0));
}

// Starts loading 64 rows of kPieces pieces; rows from `num_rows` on become zero.
template <int kPieces>
__device__ __forceinline__ void LoadTile(uint32_t shared, const void* global, int num_rows,
                                         int thread, int num_threads) {
  for (int i = thread; i < 64 * kPieces * 8; i += num_threads) {
    const int row = i / (kPieces * 8), chunk = i % (kPieces * 8);
    const bool valid = row < num_rows;
    CopyAsync16(shared + (chunk / 8) * kPieceBytes + SwizzledOffset(row, chunk % 8),
                static_cast<const uint8_t*>(global) + size_t(valid ? row : 0) * (kPieces * 128) +
                    chunk * 16,
                valid);
  }
}

// This thread's part of a gather by 128 threads: eight threads bring 128 bytes of a row, sixteen
// rows at a time. `from` are the keys of rows first_row + 16 {0, 1, 2, 3}; -1 becomes zeros.
__device__ __forceinline__ void GatherPieces(uint32_t to, const uint8_t* kv, const int (&from)[4],
                                             int first_piece, int end_piece) {
#pragma unroll
  for (int pass = 0; pass < 4; ++pass) {
    const uint8_t* row = kv + size_t(max(from[pass], 0)) * kRowBytes;
#pragma unroll
    for (int piece = first_piece; piece < end_piece; ++piece) {
      CopyAsync16(to + piece * kPieceBytes + pass * 2048, row + piece * 128, from[pass] >= 0);
    }
  }
}

}  // namespace baleen::cuda
