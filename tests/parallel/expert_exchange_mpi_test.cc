// The exchange of expert parallelism on real MPI ranks against a dense reference over all tokens:
// every routing that hurts, any number of ranks, one hop and two, any bound on the rows held.
// An "expert" here scales its rows: expert e gives out = w * s_e * x, elementwise.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <map>
#include <numeric>
#include <random>

#include "kernels/ops/elementwise.h"
#include "kernels/ops/moe/slot_values.h"
#include "parallel/expert_exchange.h"
#include "parallel/mpi_communicator.h"
#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::IntTensorOf;
using testing::RandomTensor;
using testing::RelativeError;
using testing::SameBits;
using testing::TensorOf;
using testing::ToDoubles;

constexpr double kTolerance = 1e-12;

enum class Routing { kRandom, kOneExpert, kSpareAnExpert, kSpareARank, kFirstRank };

struct Case {
  int64_t local_experts = 4;         // L
  int64_t top_k = 2;                 // A
  std::vector<int64_t> tokens = {};  // of each rank; repeated where there are more ranks
  Routing routing = Routing::kRandom;
  int64_t max_rows = 0;
  uint64_t seed = 1;
};

constexpr int64_t kWidth = 5;  // D

// What one rank brings; every rank can make every rank's.
struct Own {
  Tensor x_TD, ids_TA, weights_TA, dy_TD;
};

int64_t TokensOf(const Case& c, int rank) { return c.tokens[rank % c.tokens.size()]; }

// The experts that the routing allows to choose from, at least A of them.
std::vector<int32_t> Allowed(const Case& c, int ranks) {
  std::vector<int32_t> experts(c.local_experts * ranks);
  std::iota(experts.begin(), experts.end(), 0);
  const auto size = static_cast<int64_t>(experts.size());
  switch (c.routing) {
    case Routing::kRandom:
      break;
    case Routing::kOneExpert:
      experts = {static_cast<int32_t>(size - 1)};
      break;
    case Routing::kSpareAnExpert:
      if (size > c.top_k) experts.erase(experts.begin() + size / 2);
      break;
    case Routing::kSpareARank:
      if (size - c.local_experts >= c.top_k) {
        experts.erase(experts.begin(), experts.begin() + c.local_experts);
      }
      break;
    case Routing::kFirstRank:
      experts.resize(c.local_experts);
      break;
  }
  return experts;
}

Own MakeOwn(const Context& context, const Case& c, int ranks, int rank) {
  const int64_t T = TokensOf(c, rank), A = c.top_k;
  const uint64_t seed = c.seed * 1000 + rank;
  std::mt19937_64 random(seed);
  std::vector<int32_t> ids, allowed = Allowed(c, ranks);
  for (int64_t t = 0; t < T; ++t) {
    std::shuffle(allowed.begin(), allowed.end(), random);
    std::vector<int32_t> chosen(allowed.begin(), allowed.begin() + A);
    std::sort(chosen.begin(), chosen.end());
    ids.insert(ids.end(), chosen.begin(), chosen.end());
  }
  return {RandomTensor(context, DType::kF64, {T, kWidth}, seed), IntTensorOf(context, {T, A}, ids),
          RandomTensor(context, DType::kF64, {T, A}, seed + 1),
          RandomTensor(context, DType::kF64, {T, kWidth}, seed + 2)};
}

struct Result {
  Tensor y_TD, dx_TD, dweights_TA;
  Tensor dscale_LD;  // sum over the expert's rows of dout * x
};

// All that the formula says, token by token, with no exchange.
Result Reference(const Context& context, const Case& c, const Own& own, const Tensor& scale_ED) {
  const int64_t T = own.x_TD.dim(0), A = c.top_k;
  const double* const s = scale_ED.data<double>();
  const Result result{context.Zeros(DType::kF64, {T, kWidth}),
                      context.Zeros(DType::kF64, {T, kWidth}), context.Zeros(DType::kF64, {T, A}),
                      context.Zeros(DType::kF64, scale_ED.shape())};
  for (int64_t t = 0; t < T; ++t) {
    for (int64_t a = 0; a < A; ++a) {
      const int64_t expert = own.ids_TA.data<int32_t>()[t * A + a];
      const double weight = own.weights_TA.data<double>()[t * A + a];
      for (int64_t d = 0; d < kWidth; ++d) {
        const double x = own.x_TD.data<double>()[t * kWidth + d];
        const double dy = own.dy_TD.data<double>()[t * kWidth + d];
        const double scale = s[expert * kWidth + d];
        result.y_TD.data<double>()[t * kWidth + d] += weight * scale * x;
        result.dx_TD.data<double>()[t * kWidth + d] += weight * scale * dy;
        result.dweights_TA.data<double>()[t * A + a] += dy * scale * x;
        result.dscale_LD.data<double>()[expert * kWidth + d] += weight * dy * x;
      }
    }
  }
  return result;
}

