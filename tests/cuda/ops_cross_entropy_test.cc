// Cross-entropy on the GPU: whole and split vocabularies, ignored targets, words that cannot come.
#include <limits>

#include "kernels/ops/cross_entropy.h"
#include "tests/cuda/ops_support.h"

namespace baleen {
namespace {

using testing::Cpu;
using testing::ExpectClose;
using testing::Gpu;
using testing::IntsOnBoth;
using testing::kGpuDtypes;
using testing::OnBoth;
using testing::OnHost;
using testing::RandomOnBoth;
using testing::ToDoubles;

std::vector<int32_t> SomeTargets(int64_t tokens, int64_t W) {
  std::vector<int32_t> targets(tokens);
  for (int64_t t = 0; t < tokens; ++t) {
    targets[t] = t % 5 == 3 ? -1 : static_cast<int32_t>((t * 7919 + 3) % W);
  }
  return targets;
}

TEST(CudaCrossEntropy, GivesLossAndGradientOfTheDefinition) {
  for (const DType dtype : kGpuDtypes) {
    for (const auto& [tokens, W] :
         {std::pair<int64_t, int64_t>{7, 129280}, {33, 1000}, {5, 17}, {3, 1}, {0, 64}}) {
      SCOPED_TRACE(::testing::Message() << tokens << " x " << W << " " << dtype);
      const OnBoth logits = RandomOnBoth(dtype, {tokens, W}, 1, 3);
      const OnBoth targets = IntsOnBoth({tokens}, SomeTargets(tokens, W));
      const CrossEntropyStats gpu = CrossEntropyLocalStats(Gpu(), logits.gpu, targets.gpu, 0);
      const CrossEntropyStats cpu = CrossEntropyLocalStats(Cpu(), logits.cpu, targets.cpu, 0);
      EXPECT_EQ(ToDoubles(OnHost(gpu.row_max_T)), ToDoubles(cpu.row_max_T));
      EXPECT_EQ(ToDoubles(OnHost(gpu.target_logit_T)), ToDoubles(cpu.target_logit_T));
      // Exponentials carry the rounding of arguments up to 30.
      ExpectClose(gpu.row_sum_T, cpu.row_sum_T, 64);
      ExpectClose(CrossEntropyLoss(Gpu(), gpu, targets.gpu),
                  CrossEntropyLoss(Cpu(), cpu, targets.cpu), 16);
      CrossEntropyBackwardInPlace(Gpu(), logits.gpu, targets.gpu, gpu, 0, 0.125);
      CrossEntropyBackwardInPlace(Cpu(), logits.cpu, targets.cpu, cpu, 0, 0.125);
      ExpectClose(logits.gpu, logits.cpu, 64);
      const std::vector<double> gradient = ToDoubles(OnHost(logits.gpu));
      for (int64_t i = 3 * W; i < std::min<int64_t>(4, tokens) * W; ++i) ASSERT_EQ(gradient[i], 0);
    }
  }
}

TEST(CudaCrossEntropy, CombinesThePartsOfAVocabulary) {
  const int64_t tokens = 19, W = 96, parts = 3;
  for (const DType dtype : kGpuDtypes) {
    const OnBoth logits = RandomOnBoth(dtype, {tokens, W}, 2, 4);
    const OnBoth targets = IntsOnBoth({tokens}, SomeTargets(tokens, W));
    CrossEntropyStats joined{Gpu().Empty(DType::kF32, {parts, tokens}),
                             Gpu().Empty(DType::kF32, {parts, tokens}),
                             Gpu().Empty(DType::kF32, {parts, tokens})};
    std::vector<Tensor> slices;
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = part * W / parts;
      slices.push_back(SliceColumns(Gpu(), logits.gpu, begin, W / parts));
      const CrossEntropyStats own =
          CrossEntropyLocalStats(Gpu(), slices.back(), targets.gpu, begin);
      Copy(Gpu(), own.row_max_T, joined.row_max_T.Rows(part, part + 1));
      Copy(Gpu(), own.row_sum_T, joined.row_sum_T.Rows(part, part + 1));
      Copy(Gpu(), own.target_logit_T, joined.target_logit_T.Rows(part, part + 1));
    }
    const CrossEntropyStats gpu = CombineCrossEntropyStats(Gpu(), joined);
    const CrossEntropyStats cpu = CrossEntropyLocalStats(Cpu(), logits.cpu, targets.cpu, 0);
    ExpectClose(CrossEntropyLoss(Gpu(), gpu, targets.gpu),
                CrossEntropyLoss(Cpu(), cpu, targets.cpu), 16);
    CrossEntropyBackwardInPlace(Cpu(), logits.cpu, targets.cpu, cpu, 0, 2);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = part * W / parts;
      CrossEntropyBackwardInPlace(Gpu(), slices[part], targets.gpu, gpu, begin, 2);
      ExpectClose(slices[part], SliceColumns(Cpu(), logits.cpu, begin, W / parts), 64);
    }
  }
}

TEST(CudaCrossEntropy, WordsThatCannotComeAddNothing) {
  const double none = -std::numeric_limits<double>::infinity();
  for (const DType dtype : kGpuDtypes) {
    const OnBoth logits = testing::ValuesOnBoth(
        dtype, {3, 4}, {none, 1, none, 2, none, none, none, none, 5, none, none, none});
    const OnBoth targets = IntsOnBoth({3}, {1, -1, 0});
    const CrossEntropyStats gpu = CrossEntropyLocalStats(Gpu(), logits.gpu, targets.gpu, 0);
    const CrossEntropyStats cpu = CrossEntropyLocalStats(Cpu(), logits.cpu, targets.cpu, 0);
    EXPECT_EQ(ToDoubles(OnHost(gpu.row_max_T)), ToDoubles(cpu.row_max_T));
    const std::vector<double> sum = ToDoubles(OnHost(gpu.row_sum_T));
    EXPECT_NEAR(sum[0], cpu.row_sum_T.data<double>()[0], 1e-6);
    EXPECT_EQ(sum[1], 0);
    EXPECT_EQ(sum[2], 1);
    ExpectClose(CrossEntropyLoss(Gpu(), gpu, targets.gpu),
                CrossEntropyLoss(Cpu(), cpu, targets.cpu), 16);
    CrossEntropyBackwardInPlace(Gpu(), logits.gpu, targets.gpu, gpu, 0, 1);
    CrossEntropyBackwardInPlace(Cpu(), logits.cpu, targets.cpu, cpu, 0, 1);
    ExpectClose(logits.gpu, logits.cpu, 16);
  }
}

TEST(CudaCrossEntropy, NotANumberReachesTheLoss) {
  for (const DType dtype : kGpuDtypes) {
    std::vector<double> values(4096, 0.5);
    values[3000] = std::nan("");
    const OnBoth logits = testing::ValuesOnBoth(dtype, {1, 4096}, values);
    const OnBoth targets = IntsOnBoth({1}, {2});
    const CrossEntropyStats stats = CrossEntropyLocalStats(Gpu(), logits.gpu, targets.gpu, 0);
    EXPECT_TRUE(std::isnan(ToDoubles(OnHost(CrossEntropyLoss(Gpu(), stats, targets.gpu)))[0]));
  }
}

}  // namespace
}  // namespace baleen
