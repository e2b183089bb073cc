// The communicators of one rank along each axis of the grid.
#pragma once

#include <memory>

#include "parallel/communicator.h"
#include "parallel/process_grid.h"

namespace baleen {

struct GridCommunicators {
  std::unique_ptr<Communicator> tp;
  std::unique_ptr<Communicator> cp;
  std::unique_ptr<Communicator> dp;
  std::unique_ptr<Communicator> pp;
  std::unique_ptr<Communicator>
      dp_cp;  // ranks that hold the same dense parameters (for one tp rank)
  std::unique_ptr<Communicator> ep;
  std::unique_ptr<Communicator> edp;  // ranks that hold the same experts
};

// Every rank of `world` calls it.
GridCommunicators SplitGrid(Communicator& world, const ProcessGrid& grid);

}  // namespace baleen
