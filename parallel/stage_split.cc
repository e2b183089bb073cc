// The solver of the stage split. A part's cost is a difference of prefix sums. Dynamic programming
// over (part, first layer) finds the best split of one part a rank, over (rank, layers taken from
// two rows) the least largest rank of two parts a rank; where ranks have several parts, single
// layers are then handed from part to part.
#include "parallel/stage_split.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "kernels/core/check.h"

namespace baleen {
namespace {

using Split = std::vector<int64_t>;

constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// Costs in whole units, 2^28 in all: equal layers tie exactly, and sums of squares fit 64 bits.
class PartCosts {
 public:
  PartCosts(const StageCosts& costs, int num_parts) : num_parts_(num_parts) {
    double sum = costs.embedding + costs.head;
    for (const double layer : costs.layers) sum += layer;
    // Where nothing costs anything, a layer counts as one.
    const bool costless = sum == 0;
    if (costless) sum = static_cast<double>(costs.layers.size());
    const auto units = [sum](double cost) { return std::llround(std::ldexp(cost / sum, 28)); };
    embedding_ = units(costs.embedding);
    head_ = units(costs.head);
    for (const double layer : costs.layers) {
      before_.push_back(before_.back() + units(costless ? 1 : layer));
    }
  }

  int num_parts() const { return num_parts_; }
  int64_t num_layers() const { return static_cast<int64_t>(before_.size()) - 1; }
  bool IsLast(int part) const { return part == num_parts_ - 1; }

  // Of `part` with layers [begin, end).
  int64_t Of(int part, int64_t begin, int64_t end) const {
    return before_[end] - before_[begin] + (part == 0 ? embedding_ : 0) +
           (IsLast(part) ? head_ : 0);
  }

  std::vector<int64_t> OfParts(const Split& split) const {
    std::vector<int64_t> costs;
    int64_t begin = 0;
    for (int part = 0; part < num_parts_; ++part) {
      costs.push_back(Of(part, begin, begin + split[part]));
      begin += split[part];
    }
    return costs;
  }

 private:
  int num_parts_;
  int64_t embedding_ = 0;
  int64_t head_ = 0;
  std::vector<int64_t> before_ = {0};  // [num_layers + 1]
};

// best[part][begin]: the least of what `join` makes of a part's cost and the rest's best, for the
// parts from `part` on with the layers from `begin` on; kNever where they cannot be laid out.
template <typename Join>
std::vector<std::vector<int64_t>> BestOfRest(const PartCosts& costs, Join join) {
  const int64_t layers = costs.num_layers();
  const int parts = costs.num_parts();
  std::vector<std::vector<int64_t>> best(parts + 1, std::vector<int64_t>(layers + 1, kNever));
  best[parts][layers] = 0;
  for (int part = parts - 1; part >= 0; --part) {
    for (int64_t begin = 0; begin <= layers; ++begin) {
      for (int64_t end = begin + (costs.IsLast(part) ? 0 : 1); end <= layers; ++end) {
        if (best[part + 1][end] == kNever) continue;
        best[part][begin] =
            std::min(best[part][begin], join(costs.Of(part, begin, end), best[part + 1][end]));
      }
    }
  }
  return best;
}

// The least largest part; among those the least sum of squares; among those fewer layers first.
Split SplitOnePartARank(const PartCosts& costs) {
  const int64_t largest =
      BestOfRest(costs, [](int64_t part, int64_t rest) { return std::max(part, rest); })[0][0];
  const auto squares = [largest](int64_t part, int64_t rest) {
    return part > largest ? kNever : part * part + rest;
  };
  const auto best = BestOfRest(costs, squares);
  Split split;
  int64_t begin = 0;
  for (int part = 0; part < costs.num_parts(); ++part) {
    int64_t end = begin + (costs.IsLast(part) ? 0 : 1);
    while (best[part + 1][end] == kNever ||
           squares(costs.Of(part, begin, end), best[part + 1][end]) != best[part][begin]) {
      ++end;
    }
    split.push_back(end - begin);
    begin = end;
  }
  return split;
}

int64_t Largest(const std::vector<int64_t>& costs) {
  return *std::max_element(costs.begin(), costs.end());
}

int64_t SquareSum(const std::vector<int64_t>& costs) {
  int64_t sum = 0;
  for (const int64_t cost : costs) sum += cost * cost;
  return sum;
}

std::vector<int64_t> RankSums(const std::vector<int64_t>& parts,
                              const std::vector<int>& part_rank) {
  std::vector<int64_t> sums(*std::max_element(part_rank.begin(), part_rank.end()) + 1, 0);
  for (size_t part = 0; part < parts.size(); ++part) sums[part_rank[part]] += parts[part];
  return sums;
}

// Hands one layer from a part to another, each time where `score` (less is better) falls most,
// until it falls no more. The parts between keep their number of layers.
template <typename Score>
Split HandLayersOver(Split split, const PartCosts& costs, Score score) {
  for (;;) {
    Split best = split;
    auto least = score(split);
    for (int from = 0; from < costs.num_parts(); ++from) {
      if (split[from] <= (costs.IsLast(from) ? 0 : 1)) continue;
      for (int to = 0; to < costs.num_parts(); ++to) {
        Split handed = split;
        --handed[from];
        ++handed[to];
        auto handed_score = score(handed);
        if (handed_score >= least) continue;
        least = std::move(handed_score);
        best = std::move(handed);
      }
    }
    if (best == split) return split;
    split = std::move(best);
  }
}

int NumRanks(const std::vector<int>& part_rank) {
  return static_cast<int>(std::set<int>(part_rank.begin(), part_rank.end()).size());
}

// Two parts a rank: r and P + r (loop), or r and 2P - 1 - r (V). With the first parts sharing
// layers [0, middle) and the second parts the rest, ranks 0, 1, ... take from both: the second
// parts of a loop from `middle` on, those of a V from the end down. So dynamic programming over
// (rank, layers taken from the first, from the second) finds the least largest rank.
class TwoPartsARank {
 public:
  TwoPartsARank(const PartCosts& costs, bool is_v)
      : costs_(costs), num_ranks_(costs.num_parts() / 2), is_v_(is_v) {}

