// Cross-entropy: three numbers by hand, gradients, split vocabularies against the whole, ignored
// targets.
#include "kernels/ops/cross_entropy.h"

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

TEST(CrossEntropy, ScoresThreeLogitsByHand) {
  const Context context = Context::Cpu();
  // Probabilities 1/6, 2/6, 3/6.
  const Tensor logits =
      TensorOf(context, DType::kF64, {1, 3}, {std::log(1.0), std::log(2.0), std::log(3.0)});
  const Tensor target = IntTensorOf(context, {1}, {1});
  const CrossEntropyStats stats = CrossEntropyLocalStats(context, logits, target, 0);
  EXPECT_EQ(ToDoubles(stats.row_max_T)[0], std::log(3.0));
  EXPECT_NEAR(ToDoubles(stats.row_sum_T)[0], 2, 1e-15);
  EXPECT_EQ(ToDoubles(stats.target_logit_T)[0], std::log(2.0));
  EXPECT_NEAR(ToDoubles(CrossEntropyLoss(context, stats, target))[0], std::log(3.0), 1e-15);
  CrossEntropyBackwardInPlace(context, logits, target, stats, 0, 12);
  const Doubles expected = {2, 4 - 12, 6}, found = ToDoubles(logits);
  for (int i = 0; i < 3; ++i) EXPECT_NEAR(found[i], expected[i], 1e-14);
}

// Statistics of a vocabulary cut at `cuts`, combined; the logits of the parts are given back.
struct Split {
  std::vector<Tensor> logits;
  std::vector<int64_t> begins;
  CrossEntropyStats stats;
};

Split StatsOfParts(const Context& context, const Tensor& logits_TW, const Tensor& targets,
                   const std::vector<int64_t>& cuts) {
  const int64_t T = logits_TW.dim(0), parts = static_cast<int64_t>(cuts.size()) - 1;
  Split split;
  CrossEntropyStats gathered{context.Empty(logits_TW.dtype(), {parts, T}),
                             context.Empty(logits_TW.dtype(), {parts, T}),
                             context.Empty(logits_TW.dtype(), {parts, T})};
  for (int64_t part = 0; part < parts; ++part) {
    split.begins.push_back(cuts[part]);
    split.logits.push_back(
        SliceColumns(context, logits_TW, cuts[part], cuts[part + 1] - cuts[part]));
    const CrossEntropyStats local =
        CrossEntropyLocalStats(context, split.logits.back(), targets, cuts[part]);
    Copy(context, local.row_max_T, gathered.row_max_T.Rows(part, part + 1));
    Copy(context, local.row_sum_T, gathered.row_sum_T.Rows(part, part + 1));
    Copy(context, local.target_logit_T, gathered.target_logit_T.Rows(part, part + 1));
  }
  split.stats = CombineCrossEntropyStats(context, gathered);
  return split;
}

TEST(CrossEntropy, HasTheGradientOfCentralDifferences) {
  const Context context = Context::Cpu();
  const Tensor logits = RandomTensor(context, DType::kF64, {5, 7}, 1, 2.0);
  const Tensor targets = IntTensorOf(context, {5}, {3, -1, 0, 6, 6});
  const auto loss = [&] {
    const CrossEntropyStats stats = CrossEntropyLocalStats(context, logits, targets, 0);
    double sum = 0;
    for (const double row : ToDoubles(CrossEntropyLoss(context, stats, targets))) sum += row;
    return 0.3 * sum;
  };
  const Tensor dlogits = Clone(context, logits);
  CrossEntropyBackwardInPlace(context, dlogits, targets,
                              CrossEntropyLocalStats(context, logits, targets, 0), 0, 0.3);
  EXPECT_LT(GradientError(loss, logits, dlogits), 1e-8);
}

TEST(CrossEntropy, PartsOfASplitVocabularyGiveTheWhole) {
  const Context context = Context::Cpu();
  const int64_t T = 9, W = 101;
  const std::vector<std::vector<int64_t>> all_cuts = {
      {0, 101}, {0, 50, 101}, {0, 1, 100, 101}, {0, 40, 40, 101}};
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const Tensor logits = RandomTensor(context, dtype, {T, W}, 1, 5.0);
    const Tensor targets = IntTensorOf(context, {T}, {0, 1, 49, 50, 99, 100, -1, 39, 40});
    const CrossEntropyStats whole = CrossEntropyLocalStats(context, logits, targets, 0);
    const Tensor loss = CrossEntropyLoss(context, whole, targets);
    const Tensor dlogits = Clone(context, logits);
    CrossEntropyBackwardInPlace(context, dlogits, targets, whole, 0, 0.5);
    for (const std::vector<int64_t>& cuts : all_cuts) {
      const Split split = StatsOfParts(context, logits, targets, cuts);
      EXPECT_TRUE(SameBits(split.stats.row_max_T, whole.row_max_T));
      EXPECT_TRUE(SameBits(split.stats.target_logit_T, whole.target_logit_T));
      const double eps = dtype == DType::kF64 ? 0x1p-53 : 0x1p-24;
      EXPECT_LT(RelativeError(CrossEntropyLoss(context, split.stats, targets), loss), 8 * eps);
      if (cuts.size() == 2) EXPECT_TRUE(SameBits(split.stats.row_sum_T, whole.row_sum_T));
      Tensor joined = context.Empty(dtype, {T, 0});
      for (size_t part = 0; part < split.logits.size(); ++part) {
        CrossEntropyBackwardInPlace(context, split.logits[part], targets, split.stats,
                                    split.begins[part], 0.5);
        joined = ConcatColumns(context, joined, split.logits[part]);
      }
      EXPECT_LT(RelativeError(joined, dlogits), 8 * eps);
    }
  }
}