// rows[n] * s of the row's expert * the row's weight.
Tensor Scale(const Context& context, const Tensor& rows_ND, const Tensor& weights_N,
             const Tensor& offsets_L1, const Tensor& scale_LD) {
  const Tensor out = Clone(context, rows_ND);
  for (int64_t l = 0; l < scale_LD.dim(0); ++l) {
    for (int64_t n = offsets_L1.data<int32_t>()[l]; n < offsets_L1.data<int32_t>()[l + 1]; ++n) {
      for (int64_t d = 0; d < kWidth; ++d) {
        out.data<double>()[n * kWidth + d] *=
            weights_N.data<double>()[n] * scale_LD.data<double>()[l * kWidth + d];
      }
    }
  }
  return out;
}

class ExpertExchangeTest : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    world_ = WrapMpiWorld().release();
    for (const int size : {1, 2, 3, 4, 8}) {
      if (size > world_->size()) continue;
      // The last part may be smaller than `size`: one more number of ranks.
      Parts& parts = parts_->emplace(size, Parts{}).first->second;
      parts.ep = world_->Split(world_->rank() / size, world_->rank(), "ep");
      const int rank = parts.ep->rank();
      for (const int node : {2, 4}) {
        if (parts.ep->size() % node != 0 || node >= parts.ep->size()) continue;
        parts.nodes[node] = {parts.ep->Split(rank / node, rank, "node"),
                             parts.ep->Split(rank % node, rank, "across")};
      }
    }
  }
  static void TearDownTestSuite() {
    delete parts_;
    delete world_;
  }

  struct Hops {
    std::unique_ptr<Communicator> node, across;
  };
  struct Parts {
    std::unique_ptr<Communicator> ep;
    std::map<int, Hops> nodes;  // by node size
  };

  // Node sizes of a part, one hop first.
  static std::vector<int> NodeSizes(const Parts& parts) {
    std::vector<int> sizes = {0};
    for (const auto& [size, hops] : parts.nodes) sizes.push_back(size);
    return sizes;
  }
  static ExpertAxes AxesOf(const Parts& parts, int node_size) {
    if (node_size == 0) return ExpertAxes{*parts.ep};
    const Hops& hops = parts.nodes.at(node_size);
    return ExpertAxes{*parts.ep, hops.node.get(), hops.across.get()};
  }
  static int64_t Minimum(const Case& c, const Parts& parts, int node_size) {
    return MinimumExpertRows(parts.ep->size(), c.local_experts, c.top_k, node_size);
  }

  // The rows at this rank's experts: sorted by expert, place of the source in its node, node,
  // token.
  Tensor ExpectedRows(const Case& c, const Parts& parts, int node_size) {
    const int ranks = parts.ep->size(), places = node_size == 0 ? ranks : node_size;
    std::vector<double> rows;
    for (int64_t l = 0; l < c.local_experts; ++l) {
      for (int order = 0; order < ranks; ++order) {
        const int nodes = ranks / places, source = order % nodes * places + order / nodes;
        const Own own = MakeOwn(context_, c, ranks, source);
        for (int64_t slot = 0; slot < own.ids_TA.num_elements(); ++slot) {
          if (own.ids_TA.data<int32_t>()[slot] != parts.ep->rank() * c.local_experts + l) continue;
          const double* const x = own.x_TD.data<double>() + slot / c.top_k * kWidth;
          rows.insert(rows.end(), x, x + kWidth);
        }
      }
    }
    return TensorOf(context_, DType::kF64, {static_cast<int64_t>(rows.size()) / kWidth, kWidth},
                    rows);
  }

  // Forward and backward through the exchange; checks the plan on the way.
  Result Exchange(const Case& c, const Parts& parts, int node_size, const Tensor& scale_ED) {
    const int ranks = parts.ep->size(), rank = parts.ep->rank();
    const Own own = MakeOwn(context_, c, ranks, rank);
    const Tensor scale_LD = scale_ED.Rows(rank * c.local_experts, (rank + 1) * c.local_experts);
    const ExpertAxes axes = AxesOf(parts, node_size);
    const ExpertPlan plan =
        MakeExpertPlan(context_, axes,
                       {.num_experts = c.local_experts * ranks,
                        .max_tokens = *std::max_element(c.tokens.begin(), c.tokens.end()),
                        .max_rows = c.max_rows,
                        .label = "layers.3.mlp"},
                       own.ids_TA);
    if (c.max_rows == 0) {
      EXPECT_EQ(plan.rounds.size(), 1u);
    } else {
      EXPECT_LE(plan.max_held_rows(), c.max_rows);
    }
    largest_held_ = plan.max_held_rows();
    const int64_t T = own.x_TD.dim(0);
    const Result result{context_.Zeros(DType::kF64, {T, kWidth}),
                        context_.Zeros(DType::kF64, {T, kWidth}),
                        context_.Zeros(DType::kF64, {T, c.top_k}),
                        context_.Zeros(DType::kF64, {c.local_experts, kWidth})};
    int64_t next = 0;
    for (const ExpertRound& round : plan.rounds) {
      EXPECT_EQ(round.begin(), next);
      next = round.end();
      const auto slice = [&](const Tensor& x) { return x.Rows(round.begin(), round.end()); };
      const auto [rows_ND, weights_N] =
          round.Dispatch(context_, slice(own.x_TD), slice(own.weights_TA));
      EXPECT_LE(rows_ND.dim(0), round.held_rows());
      if (node_size == 0) {
        EXPECT_EQ(rows_ND.dim(0), round.held_rows());
      }
      if (plan.rounds.size() == 1) {
        EXPECT_TRUE(SameBits(rows_ND, ExpectedRows(c, parts, node_size)));
      }
      const Tensor& offsets = round.offsets_L1();
      Copy(context_,
           round.Combine(context_, Scale(context_, rows_ND, weights_N, offsets, scale_LD)),
           slice(result.y_TD));
      const Tensor dout_ND = round.CombineBackward(context_, slice(own.dy_TD));
      const Tensor dweights_N =
          AddScaleGradient({rows_ND, weights_N}, dout_ND, offsets, scale_LD, result.dscale_LD);
      const WeightedTokens home = round.DispatchBackward(
          context_, {Scale(context_, dout_ND, weights_N, offsets, scale_LD), dweights_N});
      Copy(context_, home.tokens_TD, slice(result.dx_TD));
      Copy(context_, home.weights_TA, slice(result.dweights_TA));
    }
    EXPECT_EQ(next, T);
    return result;
  }

  // Returns the weights' gradients.
  Tensor AddScaleGradient(const WeightedRows& rows, const Tensor& dout_ND, const Tensor& offsets_L1,
                          const Tensor& scale_LD, const Tensor& dscale_LD) {
    const Tensor dweights_N = context_.Zeros(DType::kF64, rows.weights_N.shape());
    for (int64_t l = 0; l < dscale_LD.dim(0); ++l) {
      for (int64_t n = offsets_L1.data<int32_t>()[l]; n < offsets_L1.data<int32_t>()[l + 1]; ++n) {
        for (int64_t d = 0; d < kWidth; ++d) {
          const double product =
              rows.rows_ND.data<double>()[n * kWidth + d] * dout_ND.data<double>()[n * kWidth + d];
          dscale_LD.data<double>()[l * kWidth + d] += rows.weights_N.data<double>()[n] * product;
          dweights_N.data<double>()[n] += scale_LD.data<double>()[l * kWidth + d] * product;
        }
      }
    }
    return dweights_N;
  }

  // Runs the case and compares with the reference over all ranks' tokens.
  Result Check(const Case& c, const Parts& parts, int node_size) {
    const int ranks = parts.ep->size(), rank = parts.ep->rank();
    SCOPED_TRACE(absl::StrCat("ranks ", ranks, " rank ", rank, " node ", node_size, " L ",
                              c.local_experts, " A ", c.top_k, " routing ",
                              static_cast<int>(c.routing), " bound ", c.max_rows, " seed ",
                              c.seed));
    const Tensor scale_ED =
        RandomTensor(context_, DType::kF64, {c.local_experts * ranks, kWidth}, 77);
    const Result result = Exchange(c, parts, node_size, scale_ED);
    const Tensor dscale_ED = context_.Zeros(DType::kF64, scale_ED.shape());
    for (int source = 0; source < ranks; ++source) {
      const Result expected = Reference(context_, c, MakeOwn(context_, c, ranks, source), scale_ED);
      AddInPlace(context_, dscale_ED, expected.dscale_LD);
      if (source != rank) continue;
      EXPECT_LE(RelativeError(result.y_TD, expected.y_TD), kTolerance);
      EXPECT_LE(RelativeError(result.dx_TD, expected.dx_TD), kTolerance);
      EXPECT_LE(RelativeError(result.dweights_TA, expected.dweights_TA), kTolerance);
    }
    EXPECT_LE(RelativeError(result.dscale_LD,
                            dscale_ED.Rows(rank * c.local_experts, (rank + 1) * c.local_experts)),
              kTolerance);
    return result;
  }

  Context context_ = Context::Cpu();
  int64_t largest_held_ = 0;  // of the last exchange, on this rank
  static Communicator* world_;
  static std::map<int, Parts>* parts_;
};

