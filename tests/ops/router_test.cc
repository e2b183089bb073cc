// The gate: choice by hand with groups, ties and negative scores; weights from unbiased scores;
// gradients; balance.
#include "kernels/ops/moe/router.h"

#include <gtest/gtest.h>

#include <cmath>

#include "kernels/ops/elementwise.h"
#include "tests/support/gradient_check.h"
#include "tests/support/random_tensor.h"

namespace baleen {
namespace {

using testing::Cosine;
using testing::GradientError;
using testing::IntTensorOf;
using testing::RandomTensor;
using testing::RelativeError;
using testing::SameBits;
using testing::TensorOf;
using testing::ToDoubles;
using Doubles = std::vector<double>;

double Logit(double probability) { return std::log(probability / (1 - probability)); }

// Logits whose sigmoids are these scores.
Tensor LogitsOf(const Context& context, Shape shape, Doubles scores) {
  for (double& score : scores) score = Logit(score);
  return TensorOf(context, DType::kF64, std::move(shape), scores);
}

void ExpectNear(const Tensor& found, const Doubles& expected, double tolerance) {
  const Doubles values = ToDoubles(found);
  ASSERT_EQ(values.size(), expected.size());
  for (size_t i = 0; i < values.size(); ++i) EXPECT_NEAR(values[i], expected[i], tolerance) << i;
}

TEST(Router, WeighsThreeExpertsByHand) {
  const Context context = Context::Cpu();
  const Tensor logits = LogitsOf(context, {1, 3}, {0.2, 0.5, 0.3});
  const Tensor bias = TensorOf(context, DType::kF64, {3}, {0, 0, 0});
  RouterParams params{.num_experts_per_tok = 2, .routed_scaling_factor = 2.5};
  RouterResult result = Route(context, logits, bias, params);
  ExpectNear(result.scores_TE, {0.2, 0.5, 0.3}, 1e-15);
  EXPECT_EQ(ToDoubles(result.expert_ids_TA), (Doubles{1, 2}));
  ExpectNear(result.weights_TA, {2.5 * 0.5 / 0.8, 2.5 * 0.3 / 0.8}, 1e-14);
  params.norm_topk_prob = false;
  ExpectNear(Route(context, logits, bias, params).weights_TA, {2.5 * 0.5, 2.5 * 0.3}, 1e-15);
}

TEST(Router, BiasChangesTheChoiceAndNotTheWeights) {
  const Context context = Context::Cpu();
  const Tensor logits = LogitsOf(context, {1, 4}, {0.2, 0.5, 0.3, 0.4});
  const RouterParams params{.num_experts_per_tok = 2};
  const Tensor none = context.Zeros(DType::kF64, {4});
  EXPECT_EQ(ToDoubles(Route(context, logits, none, params).expert_ids_TA), (Doubles{1, 3}));
  const Tensor bias = TensorOf(context, DType::kF64, {4}, {1, 0, 0, -1});
  const RouterResult result = Route(context, logits, bias, params);
  EXPECT_EQ(ToDoubles(result.expert_ids_TA), (Doubles{0, 1}));
  ExpectNear(result.weights_TA, {0.2 / 0.7, 0.5 / 0.7}, 1e-14);
}

TEST(Router, KeepsTheGroupsWithTheBestPairsOfExperts) {
  const Context context = Context::Cpu();
  // Group sums of the two best: {0.9 + 0.1, 0.6 + 0.5, 0.55 + 0.52}: the best single expert is left
  // out.
  const Tensor logits =
      LogitsOf(context, {1, 9}, {0.9, 0.1, 0.05, 0.6, 0.02, 0.5, 0.03, 0.52, 0.55});
  const RouterParams params{.n_group = 3, .topk_group = 2, .num_experts_per_tok = 3};
  const RouterResult result = Route(context, logits, context.Zeros(DType::kF64, {9}), params);
  EXPECT_EQ(ToDoubles(result.expert_ids_TA), (Doubles{3, 7, 8}));
}

TEST(Router, NeverChoosesOutsideTheKeptGroupsEvenWithNegativeScores) {
  const Context context = Context::Cpu();
  // All biased scores are negative; a mask of 0 instead of -inf would prefer group 1.
  const Tensor logits = LogitsOf(context, {1, 4}, {0.5, 0.4, 0.3, 0.2});
  const Tensor bias = TensorOf(context, DType::kF64, {4}, {-2, -2, -2, -2});
  const RouterParams params{.n_group = 2, .topk_group = 1, .num_experts_per_tok = 2};
  const RouterResult result = Route(context, logits, bias, params);
  EXPECT_EQ(ToDoubles(result.expert_ids_TA), (Doubles{0, 1}));
  ExpectNear(result.weights_TA, {0.5 / 0.9, 0.4 / 0.9}, 1e-14);
}

TEST(Router, PrefersTheLowerIndexInTiesOfGroupsAndExperts) {
  const Context context = Context::Cpu();
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const Tensor logits = context.Zeros(dtype, {2, 8}), bias = context.Zeros(dtype, {8});
    const RouterParams params{.n_group = 4, .topk_group = 2, .num_experts_per_tok = 3};
    EXPECT_EQ(ToDoubles(Route(context, logits, bias, params).expert_ids_TA),
              (Doubles{0, 1, 2, 0, 1, 2}));
  }
}

TEST(Router, TakesGroupsOfOneExpertAndAllExperts) {
  const Context context = Context::Cpu();
  const Tensor logits = LogitsOf(context, {1, 3}, {0.2, 0.5, 0.3}),
               bias = context.Zeros(DType::kF64, {3});
  const RouterParams singles{.n_group = 3, .topk_group = 2, .num_experts_per_tok = 1};
  EXPECT_EQ(ToDoubles(Route(context, logits, bias, singles).expert_ids_TA), (Doubles{1}));
  const RouterParams all{.num_experts_per_tok = 3};
  EXPECT_EQ(ToDoubles(Route(context, logits, bias, all).expert_ids_TA), (Doubles{0, 1, 2}));
  const Tensor no_tokens = context.Empty(DType::kF64, {0, 3});
  EXPECT_EQ(Route(context, no_tokens, bias, all).weights_TA.shape(), (Shape{0, 3}));
}

TEST(Router, GivesValidIdsForNanLogits) {
  const Context context = Context::Cpu();
  const Tensor logits = TensorOf(context, DType::kF32, {1, 4}, {NAN, NAN, NAN, NAN});
  const RouterParams params{.n_group = 2, .topk_group = 1, .num_experts_per_tok = 2};
  const RouterResult result = Route(context, logits, context.Zeros(DType::kF32, {4}), params);
  EXPECT_EQ(ToDoubles(result.expert_ids_TA), (Doubles{0, 1}));
  EXPECT_TRUE(std::isnan(ToDoubles(result.weights_TA)[0]));
}

TEST(Router, HasTheGradientsOfCentralDifferences) {
  const Context context = Context::Cpu();
  const Tensor logits = RandomTensor(context, DType::kF64, {5, 12}, 1);
  const Tensor bias = RandomTensor(context, DType::kF64, {12}, 2, 0.1);
  const Tensor dweights = RandomTensor(context, DType::kF64, {5, 4}, 3);
  const Tensor dscores = RandomTensor(context, DType::kF64, {5, 12}, 4);
  for (const bool norm_topk_prob : {true, false}) {
    for (const bool with_scores : {true, false}) {
      const RouterParams params{.n_group = 3,
                                .topk_group = 2,
                                .num_experts_per_tok = 4,
                                .routed_scaling_factor = 2.5,
                                .norm_topk_prob = norm_topk_prob};
      const auto loss = [&] {
        const RouterResult result = Route(context, logits, bias, params);
        const Doubles weights = ToDoubles(result.weights_TA), scores = ToDoubles(result.scores_TE);
        double sum = 0;
        for (size_t i = 0; i < weights.size(); ++i) sum += weights[i] * ToDoubles(dweights)[i];
        for (size_t i = 0; with_scores && i < scores.size(); ++i)
          sum += scores[i] * ToDoubles(dscores)[i];
        return sum;
      };
      const Tensor dlogits = RouteBackward(context, dweights, with_scores ? dscores : Tensor(),
                                           Route(context, logits, bias, params), params);
      EXPECT_LT(GradientError(loss, logits, dlogits), 1e-8);
    }
  }
}

TEST(Router, AgreesBetweenFloatAndDouble) {
  const Context context = Context::Cpu();
  const Tensor logits = RandomTensor(context, DType::kF32, {64, 32}, 1);
  const Tensor bias = RandomTensor(context, DType::kF32, {32}, 2, 0.1);
  const Tensor dweights = RandomTensor(context, DType::kF32, {64, 4}, 3);
  const auto wide = [&](const Tensor& tensor) { return Cast(context, tensor, DType::kF64); };
  const RouterParams params{.n_group = 8, .topk_group = 4, .num_experts_per_tok = 4};
  const RouterResult result = Route(context, logits, bias, params);
  const RouterResult exact = Route(context, wide(logits), wide(bias), params);
  EXPECT_TRUE(SameBits(result.expert_ids_TA, exact.expert_ids_TA));  // no near ties with this seed
  const double tolerance = 8 * 0x1p-24;  // a handful of roundings in each element
  EXPECT_LT(RelativeError(result.weights_TA, exact.weights_TA), tolerance);
  const Tensor dlogits = RouteBackward(context, dweights, Tensor(), result, params);
  const Tensor dlogits_exact = RouteBackward(context, wide(dweights), Tensor(), exact, params);
  EXPECT_LT(RelativeError(dlogits, dlogits_exact), 2 * tolerance);
  EXPECT_GT(Cosine(dlogits, dlogits_exact), 1 - 1e-11);
}

TEST(Router, ReplaysGivenIds) {
  const Context context = Context::Cpu();
  const Tensor logits = RandomTensor(context, DType::kF32, {9, 8}, 1);
  const RouterParams params{.num_experts_per_tok = 2, .routed_scaling_factor = 1.5};
  const RouterResult result = Route(context, logits, context.Zeros(DType::kF32, {8}), params);
  const RouterResult replayed = RouteWithIds(context, logits, result.expert_ids_TA, params);
  EXPECT_TRUE(SameBits(replayed.weights_TA, result.weights_TA));
  EXPECT_TRUE(SameBits(replayed.scores_TE, result.scores_TE));
  const Tensor worst = IntTensorOf(context, {1, 2}, {0, 2});
  const Tensor three = LogitsOf(context, {1, 3}, {0.2, 0.5, 0.3});
  ExpectNear(RouteWithIds(context, three, worst, params).weights_TA, {1.5 * 0.4, 1.5 * 0.6}, 1e-14);
}

TEST(Router, CountsTokensOfEachExpertOnTopOfTheOldCounts) {
  const Context context = Context::Cpu();
  const Tensor counts = context.Zeros(DType::kI64, {4});
  CountExperts(context, IntTensorOf(context, {3, 2}, {0, 3, 1, 3, 0, 3}), counts);
  EXPECT_EQ(ToDoubles(counts), (Doubles{2, 1, 0, 3}));
  CountExperts(context, IntTensorOf(context, {1, 2}, {2, 3}), counts);
  EXPECT_EQ(ToDoubles(counts), (Doubles{2, 1, 1, 4}));
}

TEST(RouterBalance, CountsTheBestUnbiasedScoresOfEachSequence) {
  const Context context = Context::Cpu();
  const Tensor scores = TensorOf(context, DType::kF64, {3, 3},
                                 {0.2, 0.5, 0.3,  //
                                  0.4, 0.4, 0.8,  //
                                  0.1, 0.1, 0.2});
  const Tensor sequence = IntTensorOf(context, {3}, {0, 2, 0});
  const BalanceStats stats = BalanceLocalStats(context, scores, sequence, 3, 2);
  EXPECT_EQ(ToDoubles(stats.counts_BE), (Doubles{1, 1, 2, 0, 0, 0, 1, 0, 1}));
  ExpectNear(stats.prob_sum_BE, {0.45, 0.75, 0.8, 0, 0, 0, 0.25, 0.25, 0.5}, 1e-15);
}

TEST(RouterBalance, HasTheGradientOfCentralDifferences) {
  const Context context = Context::Cpu();
  const Tensor scores = context.Empty(DType::kF64, {6, 5});
  const Tensor noise = RandomTensor(context, DType::kF64, {6, 5}, 1);
  for (int64_t i = 0; i < 30; ++i) {
    scores.data<double>()[i] = 1 / (1 + std::exp(-noise.data<double>()[i]));
  }
  const Tensor sequence = IntTensorOf(context, {6}, {1, 0, 0, 1, 1, 1});
  const Tensor coefficient = RandomTensor(context, DType::kF64, {2, 5}, 2);
  const auto loss = [&] {
    const Doubles sums = ToDoubles(BalanceLocalStats(context, scores, sequence, 2, 2).prob_sum_BE);
    double sum = 0;
    for (size_t i = 0; i < sums.size(); ++i) sum += sums[i] * ToDoubles(coefficient)[i];
    return sum;
  };
  EXPECT_LT(GradientError(loss, scores, BalanceBackward(context, scores, sequence, coefficient)),
            1e-8);
}

TEST(RouterDeathTest, NamesSizesThatCannotBe) {
  const Context context = Context::Cpu();
  const Tensor logits = context.Zeros(DType::kF32, {2, 8}), bias = context.Zeros(DType::kF32, {8});
  EXPECT_DEATH(Route(context, logits, bias, {.n_group = 3}), "8 experts in n_group 3");
  EXPECT_DEATH(
      Route(context, logits, bias, {.n_group = 4, .topk_group = 1, .num_experts_per_tok = 3}),
      "topk_group 1, num_experts_per_tok 3");
  EXPECT_DEATH(Route(context, logits, context.Zeros(DType::kF32, {7}), {}),
               "bias is F32\\[7\\], expected F32\\[8\\]");
  EXPECT_DEATH(RouteWithIds(context, logits, IntTensorOf(context, {2, 1}, {0, 8}), {}),
               "expert_ids\\[1\\] is 8, expected 0 .. 7");
}

TEST(Router, BiasMovesAgainstTheLoadAndNotAtTheMean) {
  const Context context = Context::Cpu();
  const Tensor counts = context.Empty(DType::kI64, {3});
  const int64_t values[] = {5, 2, 8};
  std::copy(std::begin(values), std::end(values), counts.data<int64_t>());
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const Tensor bias = TensorOf(context, dtype, {3}, {1, 2, 3});
    UpdateRouterBias(context, counts, 0.25, bias);
    EXPECT_EQ(ToDoubles(bias), (std::vector<double>{1, 2.25, 2.75}));
  }
}

TEST(Router, CountsNobodyForAnIdOfMinusOne) {
  const Context context = Context::Cpu();
  const Tensor counts = context.Zeros(DType::kI64, {2});
  CountExperts(context, testing::IntTensorOf(context, {2, 2}, {1, -1, -1, 1}), counts);
  EXPECT_EQ(ToDoubles(counts), (std::vector<double>{0, 2}));
}

}  // namespace
}  // namespace baleen