TEST(CrossEntropy, AgreesBetweenFloatAndDouble) {
  const Context context = Context::Cpu();
  const Tensor logits = RandomTensor(context, DType::kF32, {8, 1000}, 1, 4.0);
  const Tensor targets = IntTensorOf(context, {8}, {1, 2, 3, 4, 5, 6, 7, 999});
  const Tensor exact = Cast(context, logits, DType::kF64);
  const CrossEntropyStats stats = CrossEntropyLocalStats(context, logits, targets, 0);
  const CrossEntropyStats exact_stats = CrossEntropyLocalStats(context, exact, targets, 0);
  // exp(l - m) carries the rounding of l - m, up to eps * |l - m| with |l - m| < 32.
  const double tolerance = 32 * 0x1p-24;
  EXPECT_LT(RelativeError(CrossEntropyLoss(context, stats, targets),
                          CrossEntropyLoss(context, exact_stats, targets)),
            tolerance);
  CrossEntropyBackwardInPlace(context, logits, targets, stats, 0, 1);
  CrossEntropyBackwardInPlace(context, exact, targets, exact_stats, 0, 1);
  EXPECT_LT(RelativeError(logits, exact), tolerance);
  EXPECT_GT(Cosine(logits, exact), 1 - 1e-10);
}

TEST(CrossEntropy, GivesIgnoredTargetsNoLossAndNoGradient) {
  const Context context = Context::Cpu();
  const Tensor logits = TensorOf(context, DType::kF32, {2, 2}, {5, -5, 0, 0});
  const Tensor targets = IntTensorOf(context, {2}, {-1, 0});
  // In the second rank's part, which begins at id 2, no target lies: its gradient is all softmax.
  const CrossEntropyStats stats = CrossEntropyLocalStats(context, logits, targets, 2);
  EXPECT_EQ(ToDoubles(stats.target_logit_T), (Doubles{0, 0}));
  EXPECT_EQ(ToDoubles(CrossEntropyLoss(context, stats, targets))[0], 0);
  CrossEntropyBackwardInPlace(context, logits, targets, stats, 2, 1);
  EXPECT_EQ(ToDoubles(logits), (Doubles{0, 0, 0.5, 0.5}));
}

TEST(CrossEntropy, StaysFiniteForHugeAndImpossibleLogits) {
  const Context context = Context::Cpu();
  const Tensor logits =
      TensorOf(context, DType::kF32, {2, 4}, {3e38, -3e38, 0, 0, -INFINITY, -INFINITY, 1, 1});
  const Tensor targets = IntTensorOf(context, {2}, {0, 2});
  const Split split = StatsOfParts(context, logits, targets, {0, 2, 4});
  const Doubles loss = ToDoubles(CrossEntropyLoss(context, split.stats, targets));
  EXPECT_EQ(loss[0], 0);
  EXPECT_NEAR(loss[1], std::log(2.0), 1e-7);
  CrossEntropyBackwardInPlace(context, split.logits[0], targets, split.stats, 0, 1);
  EXPECT_EQ(ToDoubles(split.logits[0]), (Doubles{0, 0, 0, 0}));
}

TEST(CrossEntropy, TellsOfNanInAnyPart) {
  const Context context = Context::Cpu();
  const Tensor targets = IntTensorOf(context, {1}, {0});
  for (int64_t where = 0; where < 4; ++where) {
    const Tensor logits = TensorOf(context, DType::kF32, {1, 4}, {1, 2, 3, 4});
    logits.data<float>()[where] = NAN;
    const Split split = StatsOfParts(context, logits, targets, {0, 1, 4});
    EXPECT_TRUE(std::isnan(ToDoubles(CrossEntropyLoss(context, split.stats, targets))[0])) << where;
  }
}

TEST(CrossEntropy, TakesNoTokens) {
  const Context context = Context::Cpu();
  const Tensor logits = context.Empty(DType::kF32, {0, 4}),
               targets = context.Empty(DType::kI32, {0});
  const CrossEntropyStats stats = CrossEntropyLocalStats(context, logits, targets, 0);
  EXPECT_EQ(CrossEntropyLoss(context, stats, targets).shape(), (Shape{0}));
}

TEST(CrossEntropyDeathTest, NamesTargetsAndShapesThatDoNotFit) {
  const Context context = Context::Cpu();
  const Tensor logits = context.Zeros(DType::kF32, {2, 3});
  EXPECT_DEATH(CrossEntropyLocalStats(context, logits, IntTensorOf(context, {2}, {0, -2}), 0),
               "targets\\[1\\] is -2");
  EXPECT_DEATH(CrossEntropyLocalStats(context, logits, IntTensorOf(context, {3}, {0, 1, 2}), 0),
               "targets is I32\\[3\\], expected I32\\[2\\]");
}

}  // namespace
}  // namespace baleen