Communicator* ExpertExchangeTest::world_ = nullptr;
std::map<int, ExpertExchangeTest::Parts>* ExpertExchangeTest::parts_ =
    new std::map<int, ExpertExchangeTest::Parts>();

TEST_F(ExpertExchangeTest, AnyRoutingGivesTheDenseResult) {
  const std::vector<Case> cases = {
      {.tokens = {9}},
      {.local_experts = 1, .top_k = 1, .tokens = {6}},
      {.tokens = {7}, .routing = Routing::kSpareAnExpert},
      {.tokens = {7}, .routing = Routing::kSpareARank},
      {.tokens = {7}, .routing = Routing::kFirstRank},
      {.local_experts = 3, .top_k = 1, .tokens = {8}, .routing = Routing::kOneExpert},
      {.tokens = {5, 0, 11, 1}},
      {.tokens = {0}},
      {.top_k = 4, .tokens = {6, 3}},  // every expert of one rank, once
  };
  for (const auto& [size, parts] : *parts_) {
    for (const int node_size : NodeSizes(parts)) {
      for (const Case& c : cases) Check(c, parts, node_size);
    }
  }
}

TEST_F(ExpertExchangeTest, BoundsOnTheRowsHeldDoNotChangeTheResult) {
  for (const auto& [size, parts] : *parts_) {
    for (const int node_size : NodeSizes(parts)) {
      for (const Routing routing : {Routing::kRandom, Routing::kFirstRank}) {
        Case c{.tokens = {10, 4, 13}, .routing = routing};
        const Result unbounded = Check(c, parts, node_size);
        const int64_t minimum = Minimum(c, parts, node_size);
        for (const int64_t bound : {minimum, minimum + 3, 3 * minimum, int64_t{1000}}) {
          c.max_rows = bound;
          const Result bounded = Check(c, parts, node_size);
          // A token's sum has the same terms in the same order, in whichever round it is formed.
          EXPECT_TRUE(SameBits(bounded.y_TD, unbounded.y_TD));
          EXPECT_TRUE(SameBits(bounded.dx_TD, unbounded.dx_TD));
          EXPECT_TRUE(SameBits(bounded.dweights_TA, unbounded.dweights_TA));
        }
      }
    }
  }
}

