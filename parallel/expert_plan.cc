// The plan of an exchange: how many rows go where, in which rounds, and in what order they lie.
#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/core/check.h"
#include "kernels/core/transfer.h"
#include "kernels/ops/moe/router.h"
#include "parallel/expert_exchange.h"

namespace baleen {
namespace {

int64_t Sum(const std::vector<int64_t>& counts) {
  int64_t sum = 0;
  for (const int64_t count : counts) sum += count;
  return sum;
}

// How ranks and experts lie: rank = node * node_size + place.
struct Topology {
  int64_t ranks, node_size, nodes, local_experts, experts;
  int64_t rank;
  bool two_hops;

  int64_t place() const { return rank % node_size; }
  int64_t node() const { return rank / node_size; }
};

Topology TopologyOf(const ExpertAxes& axes, int64_t num_experts) {
  CHECK_EQ(num_experts % axes.ep.size(), 0) << num_experts << " experts over " << axes.ep.size();
  CHECK((axes.node == nullptr) == (axes.across == nullptr));
  Topology topology;
  topology.ranks = axes.ep.size();
  topology.rank = axes.ep.rank();
  topology.experts = num_experts;
  topology.local_experts = num_experts / topology.ranks;
  topology.two_hops = axes.node != nullptr;
  topology.node_size = topology.two_hops ? axes.node->size() : topology.ranks;
  topology.nodes = topology.ranks / topology.node_size;
  if (topology.two_hops) {
    CHECK_EQ(axes.across->size(), topology.nodes);
    CHECK(axes.node->rank() == topology.place() && axes.across->rank() == topology.node())
        << "nodes must be consecutive ranks of ep";
  }
  return topology;
}

struct Range {
  int64_t begin, end;
};

// What every rank sends, chunk by chunk: rows for each expert, and with two hops tokens for each
// node.
class CountTable {
 public:
  CountTable(const Topology& topology, int64_t chunks, const Tensor& whole)
      : topology_(topology), chunks_(chunks), whole_(whole) {}

  int64_t Rows(int64_t source, Range chunks, int64_t expert) const {
    return SumOver(source, chunks, expert);
  }
  int64_t Tokens(int64_t source, Range chunks, int64_t node) const {
    return SumOver(source, chunks, topology_.experts + node);
  }
  int64_t RowsToRank(int64_t source, Range chunks, int64_t rank) const {
    int64_t rows = 0;
    for (int64_t l = 0; l < topology_.local_experts; ++l) {
      rows += Rows(source, chunks, rank * topology_.local_experts + l);
    }
    return rows;
  }
  // All that `rank` takes in: rows for its experts, and tokens on their way into its node.
  int64_t HeldRows(Range chunks, int64_t rank) const {
    int64_t rows = 0;
    for (int64_t source = 0; source < topology_.ranks; ++source) {
      rows += RowsToRank(source, chunks, rank);
    }
    if (!topology_.two_hops) return rows;
    const int64_t place = rank % topology_.node_size, node = rank / topology_.node_size;
    for (int64_t from = 0; from < topology_.nodes; ++from) {
      rows += Tokens(from * topology_.node_size + place, chunks, node);
    }
    return rows;
  }
  int64_t chunks() const { return chunks_; }

  static int64_t Columns(const Topology& topology) {
    return topology.experts + (topology.two_hops ? topology.nodes : 0);
  }

 private:
  int64_t SumOver(int64_t source, Range chunks, int64_t column) const {
    const int64_t columns = Columns(topology_);
    const int64_t* const counts = whole_.data<int64_t>() + source * chunks_ * columns;
    int64_t sum = 0;
    for (int64_t chunk = chunks.begin; chunk < chunks.end; ++chunk) {
      sum += counts[chunk * columns + column];
    }
    return sum;
  }