  // `split`, or a split whose largest rank is less than its `largest` and the least of all.
  Split Improve(Split split, int64_t largest) {
    for (int64_t middle = num_ranks_; middle <= costs_.num_layers(); ++middle) {
      if (Solve(middle, largest) >= largest) continue;
      largest = best_[0].At(0, 0);
      split = Trace(middle);
    }
    return split;
  }

 private:
  // For the ranks from one on: the least largest, by layers taken from the first and second parts.
  struct Table {
    int64_t width = 0;
    std::vector<int64_t> values;
    int64_t& At(int64_t first, int64_t second) { return values[first * width + second]; }
  };

  int SecondPart(int rank) const {
    return is_v_ ? costs_.num_parts() - 1 - rank : num_ranks_ + rank;
  }
  int64_t LeastSecond(int rank) const { return costs_.IsLast(SecondPart(rank)) ? 0 : 1; }
  int64_t CostOfSecond(int rank, int64_t middle, int64_t taken, int64_t layers) const {
    const int64_t begin = is_v_ ? costs_.num_layers() - taken - layers : middle + taken;
    return costs_.Of(SecondPart(rank), begin, begin + layers);
  }

  // Calls body(first, second, cost) for what the rank may take at a cost below `bound`.
  template <typename Body>
  void ForChoices(int rank, int64_t middle, int64_t from_first, int64_t from_second, int64_t bound,
                  Body body) const {
    const int64_t seconds = costs_.num_layers() - middle;
    for (int64_t first = 1; from_first + first <= middle; ++first) {
      const int64_t first_cost = costs_.Of(rank, from_first, from_first + first);
      if (first_cost >= bound) return;
      for (int64_t second = LeastSecond(rank); from_second + second <= seconds; ++second) {
        const int64_t cost = first_cost + CostOfSecond(rank, middle, from_second, second);
        if (cost >= bound) break;
        body(first, second, cost);
      }
    }
  }

  // The least largest rank if it is below `bound`; otherwise `bound` or more.
  int64_t Solve(int64_t middle, int64_t bound) {
    const int64_t seconds = costs_.num_layers() - middle;
    const Table never = {seconds + 1, std::vector<int64_t>((middle + 1) * (seconds + 1), kNever)};
    best_.assign(num_ranks_ + 1, never);
    best_[num_ranks_].At(middle, seconds) = 0;
    for (int rank = num_ranks_ - 1; rank >= 0; --rank) {
      for (int64_t i = rank; i <= (rank == 0 ? 0 : middle); ++i) {
        for (int64_t j = 0; j <= (rank == 0 ? 0 : seconds); ++j) {
          int64_t& best = best_[rank].At(i, j);
          ForChoices(rank, middle, i, j, bound, [&](int64_t first, int64_t second, int64_t cost) {
            best = std::min(best, std::max(cost, best_[rank + 1].At(i + first, j + second)));
          });
        }
      }
    }
    return best_[0].At(0, 0);
  }

