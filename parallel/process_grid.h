// ProcessGrid: which rank does what. Arithmetic only; communicators are cut along it by
// grid_communicators.h.
//
// Dense axes [pp, dp, cp, tp], the last the fastest: tp neighbours are neighbouring ranks. Over the
// same ranks the experts see axes [pp, edp, ep] with edp * ep = dp * cp * tp (folded: experts are
// not tensor-parallel).
#pragma once

#include <string>
#include <vector>

#include "kernels/core/status.h"

namespace baleen {

// The sizes a run file asks for; data parallelism is what is left of the world.
struct ParallelLayout {
  int tensor = 1;
  int pipeline = 1;
  int expert = 1;
  int context = 1;
};

class ProcessGrid {
 public:
  // ConfigError with the product that does not fit and the nearest layouts that would.
  static absl::StatusOr<ProcessGrid> Make(int world_size, const ParallelLayout& layout);

  int world_size() const { return world_size_; }
  int tp_size() const { return layout_.tensor; }
  int cp_size() const { return layout_.context; }
  int pp_size() const { return layout_.pipeline; }
  int ep_size() const { return layout_.expert; }
  int dp_size() const { return dp_size_; }
  int edp_size() const { return edp_size_; }

  // A rank's place on each axis.
  struct Coordinates {
    int pp = 0, dp = 0, cp = 0, tp = 0;  // dense
    int edp = 0, ep = 0;                 // expert (pp is the same)
  };
  Coordinates At(int world_rank) const;
  int DenseRank(int pp, int dp, int cp, int tp) const;
  int ExpertRank(int pp, int edp, int ep) const;

  std::string DebugString() const;  // "pp 2 x dp 2 x cp 1 x tp 2 (experts: edp 2 x ep 2)"

 private:
  int world_size_ = 1;
  ParallelLayout layout_;
  int dp_size_ = 1;
  int edp_size_ = 1;
};

}  // namespace baleen
