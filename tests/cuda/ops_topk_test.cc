// Top-k on the GPU: the definition's ids bit for bit on the same scores, whatever ties, zeros of
// both signs, windows and NaN there are.
#include <gmock/gmock.h>

#include <limits>

#include "kernels/ops/indexer/topk_select.h"
#include "tests/cuda/ops_support.h"

namespace baleen {
namespace {

using testing::Cpu;
using testing::ExpectSameBits;
using testing::Gpu;
using testing::IntsOnBoth;
using testing::OnBoth;
using testing::OnGpu;
using testing::OnHost;
using testing::RandomTensor;
using testing::ToDoubles;
using testing::ValuesOnBoth;

constexpr double kNone = -std::numeric_limits<double>::infinity();
const double kNan = std::nan("");

// Windows [begin, end) of each row on both sides.
struct Windows {
  Windows(std::vector<int32_t> begin, std::vector<int32_t> end)
      : begin_T(IntsOnBoth({static_cast<int64_t>(begin.size())}, begin)),
        end_T(IntsOnBoth({static_cast<int64_t>(end.size())}, end)) {}
  KeyWindows gpu() const { return {begin_T.gpu, end_T.gpu, {}, {}}; }
  KeyWindows cpu() const { return {begin_T.cpu, end_T.cpu, {}, {}}; }
  OnBoth begin_T, end_T;
};

// Every place where results differ from the definition's on the same fp32 scores.
void ExpectTheDefinition(const Tensor& scores_f32, const Windows& windows, int64_t k) {
  const TopkResult cpu = TopkSelect(Cpu(), scores_f32, windows.cpu(), k, ChosenScores::kKeep);
  const TopkResult gpu =
      TopkSelect(Gpu(), OnGpu(scores_f32), windows.gpu(), k, ChosenScores::kKeep);
  ExpectSameBits(gpu.scores_TK, cpu.scores_TK);
  ExpectSameBits(gpu.ids_TK, cpu.ids_TK);
  ExpectSameBits(gpu.ties_T, cpu.ties_T);
  ExpectSameBits(gpu.nan_row_1, cpu.nan_row_1);
}

// Windows of every kind: whole rows, causal ones, documents, single keys, none.
Windows MixedWindows(int64_t T, int64_t S) {
  std::vector<int32_t> begin, end;
  for (int64_t t = 0; t < T; ++t) {
    const int64_t kinds[5][2] = {
        {0, S}, {0, (t + 1) * S / T}, {S / 3, S - S / 4}, {t % S, t % S + 1}, {t % S, t % S}};
    begin.push_back(static_cast<int32_t>(kinds[t % 5][0]));
    end.push_back(static_cast<int32_t>(kinds[t % 5][1]));
  }
  return {begin, end};
}

TEST(CudaTopkSelect, ChoosesTheDefinitionsKeysOfRandomScores) {
  struct Size {
    int64_t T, S, K;
  };
  for (const auto& [T, S, K] : {Size{33, 257, 32},
                                {9, 5000, 512},
                                {5, 70001, 2048},
                                {4, 40, 64},
                                {7, 6000, 2048},
                                {3, 1, 1},
                                {0, 16, 4}}) {
    SCOPED_TRACE(::testing::Message() << T << " x " << S << ", " << K);
    ExpectTheDefinition(RandomTensor(Cpu(), DType::kF32, {T, S}, 7), MixedWindows(T, S), K);
  }
}

TEST(CudaTopkSelect, TakesTheLowestOfEqualScoresAndCountsTheOthers) {
  // A few different values, so that each threshold falls into a plateau.
  for (const int64_t values : {1, 2, 5}) {
    const int64_t T = 10, S = 9001;
    const Tensor scores = Cpu().Empty(DType::kF32, {T, S});
    for (int64_t i = 0; i < T * S; ++i) {
      scores.data<float>()[i] = static_cast<float>(i * 7919 % 104729 % values) - 2;
    }
    ExpectTheDefinition(scores, MixedWindows(T, S), 700);
  }
}

TEST(CudaTopkSelect, HoldsBothZerosEqual) {
  const OnBoth scores = ValuesOnBoth(DType::kF32, {2, 6},
                                     {-0.0, 0, -1, -0.0, 0, -2,  //
                                      0, -0.0, 3, 0, -0.0, -0.0});
  const Windows windows({0, 0}, {6, 6});
  const TopkResult gpu = TopkSelect(Gpu(), scores.gpu, windows.gpu(), 3);
  EXPECT_THAT(ToDoubles(OnHost(gpu.ids_TK)), ::testing::ElementsAre(0, 1, 3, 0, 1, 2));
  EXPECT_THAT(ToDoubles(OnHost(gpu.ties_T)), ::testing::ElementsAre(1, 3));
  EXPECT_THAT(ToDoubles(OnHost(gpu.nan_row_1)), ::testing::ElementsAre(-1));
}

TEST(CudaTopkSelect, NamesTheFirstRowWithNanAndReadsInsideTheWindowsOnly) {
  // Row 0 has its NaN outside the window, rows 2 and 3 inside.
  const OnBoth scores = ValuesOnBoth(DType::kF32, {4, 5}, {kNan,  1,     2,    3,     kNan,  //
                                                           kNone, kNone, 4,    kNone, 5,     //
                                                           1,     2,     kNan, 3,     4,     //
                                                           kNan,  1,     1,    1,     1});
  const Windows windows({1, 0, 0, 0}, {4, 5, 5, 2});
  const TopkResult gpu = TopkSelect(Gpu(), scores.gpu, windows.gpu(), 2);
  EXPECT_THAT(ToDoubles(OnHost(gpu.ids_TK)), ::testing::ElementsAre(2, 3, 2, 4, -1, -1, -1, -1));
  EXPECT_THAT(ToDoubles(OnHost(gpu.ties_T)), ::testing::ElementsAre(0, 0, 0, 0));
  EXPECT_THAT(ToDoubles(OnHost(gpu.nan_row_1)), ::testing::ElementsAre(2));
  // Long windows take another way through the kernel.
  const Tensor long_rows = RandomTensor(Cpu(), DType::kF32, {6, 20000}, 3);
  long_rows.data<float>()[20000 * 4 + 17777] = static_cast<float>(kNan);
  ExpectTheDefinition(long_rows, Windows({0, 0, 0, 0, 0, 5}, {20000, 19, 20000, 7, 20000, 5}),
                      1000);
}

TEST(CudaTopkSelect, GivesTheSameBitsTwice) {
  const Tensor scores = OnGpu(RandomTensor(Cpu(), DType::kF32, {64, 33000}, 5));
  const Windows windows = MixedWindows(64, 33000);
  const TopkResult first = TopkSelect(Gpu(), scores, windows.gpu(), 2048);
  const TopkResult second = TopkSelect(Gpu(), scores, windows.gpu(), 2048);
  ExpectSameBits(first.ids_TK, OnHost(second.ids_TK));
  ExpectSameBits(first.ties_T, OnHost(second.ties_T));
}

TEST(CudaTopkSelectDeathTest, NamesItsLimits) {
  const Tensor scores = Gpu().Zeros(DType::kF32, {1, 4});
  const Windows windows({0}, {4});
  EXPECT_DEATH(TopkSelect(Gpu(), scores, windows.gpu(), 2049),
               "the best 2049 of .*; on CUDA at most 2048 of 262144 fp32 scores");
}

}  // namespace
}  // namespace baleen
