// The communicators of one rank along each axis of the grid.
//
// Beside the axes themselves there are the groups that own something together:
//   cp_tp      share the sequences of a microbatch: each holds its own rows of them
//   dp_cp      hold the same shards of the tensor-parallel parameters
//   stage      all ranks of a pipeline stage (dp_cp_tp): hold the same replicated parameters
//   embedding  hold the same shard of the embedding table: dp_cp of the stages that look tokens up
//              (the first, and the one with the MTP module)
#pragma once

#include <memory>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/process_grid.h"

namespace baleen {

struct GridCommunicators {
  std::unique_ptr<Communicator> tp;
  std::unique_ptr<Communicator> cp;
  std::unique_ptr<Communicator> dp;
  std::unique_ptr<Communicator> pp;
  std::unique_ptr<Communicator> cp_tp;  // in the order of cp, then tp
  std::unique_ptr<Communicator> dp_cp;
  std::unique_ptr<Communicator> stage;
  std::unique_ptr<Communicator> embedding;  // of one rank where the rank holds no embedding
  std::unique_ptr<Communicator> ep;
  std::unique_ptr<Communicator> edp;  // ranks that hold the same experts
  // Parts of ep for the exchange in two hops (expert_exchange.h); null: one hop.
  std::unique_ptr<Communicator> expert_node;    // consecutive ranks of ep: one node
  std::unique_ptr<Communicator> expert_across;  // the same place in each node
};

// Every rank of `world` calls it. `embedding_stages`: pipeline coordinates that hold the table.
// `expert_node_size`: ranks of ep in one node, a divisor of ep; 0, 1 or ep itself: one hop.
GridCommunicators SplitGrid(Communicator& world, const ProcessGrid& grid,
                            const std::vector<int>& embedding_stages, int expert_node_size = 0);

// One rank alone.
GridCommunicators MakeSelfGrid();

}  // namespace baleen
