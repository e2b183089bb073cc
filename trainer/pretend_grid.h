// The communicators of one rank of a grid that does not exist, as SplitGrid cuts them.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "parallel/grid_communicators.h"
#include "parallel/pretend_communicator.h"
#include "trainer/stage_layout.h"

namespace baleen {

GridCommunicators MakePretendGrid(const ProcessGrid& grid, int world_rank,
                                  const std::vector<int>& embedding_stages, int expert_node_size,
                                  CommunicationLog* log);

// By the communicator's name: ranks from its first to its last member. Does it leave a node?
std::map<std::string, int> SpansOf(const StageLayout& layout);

}  // namespace baleen