  Topology topology_;
  int64_t chunks_;
  Tensor whole_;  // kI64 [ranks, chunks, Columns()], in host memory
};

// The same on every rank, since every rank has the same table.
std::vector<Range> JoinChunks(const Topology& topology, const CountTable& counts,
                              int64_t max_rows) {
  std::vector<Range> rounds = {{0, 0}};
  std::vector<int64_t> held(topology.ranks, 0);  // by each rank in the last round
  for (int64_t chunk = 0; chunk < counts.chunks(); ++chunk) {
    std::vector<int64_t> more(topology.ranks);
    bool fits = true;
    for (int64_t rank = 0; rank < topology.ranks; ++rank) {
      more[rank] = counts.HeldRows({chunk, chunk + 1}, rank);
      CHECK(max_rows == 0 || more[rank] <= max_rows) << more[rank] << " rows in one chunk";
      fits = fits && (max_rows == 0 || held[rank] + more[rank] <= max_rows);
    }
    if (!fits) {
      rounds.push_back({chunk, chunk});
      std::fill(held.begin(), held.end(), 0);
    }
    rounds.back().end = chunk + 1;
    for (int64_t rank = 0; rank < topology.ranks; ++rank) held[rank] += more[rank];
  }
  return rounds;
}

}  // namespace

// Makes the rounds of one plan.
class ExpertPlanner {
 public:
  ExpertPlanner(const Context& context, const ExpertAxes& axes, const ExpertPlanParams& params,
                const Tensor& ids_TA)
      : context_(context),
        axes_(axes),
        params_(params),
        ids_TA_(ids_TA),
        topology_(TopologyOf(axes, params.num_experts)) {
    CHECK_LE(ids_TA.dim(0), params.max_tokens) << params.label;
    if (topology_.two_hops) {
      nodes_TM_ =
          GroupsOfTokens(context, ids_TA, topology_.nodes, topology_.experts / topology_.nodes);
    }
  }

  ExpertPlan Make() {
    const CountTable counts = ExchangeCounts();
    ExpertPlan plan;
    for (const Range& chunks : JoinChunks(topology_, counts, params_.max_rows)) {
      plan.rounds.push_back(MakeRound(counts, chunks));
    }
    return plan;
  }

 private:
  Range TokensOf(Range chunks) const {
    return {std::min(chunks.begin * chunk_tokens_, ids_TA_.dim(0)),
            std::min(chunks.end * chunk_tokens_, ids_TA_.dim(0))};
  }

  // The largest chunk of which the worst case fits, then evened out.
  int64_t CutChunks() {
    const int64_t tokens = std::max<int64_t>(1, params_.max_tokens);
    int64_t largest = tokens;
    if (params_.max_rows > 0) {
      const int64_t minimum =
          MinimumExpertRows(topology_.ranks, topology_.local_experts, ids_TA_.dim(1),
                            topology_.two_hops ? topology_.node_size : 0);
      CHECK_GE(params_.max_rows, minimum) << params_.label << ": bound on expert rows";
      largest = std::min(tokens, params_.max_rows / minimum);
    }
    const int64_t chunks = (tokens + largest - 1) / largest;
    chunk_tokens_ = (tokens + chunks - 1) / chunks;
    return chunks;
  }

  // One rank holds all experts: what it takes in is known without asking the device which.
  CountTable CountsOfOneRank(int64_t chunks) const {
    const Tensor counts =
        Context::Cpu().Zeros(DType::kI64, {chunks, CountTable::Columns(topology_)});
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Range tokens = TokensOf({chunk, chunk + 1});
      counts.data<int64_t>()[chunk * counts.dim(1)] = (tokens.end - tokens.begin) * ids_TA_.dim(1);
    }
    return CountTable(topology_, chunks, counts);
  }