  // A split that has what Solve found.
  Split Trace(int64_t middle) {
    const int64_t largest = best_[0].At(0, 0);
    Split split(costs_.num_parts(), 0);
    int64_t i = 0, j = 0;
    for (int rank = 0; rank < num_ranks_; ++rank) {
      bool found = false;
      ForChoices(rank, middle, i, j, largest + 1, [&](int64_t first, int64_t second, int64_t) {
        if (found || best_[rank + 1].At(i + first, j + second) > largest) return;
        found = true;
        split[rank] = first;
        split[SecondPart(rank)] = second;
      });
      CHECK(found) << "rank " << rank << " of a split with largest rank " << largest;
      i += split[rank];
      j += split[SecondPart(rank)];
    }
    return split;
  }

  const PartCosts& costs_;
  const int num_ranks_;
  const bool is_v_;
  std::vector<Table> best_;  // [num_ranks + 1]
};

bool IsLoop(const std::vector<int>& part_rank, int num_ranks) {
  for (size_t part = 0; part < part_rank.size(); ++part) {
    if (part_rank[part] != static_cast<int>(part) % num_ranks) return false;
  }
  return true;
}

bool IsV(const std::vector<int>& part_rank, int num_ranks) {
  const auto turn = part_rank.begin() + static_cast<int64_t>(part_rank.size()) / 2;
  return IsLoop(std::vector<int>(part_rank.begin(), turn), num_ranks) &&
         std::equal(part_rank.begin(), turn, part_rank.rbegin());
}

// First even ranks, then even parts where no rank's cost stands against it.
Split SplitSeveralPartsARank(const PartCosts& costs, const std::vector<int>& part_rank) {
  Split split = SplitOnePartARank(costs);
  const int ranks = NumRanks(part_rank);
  const bool is_v = IsV(part_rank, ranks);
  if (costs.num_parts() == 2 * ranks && (is_v || IsLoop(part_rank, ranks))) {
    const int64_t largest = Largest(RankSums(costs.OfParts(split), part_rank));
    split = TwoPartsARank(costs, is_v).Improve(split, largest);
  }
  return HandLayersOver(split, costs, [&](const Split& handed) {
    const auto parts = costs.OfParts(handed);
    const auto sums = RankSums(parts, part_rank);
    std::vector<int64_t> score = {Largest(sums), Largest(parts), SquareSum(parts)};
    score.insert(score.end(), handed.begin(), handed.end());
    return score;
  });
}

void CheckCosts(const StageCosts& costs, const std::vector<int>& part_rank) {
  CHECK(!part_rank.empty()) << "a split into no parts";
  for (const int rank : part_rank) {
    CHECK(rank >= 0) << "parts on ranks " << absl::StrJoin(part_rank, ",");
  }
  const auto usual = [](double cost) { return std::isfinite(cost) && cost >= 0; };
  CHECK(usual(costs.embedding) && usual(costs.head))
      << "embedding " << costs.embedding << ", head " << costs.head;
  for (const double layer : costs.layers) {
    CHECK(usual(layer)) << "layers " << absl::StrJoin(costs.layers, ",");
  }
}

absl::Status TooFewLayers(int64_t num_layers, const std::vector<int>& part_rank) {
  const int parts = static_cast<int>(part_rank.size());
  const int ranks = NumRanks(part_rank);
  const int parts_a_rank = parts / ranks;
  const int64_t most = num_layers == 0 ? 0 : num_layers + 1;
  std::vector<std::string> fits;
  if (most >= parts_a_rank) {
    fits.push_back(absl::StrCat("pipeline ", most / parts_a_rank, " x ", parts_a_rank));
  }
  if (parts_a_rank > 1 && most > 0) {
    fits.push_back(absl::StrCat("pipeline ", std::min<int64_t>(ranks, most), " x 1"));
  }
  return ConfigError("splitting ", num_layers, " layers into ", parts, " pipeline parts (pipeline ",
                     ranks, " x ", parts_a_rank, " on a rank): every part but the last needs a ",
                     "layer; at most ", most, " parts fit", fits.empty() ? "" : ": ",
                     absl::StrJoin(fits, ", or "));
}

// "embedding, layers 0..15", "no layers, head".
std::string PartContent(int part, int num_parts, int64_t begin, int64_t end) {
  const std::string layers = end == begin       ? "no layers"
                             : end == begin + 1 ? absl::StrCat("layer ", begin)
                                                : absl::StrCat("layers ", begin, "..", end - 1);
  return absl::StrCat(part == 0 ? "embedding, " : "", layers,
                      part == num_parts - 1 ? ", head" : "");
}

}  // namespace

absl::StatusOr<std::vector<int64_t>> SplitLayers(const StageCosts& costs,
                                                 const std::vector<int>& part_rank) {
  CheckCosts(costs, part_rank);
  const int parts = static_cast<int>(part_rank.size());
  const int64_t layers = static_cast<int64_t>(costs.layers.size());
  if (layers == 0 || layers < parts - 1) return TooFewLayers(layers, part_rank);
  const PartCosts units(costs, parts);
  return NumRanks(part_rank) == parts ? SplitOnePartARank(units)
                                      : SplitSeveralPartsARank(units, part_rank);
}

absl::Status CheckLayerSplit(const std::vector<int64_t>& split, int num_parts, int64_t num_layers) {
  std::vector<std::string> faults;
  if (static_cast<int>(split.size()) != num_parts) {
    faults.push_back(absl::StrCat("has ", split.size(), " numbers, expected ", num_parts,
                                  ", one for each pipeline part"));
  }
  int64_t sum = 0;
  for (size_t part = 0; part < split.size(); ++part) {
    const int64_t layers = split[part];
    if (layers < 0 || layers > num_layers) {
      faults.push_back(absl::StrCat("part ", part, " has ", layers, " layers of ", num_layers));
    }
    // Only the last part has something else to hold, the head.
    if (layers == 0 && static_cast<int>(part) < num_parts - 1) {
      faults.push_back(absl::StrCat("part ", part, " has no layers; only the last, part ",
                                    num_parts - 1, ", may have none"));
    }
    // Numbers out of range were named above; what is added stays small.
    sum += std::clamp<int64_t>(layers, 0, num_layers);
  }
  if (sum != num_layers) {
    faults.push_back(
        absl::StrCat("the sum is ", sum, ", expected the model's ", num_layers, " layers"));
  }
  if (faults.empty()) return absl::OkStatus();
  return ConfigError("parallelism.layer_split = [", absl::StrJoin(split, ", "),
                     "]: ", absl::StrJoin(faults, "; "),
                     ". Leave it out and the layers are split by cost");
}

std::string LayerSplitTable(const std::vector<int64_t>& split, const StageCosts& costs,
                            const std::vector<int>& part_rank) {
  CHECK_OK(CheckLayerSplit(split, static_cast<int>(part_rank.size()),
                           static_cast<int64_t>(costs.layers.size())));
  const int parts = static_cast<int>(split.size());
  std::vector<double> rank_cost(*std::max_element(part_rank.begin(), part_rank.end()) + 1, 0);
  std::vector<double> part_cost;
  std::vector<std::string> contents;
  size_t width = 0;
  double whole = 0;
  int64_t begin = 0;
  for (int part = 0; part < parts; ++part) {
    const int64_t end = begin + split[part];
    double cost = (part == 0 ? costs.embedding : 0) + (part == parts - 1 ? costs.head : 0);
    for (int64_t layer = begin; layer < end; ++layer) cost += costs.layers[layer];
    part_cost.push_back(cost);
    rank_cost[part_rank[part]] += cost;
    whole += cost;
    contents.push_back(PartContent(part, parts, begin, end));
    width = std::max(width, contents.back().size());
    begin = end;
  }
  const auto percent = [whole](double cost) { return whole > 0 ? 100 * cost / whole : 0; };
  std::string text;
  for (int part = 0; part < parts; ++part) {
    const int rank = part_rank[part];
    absl::StrAppend(
        &text, absl::StrFormat("part %-2d rank %-2d %-*s %5.1f %%", part, rank,
                               static_cast<int>(width), contents[part], percent(part_cost[part])));
    if (NumRanks(part_rank) < parts) {
      absl::StrAppend(&text, absl::StrFormat("  rank %5.1f %%", percent(rank_cost[rank])));
    }
    text += "\n";
  }
  return text;
}

}  // namespace baleen
