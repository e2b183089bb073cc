#include "trainer/pretend_grid.h"

#include <algorithm>

namespace baleen {

GridCommunicators MakePretendGrid(const ProcessGrid& grid, int world_rank,
                                  const std::vector<int>& embedding_stages, int expert_node_size,
                                  CommunicationLog* log) {
  const ProcessGrid::Coordinates at = grid.At(world_rank);
  const int stage_ranks = grid.world_size() / grid.pp_size();
  const auto make = [&](const char* name, int rank, int size) {
    return MakePretendCommunicator(rank, size, name, log);
  };
  GridCommunicators axes;
  axes.tp = make("tp", at.tp, grid.tp_size());
  axes.cp = make("cp", at.cp, grid.cp_size());
  axes.dp = make("dp", at.dp, grid.dp_size());
  axes.pp = make("pp", at.pp, grid.pp_size());
  axes.cp_tp = make("cp_tp", at.cp * grid.tp_size() + at.tp, grid.cp_size() * grid.tp_size());
  const int dp_cp_rank = at.dp * grid.cp_size() + at.cp;
  const int dp_cp_size = grid.dp_size() * grid.cp_size();
  axes.dp_cp = make("dp_cp", dp_cp_rank, dp_cp_size);
  axes.stage = make("stage", world_rank % stage_ranks, stage_ranks);
  // The holders in the world's order: all of the first stage, then all of the next.
  const auto holder = std::find(embedding_stages.begin(), embedding_stages.end(), at.pp);
  if (holder == embedding_stages.end()) {
    axes.embedding = make("embedding", 0, 1);
  } else {
    const auto before = std::count_if(embedding_stages.begin(), embedding_stages.end(),
                                      [&](int stage) { return stage < at.pp; });
    axes.embedding = make("embedding", static_cast<int>(before) * dp_cp_size + dp_cp_rank,
                          static_cast<int>(embedding_stages.size()) * dp_cp_size);
  }
  axes.ep = make("ep", at.ep, grid.ep_size());
  axes.edp = make("edp", at.edp, grid.edp_size());
  if (expert_node_size > 1 && expert_node_size < grid.ep_size()) {
    axes.expert_node = make("expert_node", at.ep % expert_node_size, expert_node_size);
    axes.expert_across =
        make("expert_across", at.ep / expert_node_size, grid.ep_size() / expert_node_size);
  }
  return axes;
}

std::map<std::string, int> SpansOf(const StageLayout& layout) {
  const ProcessGrid& grid = layout.grid;
  const int tp = grid.tp_size(), cp_tp = grid.cp_size() * tp;
  const int stage = grid.world_size() / grid.pp_size();
  return {{"tp", tp},
          {"cp", cp_tp},
          {"dp", stage},
          {"pp", grid.world_size()},
          {"cp_tp", cp_tp},
          {"dp_cp", stage},
          {"stage", stage},
          {"embedding", layout.embedding_stages.size() > 1 ? grid.world_size() : stage},
          {"ep", grid.ep_size()},
          {"edp", stage},
          {"expert_node", layout.expert_node_size},
          {"expert_across", grid.ep_size()},
          {"world", grid.world_size()}};
}

}  // namespace baleen
