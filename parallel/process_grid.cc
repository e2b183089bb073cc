#include "parallel/process_grid.h"

#include <algorithm>
#include <cstdlib>

#include "kernels/core/check.h"

namespace baleen {
namespace {

// World sizes nearest to the asked one that the dense product divides.
std::string NearestWorlds(int world_size, int product) {
  const int below = world_size / product * product;
  const int above = below + product;
  return below > 0 ? absl::StrCat(below, " or ", above) : absl::StrCat(above);
}

// Expert sizes that divide the ranks of one pipeline stage, nearest to the asked one first.
std::string NearestDivisors(int number, int wanted) {
  std::vector<int> divisors;
  for (int d = 1; d <= number; ++d) {
    if (number % d == 0) divisors.push_back(d);
  }
  std::stable_sort(divisors.begin(), divisors.end(),
                   [&](int a, int b) { return std::abs(a - wanted) < std::abs(b - wanted); });
  if (divisors.size() == 1) return absl::StrCat(divisors[0]);
  return absl::StrCat(divisors[0], " or ", divisors[1]);
}

}  // namespace

absl::StatusOr<ProcessGrid> ProcessGrid::Make(int world_size, const ParallelLayout& layout) {
  CHECK_GE(world_size, 1);
  for (const auto& [name, value] : {std::pair<const char*, int>{"tensor", layout.tensor},
                                    {"pipeline", layout.pipeline},
                                    {"expert", layout.expert},
                                    {"context", layout.context}}) {
    if (value < 1) return ConfigError("parallelism.", name, " = ", value, ": expected 1 or more");
  }
  const int64_t product = int64_t{layout.tensor} * layout.pipeline * layout.context;
  if (product > 1'000'000 || world_size % product != 0) {
    return ConfigError("parallelism: tensor ", layout.tensor, " x pipeline ", layout.pipeline,
                       " x context ", layout.context, " = ", product, " does not divide the ",
                       world_size, " ranks of this job; with this layout start ",
                       product > 1'000'000 ? absl::StrCat(product)
                                           : NearestWorlds(world_size, static_cast<int>(product)),
                       " ranks, or lower one of the three");
  }
  ProcessGrid grid;
  grid.world_size_ = world_size;
  grid.layout_ = layout;
  grid.dp_size_ = static_cast<int>(world_size / product);
  const int stage_ranks = world_size / layout.pipeline;
  if (stage_ranks % layout.expert != 0) {
    return ConfigError("parallelism.expert = ", layout.expert, " does not divide the ", stage_ranks,
                       " ranks of a pipeline stage (data ", grid.dp_size_, " x context ",
                       layout.context, " x tensor ", layout.tensor,
                       "); nearest that fit: ", NearestDivisors(stage_ranks, layout.expert));
  }
  grid.edp_size_ = stage_ranks / layout.expert;
  return grid;
}

ProcessGrid::Coordinates ProcessGrid::At(int world_rank) const {
  CHECK(world_rank >= 0 && world_rank < world_size_) << world_rank << " of " << world_size_;
  const int stage_ranks = world_size_ / layout_.pipeline;
  const int inside = world_rank % stage_ranks;
  Coordinates at;
  at.pp = world_rank / stage_ranks;
  at.tp = inside % layout_.tensor;
  at.cp = inside / layout_.tensor % layout_.context;
  at.dp = inside / layout_.tensor / layout_.context;
  at.ep = inside % layout_.expert;
  at.edp = inside / layout_.expert;
  return at;
}

int ProcessGrid::DenseRank(int pp, int dp, int cp, int tp) const {
  return ((pp * dp_size_ + dp) * layout_.context + cp) * layout_.tensor + tp;
}

int ProcessGrid::ExpertRank(int pp, int edp, int ep) const {
  return (pp * edp_size_ + edp) * layout_.expert + ep;
}

std::string ProcessGrid::DebugString() const {
  return absl::StrCat("pp ", layout_.pipeline, " x dp ", dp_size_, " x cp ", layout_.context,
                      " x tp ", layout_.tensor, " (experts: edp ", edp_size_, " x ep ",
                      layout_.expert, ")");
}

}  // namespace baleen
