// What masked dense attention (192/128 heads, sm_90a) is asked to do and the workspace it takes:
// host arithmetic alone, which builds and plans without a GPU use too.
//
// A row t sees the keys [begin, end) of its window and, where a selection is given, of those only
// the ones in its list of ids. Legend: T query rows, S keys, K selected keys a row, H heads.
#pragma once

#include <cstddef>
#include <cstdint>

namespace baleen {

enum class MaskedAttentionPass : uint8_t { kForward, kBackward };

inline constexpr int kMaskedTile = 128;        // rows, or keys, that stay in a thread block
inline constexpr int kMaskedStep = 64;         // keys, or rows, that pass by in the backward
inline constexpr int kMaskedCounters = 4;      // of started items, a kernel each, no dS kept
inline constexpr int kMaskedKeptRows = 256;    // rows whose dq a thread block sums from a kept dS
inline constexpr int kMaskedTargetRows = 256;  // of a cluster of the target's kernel
inline constexpr int kMaskedTargetKeys = 768;  // its sums of a row are padded to a multiple of it

inline constexpr int64_t kMaskedTileBytes = int64_t{2} * kMaskedTile * kMaskedTile;  // of dS
// dS that the backward keeps at once, where it does: of two heads at 32768 causal rows.
inline constexpr int64_t kMaskedScoreGradientBytes = int64_t{9} << 28;

struct MaskedAttentionKeys {
  int num_rows = 0;                      // T
  int num_keys = 0;                      // S >= 1
  const int32_t* key_begin_T = nullptr;  // null, as key_end_T: every row has [0, S)
  const int32_t* key_end_T = nullptr;    // exclusive; begin >= end: a row without keys
  const int32_t* ids_TK = nullptr;       // with a selection; distinct in a row, any order; -1 or
                                         // beyond S: none
  int num_selected = -1;                 // K; -1: no selection
  int64_t ds_bytes = 0;                  // of dS that the backward may keep at once
};

inline constexpr int64_t MaskedRoundUp(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// The backward's kernel of the keys may keep dS in bf16 for that of the rows, which then forms dq =
// scale dS k and nothing else: 5 products a pair instead of 7. dS lies in tiles of 128 x 128 pairs,
// those that hold any pair that is seen, of as many heads at once as fit.
//
// Tiles of one head, at most: what is seen of them is known to the device alone.
inline int64_t MaskedTilesOfHead(const MaskedAttentionKeys& keys) {
  return MaskedRoundUp(keys.num_rows, kMaskedTile) / kMaskedTile *
         (MaskedRoundUp(keys.num_keys, kMaskedTile) / kMaskedTile);
}
// Whether a call's backward keeps dS: where that of one head surely fits.
inline bool KeepsScoreGradients(const MaskedAttentionKeys& keys) {
  return MaskedTilesOfHead(keys) * kMaskedTileBytes <= keys.ds_bytes;
}
// Tiles that are held at once.
inline int64_t MaskedTilesHeld(const MaskedAttentionKeys& keys, int num_heads) {
  const int64_t all = MaskedTilesOfHead(keys) * num_heads;
  const int64_t fitting = keys.ds_bytes / kMaskedTileBytes;
  return all < fitting ? all : fitting;
}
// Rounds of heads, at most.
inline int MaskedHeadRounds(const MaskedAttentionKeys& keys, int num_heads) {
  if (num_heads == 0 || keys.num_rows == 0) return 0;
  const int64_t fitting = MaskedTilesHeld(keys, num_heads) / MaskedTilesOfHead(keys);
  return static_cast<int>((num_heads + fitting - 1) / fitting);
}

// The ds_bytes of a call, of measurements: dS is kept where rows are more than half of the keys.
// Fewer share k too little in dq, and are too few items of it in a round. dq's bits depend on it,
// so on sizes alone.
inline int64_t MaskedScoreGradientBytes(MaskedAttentionKeys keys, int num_heads) {
  keys.ds_bytes = kMaskedScoreGradientBytes;
  if (num_heads == 0 || keys.num_rows == 0 || !KeepsScoreGradients(keys)) return 0;
  return int64_t{2} * keys.num_rows > keys.num_keys ? kMaskedScoreGradientBytes : 0;
}

// The parts of the workspace, in bytes from its begin, 256-byte aligned; those not needed are
// empty. masked_attention_schedule_cuda.h says what is in them.
struct MaskedAttentionLayout {
  int padded_rows = 0, padded_keys = 0;
  int list_stride = 0;  // entries of a list of tiles
  size_t counters = 0, begin_T = 0, end_T = 0, block_windows = 0;
  size_t row_bits = 0, key_bits = 0, flags = 0;
  size_t row_lists = 0, key_lists = 0;
  size_t statistics = 0;
  bool keeps_ds = false;
  int num_counters = 0;  // of started items, one a launch
  size_t places = 0, tile_counts = 0, rounds = 0;
  size_t ds = 0;
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
  layout.keeps_ds = backward && KeepsScoreGradients(keys);
  layout.num_counters = layout.keeps_ds ? 2 * MaskedHeadRounds(keys, num_heads) : kMaskedCounters;
  layout.counters = take(true, static_cast<size_t>(layout.num_counters) * 4);
  layout.begin_T = take(true, rows * 4);
  layout.end_T = take(true, rows * 4);
  layout.block_windows = take(true, rows / 32 * 16);
  layout.row_bits = take(selected, columns / 32 * rows * 4);
  layout.key_bits = take(selected && backward, rows / 32 * columns * 4);
  layout.flags = take(selected, rows / 32 * (columns / 32));
  layout.row_lists = take(!layout.keeps_ds, rows / kMaskedTile * layout.list_stride * 4);
  layout.key_lists = take(backward, columns / kMaskedTile * layout.list_stride * 4);
  layout.statistics = take(backward, 2 * rows * num_heads * 4);
  const bool keeps = layout.keeps_ds;
  layout.places = take(keeps, rows / kMaskedTile * (columns / kMaskedTile) * 4);
  layout.tile_counts = take(keeps, rows / kMaskedTile * 4);
  layout.rounds = take(keeps, 8);
  layout.target_chunk = selected && backward ? MaskedTargetChunk(keys) : 0;
  const size_t sums = MaskedRoundUp(keys.num_keys, kMaskedTargetKeys) * layout.target_chunk * 4;
  // The target is made when dS is no longer needed.
  const size_t held =
      keeps ? static_cast<size_t>(MaskedTilesHeld(keys, num_heads) * kMaskedTileBytes) : 0;
  layout.ds = layout.target = layout.bytes;
  take(true, sums > 0 && held < 256 + sums ? 256 + sums : held);
  return layout;
}

}  // namespace baleen
