// What masked dense attention (192/128 heads, sm_90a) is asked to do and the workspace it takes:
// host arithmetic alone, which builds and plans without a GPU use too.
//
// A row t sees the keys [begin, end) of its window and, where a selection is given, of those only
// the ones in its list of ids. Legend: T query rows, S keys, K selected keys a row, H heads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace baleen {

struct MaskedAttentionKeys {
  int num_rows = 0;                      // T
  int num_keys = 0;                      // S >= 1
  const int32_t* key_begin_T = nullptr;  // null, as key_end_T: every row has [0, S)
  const int32_t* key_end_T = nullptr;    // exclusive; begin >= end: a row without keys
  const int32_t* ids_TK = nullptr;       // with a selection; distinct in a row, any order; -1 or
                                         // beyond S: none
  int num_selected = -1;                 // K; -1: no selection
};

enum class MaskedAttentionPass : uint8_t { kForward, kBackward };

inline constexpr int kMaskedTile = 128;        // rows, or keys, that stay in a thread block
inline constexpr int kMaskedStep = 64;         // keys, or rows, that pass by in the backward
inline constexpr int kMaskedCounters = 4;      // of started items, one a kernel
inline constexpr int kMaskedTargetRows = 256;  // of a cluster of the target's kernel
inline constexpr int kMaskedTargetKeys = 768;  // its sums of a row are padded to a multiple of it

inline constexpr int64_t MaskedRoundUp(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The parts of the workspace, in bytes from its begin, 256-byte aligned; those not needed are
// empty. masked_attention_schedule_cuda.h says what is in them.
struct MaskedAttentionLayout {
  int padded_rows = 0, padded_keys = 0;
  int list_stride = 0;  // entries of a list of tiles
  size_t counters = 0, begin_T = 0, end_T = 0, block_windows = 0;
  size_t row_bits = 0, key_bits = 0, flags = 0;
  size_t row_lists = 0, key_lists = 0;
  size_t statistics = 0;
  size_t target = 0;
  int target_chunk = 0;  // rows whose sums over heads are held at once
  size_t bytes = 0;
};

// Rows of about equal chunks whose sums take half a GiB, or 256 if these need more.
inline int MaskedTargetChunk(const MaskedAttentionKeys& keys) {
  const int64_t row_bytes = MaskedRoundUp(keys.num_keys, kMaskedTargetKeys) * 4;
  const int64_t units = MaskedRoundUp(keys.num_rows, kMaskedTargetRows) / kMaskedTargetRows;
  const int64_t fit = (int64_t{1} << 29) / row_bytes / kMaskedTargetRows;
  const int64_t chunks = (units + (fit < 1 ? 1 : fit) - 1) / (fit < 1 ? 1 : fit);
  return chunks == 0 ? 0 : static_cast<int>((units + chunks - 1) / chunks * kMaskedTargetRows);
}

inline MaskedAttentionLayout LayOutMaskedAttention(const MaskedAttentionKeys& keys,
                                                   MaskedAttentionPass pass, int num_heads) {
  const bool selected = keys.num_selected >= 0, backward = pass == MaskedAttentionPass::kBackward;
  MaskedAttentionLayout layout;
  const auto take = [&layout](bool needed, size_t bytes) {
    const size_t at = layout.bytes;
    if (needed) layout.bytes += (bytes + 255) / 256 * 256;
    return at;
  };
  const size_t rows = MaskedRoundUp(keys.num_rows, 256),
               columns = MaskedRoundUp(keys.num_keys, 384);
  const size_t longest = rows > columns ? rows : columns;
  layout.padded_rows = static_cast<int>(rows);
  layout.padded_keys = static_cast<int>(columns);
  layout.list_stride = static_cast<int>(longest / kMaskedStep + 1);
  layout.counters = take(true, kMaskedCounters * 4);
  layout.begin_T = take(true, rows * 4);
  layout.end_T = take(true, rows * 4);
  layout.block_windows = take(true, rows / 32 * 16);
  layout.row_bits = take(selected, columns / 32 * rows * 4);
  layout.key_bits = take(selected && backward, rows / 32 * columns * 4);
  layout.flags = take(selected, rows / 32 * (columns / 32));
  layout.row_lists = take(true, rows / kMaskedTile * layout.list_stride * 4);
  layout.key_lists = take(backward, columns / kMaskedTile * layout.list_stride * 4);
  layout.statistics = take(backward, 2 * rows * num_heads * 4);
  layout.target_chunk = selected && backward ? MaskedTargetChunk(keys) : 0;
  const size_t sums = MaskedRoundUp(keys.num_keys, kMaskedTargetKeys) * layout.target_chunk * 4;
  layout.target = take(sums > 0, 256 + sums);
  return layout;
}

}  // namespace baleen