TEST_F(ExpertExchangeTest, AllTokensToOneRankMeetTheSmallestBoundExactly) {
  for (const auto& [size, parts] : *parts_) {
    for (const int node_size : NodeSizes(parts)) {
      Case c{.tokens = {6}, .routing = Routing::kFirstRank};
      c.max_rows = Minimum(c, parts, node_size);
      Check(c, parts, node_size);
      if (parts.ep->rank() == 0) {
        EXPECT_EQ(largest_held_, c.max_rows);
      }
      if (world_->rank() == 0) {
        std::printf("ranks %d, node size %d: at most %ld rows held, bound %ld\n", parts.ep->size(),
                    node_size, static_cast<long>(largest_held_), static_cast<long>(c.max_rows));
      }
    }
  }
}

TEST_F(ExpertExchangeTest, OneRankMovesRowsAsThePlainPermutationDoes) {
  const Case c{.tokens = {11}};
  const Own own = MakeOwn(context_, c, 1, 0);
  const auto self = MakeSelfCommunicator("ep");
  const ExpertPlan plan = MakeExpertPlan(
      context_, ExpertAxes{*self},
      {.num_experts = c.local_experts, .max_tokens = 11, .label = "moe"}, own.ids_TA);
  ASSERT_EQ(plan.rounds.size(), 1u);
  const ExpertRound& round = plan.rounds[0];
  const Permutation plain = BuildPermutation(context_, own.ids_TA, 0, c.local_experts);
  const WeightedRows there = round.Dispatch(context_, own.x_TD, own.weights_TA);
  EXPECT_TRUE(SameBits(there.rows_ND, GatherRows(context_, own.x_TD, plain.source_row_N)));
  EXPECT_TRUE(SameBits(there.weights_N, RowsOfSlots(context_, own.weights_TA, plain.row_of_slot_TA,
                                                    there.rows_ND.dim(0))));
  EXPECT_TRUE(SameBits(round.Combine(context_, there.rows_ND),
                       GatherRowsBackward(context_, there.rows_ND, plain.row_of_slot_TA)));
  EXPECT_TRUE(SameBits(round.CombineBackward(context_, own.dy_TD),
                       GatherRows(context_, own.dy_TD, plain.source_row_N)));
  const WeightedTokens home = round.DispatchBackward(context_, there);
  EXPECT_TRUE(
      SameBits(home.tokens_TD, GatherRowsBackward(context_, there.rows_ND, plain.row_of_slot_TA)));
  EXPECT_TRUE(SameBits(home.weights_TA, own.weights_TA));
  EXPECT_EQ(self->FlightRecord(), "");  // nothing was communicated
}