  CountTable ExchangeCounts() {
    const int64_t chunks = CutChunks(), columns = CountTable::Columns(topology_);
    if (topology_.ranks == 1) return CountsOfOneRank(chunks);
    const Tensor own = context_.Zeros(DType::kI64, {chunks, columns});
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const Range tokens = TokensOf({chunk, chunk + 1});
      CountExperts(context_, ids_TA_.Rows(tokens.begin, tokens.end),
                   own.Flat(chunk * columns, topology_.experts));
      if (!topology_.two_hops) continue;
      CountExperts(context_, nodes_TM_.Rows(tokens.begin, tokens.end),
                   own.Flat(chunk * columns + topology_.experts, topology_.nodes));
    }
    const Tensor whole = context_.Empty(DType::kI64, {topology_.ranks * chunks, columns});
    axes_.ep.AllGather(absl::StrCat(params_.label, " counts"), own, whole);
    // The one wait for the device in a layer: how many rows go where decides what is allocated.
    return CountTable(topology_, chunks, CopyToHost(context_, whole));
  }

  // Rows from rank s of the axis for local expert l come one behind the other: by source, expert,
  // token.
  void SetArrivals(const std::vector<std::vector<int64_t>>& rows_SL, ExpertHop& hop) const {
    hop.recv_rows.clear();
    for (const auto& of_source : rows_SL) hop.recv_rows.push_back(Sum(of_source));
    const int64_t rows = Sum(hop.recv_rows);
    const Context host = context_.Host();
    const Tensor expert_N1 = host.Empty(DType::kI32, {rows, 1});
    int32_t* next = expert_N1.data<int32_t>();
    for (const auto& of_source : rows_SL) {
      for (size_t l = 0; l < of_source.size(); ++l) {
        next = std::fill_n(next, of_source[l], static_cast<int32_t>(l));
      }
    }
    const int64_t experts = static_cast<int64_t>(rows_SL[0].size());
    hop.arrivals = BuildPermutation(context_, CopyToDevice(context_, expert_N1), 0, experts, rows);
    hop.sorted = experts == 1;
  }

  // From place to place between the nodes: the "experts" of this hop are nodes.
  ExpertHop MakeOuterHop(const CountTable& counts, Range chunks, Range tokens) const {
    ExpertHop hop;
    hop.axis = axes_.across;
    std::vector<std::vector<int64_t>> rows;
    for (int64_t node = 0; node < topology_.nodes; ++node) {
      hop.send_rows.push_back(counts.Tokens(topology_.rank, chunks, node));
      const int64_t source = node * topology_.node_size + topology_.place();
      rows.push_back({counts.Tokens(source, chunks, topology_.node())});
    }
    hop.send = BuildPermutation(context_, nodes_TM_.Rows(tokens.begin, tokens.end), 0,
                                topology_.nodes, Sum(hop.send_rows));
    SetArrivals(rows, hop);
    return hop;
  }

  // To the experts of the node (of all ranks with one hop). A rank of the node speaks for all ranks
  // of its place.
  ExpertHop MakeInnerHop(const CountTable& counts, Range chunks, const Tensor& ids_VA) const {
    const int64_t size = topology_.node_size, local = topology_.local_experts;
    const int64_t first_rank = topology_.node() * size;
    ExpertHop hop;
    hop.axis = topology_.two_hops ? axes_.node : &axes_.ep;
    std::vector<std::vector<int64_t>> rows(size, std::vector<int64_t>(local, 0));
    hop.send_rows.assign(size, 0);
    for (int64_t place = 0; place < size; ++place) {
      for (int64_t node = 0; node < topology_.nodes; ++node) {
        hop.send_rows[place] +=
            counts.RowsToRank(node * size + topology_.place(), chunks, first_rank + place);
        for (int64_t l = 0; l < local; ++l) {
          rows[place][l] += counts.Rows(node * size + place, chunks, topology_.rank * local + l);
        }
      }
    }
    hop.send =
        BuildPermutation(context_, ids_VA, first_rank * local, size * local, Sum(hop.send_rows));
    if (size > 1) SetArrivals(rows, hop);
    return hop;
  }

  ExpertRound MakeRound(const CountTable& counts, Range chunks) const {
    const Range tokens = TokensOf(chunks);
    ExpertRound round;
    round.begin_ = tokens.begin;
    round.end_ = tokens.end;
    round.held_rows_ = counts.HeldRows(chunks, topology_.rank);
    round.dispatch_label_ = absl::StrCat(params_.label, " dispatch");
    round.combine_label_ = absl::StrCat(params_.label, " combine");
    if (topology_.two_hops) round.outer_ = MakeOuterHop(counts, chunks, tokens);
    const Tensor ids_VA = round.ToNode(context_, absl::StrCat(params_.label, " ids"),
                                       ids_TA_.Rows(tokens.begin, tokens.end));
    round.inner_ = MakeInnerHop(counts, chunks, ids_VA);
    return round;
  }

  const Context& context_;
  const ExpertAxes& axes_;
  const ExpertPlanParams& params_;
  const Tensor& ids_TA_;
  const Topology topology_;
  Tensor nodes_TM_;
  int64_t chunk_tokens_ = 0;
};

int64_t MinimumExpertRows(int64_t ep_size, int64_t experts_per_rank, int64_t top_k,
                          int64_t node_size) {
  const int64_t in_transit = node_size > 0 ? ep_size / node_size : 0;
  return ep_size * std::min(top_k, experts_per_rank) + in_transit;
}

int64_t ExpertPlan::max_held_rows() const {
  int64_t most = 0;
  for (const ExpertRound& round : rounds) most = std::max(most, round.held_rows());
  return most;
}

ExpertPlan MakeExpertPlan(const Context& context, const ExpertAxes& axes,
                          const ExpertPlanParams& params, const Tensor& ids_TA) {
  return ExpertPlanner(context, axes, params, ids_TA).Make();
}

}  // namespace baleen
