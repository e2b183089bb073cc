#include "parallel/grid_communicators.h"

#include "kernels/core/check.h"

namespace baleen {

GridCommunicators SplitGrid(Communicator& world, const ProcessGrid& grid) {
  CHECK_EQ(world.size(), grid.world_size());
  const ProcessGrid::Coordinates at = grid.At(world.rank());
  // The color of an axis is the lowest rank of the line along it; the key is the place on the line.
  GridCommunicators parts;
  parts.tp = world.Split(grid.DenseRank(at.pp, at.dp, at.cp, 0), at.tp, "tp");
  parts.cp = world.Split(grid.DenseRank(at.pp, at.dp, 0, at.tp), at.cp, "cp");
  parts.dp = world.Split(grid.DenseRank(at.pp, 0, at.cp, at.tp), at.dp, "dp");
  parts.pp = world.Split(grid.DenseRank(0, at.dp, at.cp, at.tp), at.pp, "pp");
  parts.dp_cp =
      world.Split(grid.DenseRank(at.pp, 0, 0, at.tp), at.dp * grid.cp_size() + at.cp, "dp_cp");
  parts.ep = world.Split(grid.ExpertRank(at.pp, at.edp, 0), at.ep, "ep");
  parts.edp = world.Split(grid.ExpertRank(at.pp, 0, at.ep), at.edp, "edp");
  return parts;
}

}  // namespace baleen
