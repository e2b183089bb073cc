// The list of output tiles of a grouped product, as every block walks it: expert by expert, within
// an expert groups of 2048 rows along M, within a group column after column. 132 neighbouring tiles
// then cover about as many rows as columns, which is what L2 has to fetch least for.
//
// Nobody stores the list: tile numbers only rise, so a block goes through the offsets once.
#pragma once

#include <cstdint>

#include "kernels/ops/linear/grouped_matmul_cuda.h"

namespace baleen::grouped_matmul {

// Pairs of operands whose products are summed.
template <GroupedProduct kProduct>
inline constexpr int kPairs = kProduct == GroupedProduct::kBackwardInputOfTwo ? 2 : 1;

inline constexpr int kGroupRows = 2048;  // along M

struct Extents {
  const int32_t* offsets_L1;
  int num_rows, num_experts, in, out;
};

struct ExpertRows {
  int begin, count;
};
__device__ inline ExpertRows RowsOf(const Extents& extents, int expert) {
  const int begin = max(0, __ldg(extents.offsets_L1 + expert));
  const int end = min(extents.num_rows, __ldg(extents.offsets_L1 + expert + 1));
  return {begin, max(0, end - begin)};
}

// Where a tile lies. M counts the expert's rows, or `out` for kBackwardWeight; K is `in`, `out` or
// the expert's rows.
struct Tile {
  int expert;
  int row_begin, rows;  // the expert's
  int m, n;             // first element of the tile
};

template <GroupedProduct kProduct, int kTileM, int kTileN>
class TileWalk {
  static constexpr int kGroupTiles = kGroupRows / kTileM;

 public:
  __device__ explicit TileWalk(const Extents& extents) : extents_(extents) { ReadExpert(); }

  static __host__ __device__ int Columns(const Extents& extents) {
    return kProduct == GroupedProduct::kForward ? extents.out : extents.in;
  }

  // Moves on to tile number `index`, no smaller than before; false behind the last.
  __device__ bool Seek(int index, Tile& tile) {
    const int column_tiles = (Columns(extents_) + kTileN - 1) / kTileN;
    while (index - first_ >= row_tiles_ * column_tiles) {
      first_ += row_tiles_ * column_tiles;
      if (++expert_ >= extents_.num_experts) return false;
      ReadExpert();
    }
    const int in_expert = index - first_;
    const int group = in_expert / (kGroupTiles * column_tiles);
    const int in_group = in_expert - group * kGroupTiles * column_tiles;
    const int group_rows = min(kGroupTiles, row_tiles_ - group * kGroupTiles);
    tile.expert = expert_;
    tile.row_begin = row_begin_;
    tile.rows = rows_;
    tile.m = (group * kGroupTiles + in_group % group_rows) * kTileM;
    tile.n = in_group / group_rows * kTileN;
    return true;
  }

 private:
  __device__ void ReadExpert() {
    const ExpertRows rows = RowsOf(extents_, expert_);
    row_begin_ = rows.begin;
    rows_ = rows.count;
    const int m =
        kProduct == GroupedProduct::kBackwardWeight ? (rows_ > 0 ? extents_.out : 0) : rows_;
    row_tiles_ = (m + kTileM - 1) / kTileM;
  }

  const Extents extents_;
  int expert_ = 0, first_ = 0;  // first_: number of the expert's first tile
  int row_begin_, rows_, row_tiles_;
};

}  // namespace baleen::grouped_matmul