// With nodes of two, a token whose experts all lie on one node crosses to it once.
TEST_F(ExpertExchangeTest, TokensCrossToANodeOnce) {
  if (world_->size() < 4) GTEST_SKIP() << "needs two nodes of two ranks";
  const Parts& parts = parts_->at(4);
  Case c{.top_k = 4, .tokens = {5}, .routing = Routing::kFirstRank};
  Check(c, parts, 2);
  // 4 experts, all on rank 0: 4 rows for each of 20 tokens there. Through places 0 and 1 of the
  // first node pass the tokens of their place in each of two nodes; the second node sees nothing.
  const int64_t passing = parts.ep->rank() < 2 ? 2 * 5 : 0;
  const int64_t at_experts = parts.ep->rank() == 0 ? 4 * 20 : 0;
  EXPECT_EQ(largest_held_, passing + at_experts);
}

TEST_F(ExpertExchangeTest, AHundredRandomCasesEndAndAgree) {
  std::mt19937_64 random(2026);
  const auto below = [&](uint64_t n) { return static_cast<int64_t>(random() % n); };
  for (int i = 0; i < 100; ++i) {
    auto part = parts_->begin();
    std::advance(part, below(parts_->size()));
    Case c;
    c.seed = 100 + i;
    c.local_experts = 1 + below(5);
    c.top_k = 1 + below(c.local_experts);
    c.tokens.clear();
    for (int r = 0; r < 8; ++r) c.tokens.push_back(below(12));
    c.routing = c.top_k == 1 ? static_cast<Routing>(below(5))
                             : std::array{Routing::kRandom, Routing::kSpareAnExpert,
                                          Routing::kSpareARank, Routing::kFirstRank}[below(4)];
    // The draws are the same on all ranks, whatever their part's size; the choice of hops may not
    // be.
    const uint64_t hops = random();
    const int64_t slack = below(3) == 0 ? -1 : below(40);
    const std::vector<int> sizes = NodeSizes(part->second);
    const int node_size = sizes[hops % sizes.size()];
    c.max_rows = slack < 0 ? 0 : Minimum(c, part->second, node_size) + slack;
    Check(c, part->second, node_size);
  }
}

TEST(MinimumExpertRows, IsOneTokenOfEachRankAllToOneRank) {
  EXPECT_EQ(MinimumExpertRows(/*ep_size=*/64, /*experts_per_rank=*/4, /*top_k=*/8), 64 * 4);
  EXPECT_EQ(MinimumExpertRows(8, 32, 8), 8 * 8);
  EXPECT_EQ(MinimumExpertRows(64, 4, 8, /*node_size=*/8), 64 * 4 + 8);
  EXPECT_EQ(MinimumExpertRows(1, 256, 8), 8);
}

}  // namespace
}  // namespace baleen
