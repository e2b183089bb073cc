// Which keys each row of dense attention sees, in the form its kernels read on sm_90a: bits, and
// for every tile of rows (or of keys) the list of tiles that it meets, so that empty tiles cost
// nothing and full ones no masking. Bits are made of a selection alone: windows are cheaper to
// compute than to load.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "kernels/ops/attention/masked_attention_plan_cuda.h"

namespace baleen {

// Lists of tiles: list i begins at entries + i * stride with its count, then ascending
// 2 * tile + 1[some pairs are masked]. Lists of rows name one tile at least, masked if need be:
// rows without keys get results too.
struct MaskedTileLists {
  int32_t* entries;
  int stride, count;
};

// Heads whose dS is held at once, and tiles of each.
struct HeadRounds {
  int heads, tiles;
};

// What the kernels read, all of it in the workspace. Blocks are 32 rows, words 32 keys.
struct MaskedAttentionSchedule {
  int num_rows, num_keys, padded_rows, padded_keys;
  bool selected, backward, keeps_ds;
  int num_counters;
  int32_t* counters;
  // [padded rows]: windows, clipped, or hulls of ids in them; 0, 0 if empty or beyond T.
  int32_t* begin_T;
  int32_t* end_T;
  // Of a selection: bit s % 32 of row_bits[s / 32][t] and, in the backward, bit t % 32 of
  // key_bits[t / 32][s]; for each block and word two flags: 1 = some bit is set, 2 = all are (rows
  // beyond T do not count).
  uint32_t* row_bits;  // [padded keys / 32, padded rows]
  uint32_t* key_bits;  // [padded rows / 32, padded keys]
  uint8_t* flags;      // [padded rows / 32, padded keys / 32]
  // Without one, of each block: hull begin, end of its windows, then begin, end of what all rows
  // see.
  int4* block_windows;      // [padded rows / 32]
  MaskedTileLists by_rows;  // of 128 rows: tiles of 128 keys in the forward, 64 in the backward
  MaskedTileLists by_keys;  // of 128 keys: steps of 64 rows; backward only
  // Where dS is kept (by_rows is not made then, and by_keys has both steps of a tile): of each tile
  // of 128 x 128 pairs its place among those of a head that hold any pair, -1 if it does not.
  int32_t* places;       // [padded rows / 128, padded keys / 128]
  int32_t* tile_counts;  // [padded rows / 128]
  HeadRounds* rounds;
};

MaskedAttentionSchedule PlaceMaskedAttentionSchedule(const MaskedAttentionKeys& keys,
                                                     MaskedAttentionPass pass,
                                                     const MaskedAttentionLayout& layout,
                                                     void* workspace);

// Fills it: two to four small kernels.
void LaunchMaskedAttentionSchedule(const MaskedAttentionKeys& keys,
                                   const MaskedAttentionSchedule& schedule, cudaStream_t stream);

// Behind it, where dS of `num_heads` heads is kept: places and rounds.
void LaunchMaskedAttentionPlaces(const MaskedAttentionSchedule& schedule, int num_heads,
                                 int64_t tiles_held, cudaStream_t stream);

}  // namespace baleen
