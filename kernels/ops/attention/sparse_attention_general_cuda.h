// Internal: sparse attention and its backward on the GPU for any widths, heads and lists, bf16 or
// fp32, with products in fp32 (sparse_attention.h has the formulas and the shape legend). -1 may
// stand anywhere in a list. Every order of sums is fixed: the same inputs give the same bits.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/cuda/element.h"

namespace baleen {

inline constexpr int64_t kSparseAttentionGeneralMaxWidth = 8192;  // C: q, do and dq of a head fit

struct SparseAttentionGeneralArgs {
  CudaElement element = CudaElement::kF32;  // of q, kv, o, do, dq
  int64_t num_rows = 0;                     // T
  int64_t num_keys = 0;                     // S
  int64_t num_heads = 0;                    // H
  int64_t width = 0;                        // C, at most the above
  int64_t value_dim = 0;                    // V, 1 .. C
  int64_t num_slots = 0;                    // K
  float scale = 0;                          // of the scores
  const void* q_THC = nullptr;
  const void* kv_SC = nullptr;
  const int32_t* ids_TK = nullptr;  // -1 or a key, each at most once in a row
  void* o_THV = nullptr;            // the forward writes both, the backward reads them
  float* lse_TH = nullptr;
};
void SparseAttentionGeneralCuda(const SparseAttentionGeneralArgs& args, void* stream);

// The backward stores what each (row, slot) adds to dkv for a chunk of rows at a time, sorts the
// chunk's slots by key, and lets one block a key add up its own in the order of the rows.
struct SparseAttentionGeneralChunk {
  int64_t rows = 0;
  int64_t slots = 0;   // rows * K
  int64_t floats = 0;  // of the stored contributions
};
// As many rows as about 512 MiB hold: for small models all of a call. The bits of dkv depend on it.
inline SparseAttentionGeneralChunk ChunkSparseAttentionGeneral(int64_t num_rows, int64_t width,
                                                               int64_t num_slots) {
  constexpr int64_t kFloats = int64_t{128} << 20;
  const int64_t row_floats = std::max<int64_t>(1, num_slots * ((width + 3) / 4 * 4));
  const int64_t rows = std::min(num_rows, std::max<int64_t>(1, kFloats / row_floats));
  return {rows, rows * num_slots, rows * num_slots * ((width + 3) / 4 * 4)};
}

struct SparseAttentionGeneralBackwardArgs {
  SparseAttentionGeneralArgs forward;
  const void* do_THV = nullptr;
  void* dq_THC = nullptr;      // overwritten
  float* dkv_SC = nullptr;     // added to
  float* target_TK = nullptr;  // overwritten
  // Of the chunk's size; contents arbitrary.
  float* contributions = nullptr;     // [floats], 16-byte aligned
  int32_t* sorted_keys = nullptr;     // [slots]
  int32_t* sorted_slots = nullptr;    // [slots]
  int32_t* offsets = nullptr;         // [S + 1]
  int32_t* sort_workspace = nullptr;  // StableSortWorkspaceInts(slots, S)
};
void SparseAttentionGeneralBackwardCuda(const SparseAttentionGeneralBackwardArgs& args,
                                        const SparseAttentionGeneralChunk& chunk, void* stream);

}  // namespace baleen
