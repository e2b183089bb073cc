#include "parallel/grid_communicators.h"

#include <algorithm>

#include "kernels/core/check.h"

namespace baleen {

GridCommunicators SplitGrid(Communicator& world, const ProcessGrid& grid,
                            const std::vector<int>& embedding_stages, int expert_node_size) {
  CHECK_EQ(world.size(), grid.world_size());
  const int rank = world.rank();
  const ProcessGrid::Coordinates at = grid.At(rank);
  const bool has_embedding =
      std::find(embedding_stages.begin(), embedding_stages.end(), at.pp) != embedding_stages.end();
  // The color of a group is its lowest rank; the key is the place in it, the world's order.
  GridCommunicators parts;
  parts.tp = world.Split(grid.DenseRank(at.pp, at.dp, at.cp, 0), rank, "tp");
  parts.cp = world.Split(grid.DenseRank(at.pp, at.dp, 0, at.tp), rank, "cp");
  parts.dp = world.Split(grid.DenseRank(at.pp, 0, at.cp, at.tp), rank, "dp");
  parts.pp = world.Split(grid.DenseRank(0, at.dp, at.cp, at.tp), rank, "pp");
  parts.cp_tp = world.Split(grid.DenseRank(at.pp, at.dp, 0, 0), rank, "cp_tp");
  parts.dp_cp = world.Split(grid.DenseRank(at.pp, 0, 0, at.tp), rank, "dp_cp");
  parts.stage = world.Split(grid.DenseRank(at.pp, 0, 0, 0), rank, "stage");
  parts.embedding = world.Split(
      has_embedding ? grid.DenseRank(0, 0, 0, at.tp) : grid.world_size() + rank, rank, "embedding");
  parts.ep = world.Split(grid.ExpertRank(at.pp, at.edp, 0), rank, "ep");
  parts.edp = world.Split(grid.ExpertRank(at.pp, 0, at.ep), rank, "edp");
  if (expert_node_size > 1 && expert_node_size < grid.ep_size()) {
    CHECK_EQ(grid.ep_size() % expert_node_size, 0) << "ranks of ep in nodes";
    const int place = at.ep % expert_node_size;
    parts.expert_node =
        world.Split(grid.ExpertRank(at.pp, at.edp, at.ep - place), rank, "expert_node");
    parts.expert_across = world.Split(grid.ExpertRank(at.pp, at.edp, place), rank, "expert_across");
  }
  return parts;
}

GridCommunicators MakeSelfGrid() {
  GridCommunicators grid;
  for (const auto& [slot, name] : {std::pair{&grid.tp, "tp"},
                                   {&grid.cp, "cp"},
                                   {&grid.dp, "dp"},
                                   {&grid.pp, "pp"},
                                   {&grid.cp_tp, "cp_tp"},
                                   {&grid.dp_cp, "dp_cp"},
                                   {&grid.stage, "stage"},
                                   {&grid.embedding, "embedding"},
                                   {&grid.ep, "ep"},
                                   {&grid.edp, "edp"}}) {
    *slot = MakeSelfCommunicator(name);
  }
  return grid;
}

}  // namespace baleen
