// What baleen bench measures with: keys near and random, the arithmetic of a timeline, the kinds of
// kernels; and that replaced keys are what attention gets.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>
#include <set>

#include "tests/trainer/model_rig.h"
#include "trainer/bench/bench_ids.h"
#include "trainer/bench/kernel_kind.h"
#include "trainer/bench/timeline.h"

namespace baleen {
namespace {

using ::testing::DoubleNear;
using testing::ModelRig;
using testing::RigOptions;

constexpr int64_t kLength = 512, kTopk = 48;

std::vector<int32_t> AllRows(int64_t count) {
  std::vector<int32_t> rows(count);
  std::iota(rows.begin(), rows.end(), 0);
  return rows;
}

std::set<int32_t> KeysOf(const std::vector<int32_t>& ids, int64_t row) {
  const auto begin = ids.begin() + row * kTopk;
  std::set<int32_t> keys(begin, begin + kTopk);
  keys.erase(-1);
  return keys;
}

TEST(BenchIds, AreAscendingKeysOfTheRowsOwnSequence) {
  for (const BenchIds kind : {BenchIds::kNear, BenchIds::kRandom}) {
    const std::vector<int32_t> ids = MakeBenchIds(kind, AllRows(2 * kLength), kLength, kTopk, 7);
    for (int64_t row = 0; row < 2 * kLength; ++row) {
      const int64_t begin = row / kLength * kLength;
      const int64_t count = std::min(kTopk, row + 1 - begin);
      const int32_t* of_row = ids.data() + row * kTopk;
      for (int64_t i = 0; i < kTopk; ++i) {
        if (i >= count) {
          EXPECT_EQ(of_row[i], -1) << row;
          continue;
        }
        EXPECT_GE(of_row[i], i == 0 ? begin : of_row[i - 1] + 1) << row;
        EXPECT_LE(of_row[i], row);
      }
    }
  }
}

TEST(BenchIds, NearRowsShareAPoolAndRandomOnesDoNot) {
  const auto keys_of_a_group = [](BenchIds kind) {
    const std::vector<int32_t> ids = MakeBenchIds(kind, AllRows(kLength), kLength, kTopk, 7);
    std::set<int32_t> all;
    for (int64_t row = 448; row < 480; ++row) {
      const std::set<int32_t> keys = KeysOf(ids, row);
      all.insert(keys.begin(), keys.end());
    }
    return all.size();
  };
  EXPECT_LE(keys_of_a_group(BenchIds::kNear), kTopk + kTopk / 2);
  EXPECT_GE(keys_of_a_group(BenchIds::kRandom), 400u);  // of 449 to 480 keys, 48 drawn 32 times
}

TEST(BenchIds, AreAFunctionOfTheRowOnEveryRank) {
  const std::vector<int32_t> all =
      MakeBenchIds(BenchIds::kNear, AllRows(kLength), kLength, kTopk, 7);
  const std::vector<int32_t> rows = {5, 200, 201, 511};
  const std::vector<int32_t> some = MakeBenchIds(BenchIds::kNear, rows, kLength, kTopk, 7);
  for (size_t n = 0; n < rows.size(); ++n)
    EXPECT_EQ(KeysOf(some, static_cast<int64_t>(n)), KeysOf(all, rows[n])) << rows[n];
}

TEST(BenchIds, StandInForTheIndexersChoice) {
  RigOptions options;
  options.model.attention = AttentionForm::kSparse;
  options.model.indexer_loss = IndexerLossKind::kSparse;
  ModelRig rig(options, testing::TinyConfig(), 11);
  const std::vector<double> tokens(65, 3);
  const Batch batch = rig.BatchOf(tokens, 1);
  const int64_t topk = rig.config_.index_topk;
  const Tensor ids =
      IntTensor(rig.context_, MakeBenchIds(BenchIds::kRandom, AllRows(64), 64, topk, 3))
          .Reshaped({64, topk});
  rig.options_.model.replaced_ids_RK = ids;
  StepStats stats = rig.NewStats();
  ModelPart::Saved saved;
  rig.network().Forward(rig.context(), batch, PassOptions(), Tensor(), stats, saved);
  for (const Block::Saved& block : saved.blocks) EXPECT_EQ(block.ids_RK.raw(), ids.raw());
}

DeviceRecord Record(DeviceWork work, const std::string& name, int stream, double begin, double end,
                    int mark = 0) {
  return {.work = work, .name = name, .stream = stream, .begin = begin, .end = end, .mark = mark};
}

// Phases 0 and 1, then 0 again; a message beside them, a gap, and work outside of the marks.
std::vector<DeviceRecord> SomeRecords() {
  const auto kernel = DeviceWork::kKernel;
  return {Record(kernel, "rms_norm_cuda_cu_Before", 1, 0.0, 1.0),
          Record(DeviceWork::kMark, "", 1, 1.0, 1.0, 0),
          Record(kernel, "nvjet_a", 1, 1.0, 3.0),
          Record(kernel, "ncclDevKernel_AllReduce", 2, 2.0, 5.0),
          Record(DeviceWork::kMark, "", 1, 4.0, 4.0, 1),
          Record(kernel, "nvjet_a", 1, 4.0, 6.0),
          Record(DeviceWork::kMark, "", 1, 7.0, 7.0, 0),
          Record(DeviceWork::kCopy, "DtoD", 1, 7.0, 8.0),
          Record(DeviceWork::kMark, "", 1, 9.0, 9.0, 2),
          Record(kernel, "nvjet_a", 1, 9.5, 10.0)};
}

TEST(BenchTimeline, SumsPhasesKindsGapsAndHiddenMessages) {
  const DeviceTimeline timeline = MakeTimeline(SomeRecords(), {"first", "second"});
  EXPECT_THAT(timeline.seconds, DoubleNear(8, 1e-12));
  EXPECT_THAT(timeline.idle_seconds, DoubleNear(2, 1e-12));  // 6 to 7, 8 to 9
  ASSERT_EQ(timeline.phases.size(), 2u);
  EXPECT_THAT(timeline.phases[0].seconds, DoubleNear(5, 1e-12));
  EXPECT_THAT(timeline.phases[0].idle_seconds, DoubleNear(1, 1e-12));
  EXPECT_THAT(timeline.phases[1].seconds, DoubleNear(3, 1e-12));
  EXPECT_THAT(timeline.phases[1].idle_seconds, DoubleNear(1, 1e-12));
  EXPECT_THAT(timeline.message_seconds, DoubleNear(3, 1e-12));
  EXPECT_THAT(timeline.hidden_seconds, DoubleNear(2, 1e-12));  // 2 to 3, 4 to 5
  ASSERT_EQ(timeline.kinds.size(), 3u);
  EXPECT_EQ(timeline.kinds[0].name, "GEMM");
  EXPECT_THAT(timeline.kinds[0].seconds, DoubleNear(4, 1e-12));
  EXPECT_EQ(timeline.kinds[0].launches, 2);
  EXPECT_EQ(timeline.kinds[1].name, "messages");
  EXPECT_EQ(timeline.kinds[2].name, "copy DtoD");
}

TEST(BenchTimeline, CountsOnlyWhatOfAMessageLiesWithinTheStep) {
  const DeviceWork kernel = DeviceWork::kKernel;
  const DeviceTimeline timeline =
      MakeTimeline({Record(kernel, "ncclDevKernel_AllGather", 2, 0.0, 3.0),  // of the step before
                    Record(DeviceWork::kMark, "", 1, 1.0, 1.0, 0),
                    Record(kernel, "nvjet_a", 1, 1.0, 2.0),
                    Record(kernel, "ncclDevKernel_AllGather", 2, 4.0, 9.0),  // left to the next
                    Record(DeviceWork::kMark, "", 1, 5.0, 5.0, 1)},
                   {"only"});
  EXPECT_THAT(timeline.message_seconds, DoubleNear(3, 1e-12));  // 1 to 3, 4 to 5
  EXPECT_THAT(timeline.hidden_seconds, DoubleNear(1, 1e-12));   // 1 to 2
  EXPECT_THAT(timeline.idle_seconds, DoubleNear(1, 1e-12));     // 3 to 4
  ASSERT_EQ(timeline.kinds.size(), 2u);
  EXPECT_EQ(timeline.kinds[0].name, "messages");
  EXPECT_EQ(timeline.kinds[0].launches, 1);
}

TEST(BenchTimeline, WithoutMarksIsEmpty) {
  const DeviceTimeline timeline = MakeTimeline({SomeRecords().front()}, {"first"});
  EXPECT_EQ(timeline.seconds, 0);
  EXPECT_TRUE(timeline.kinds.empty());
}

TEST(BenchTimeline, TraceHasARowForPhasesAndOneForEachStream) {
  const std::string trace = ChromeTrace(SomeRecords(), {"first", "second"});
  for (const char* part :
       {"\"phases\"", "\"stream 1\"", "\"stream 2\"", "\"second\"", "traceEvents"})
    EXPECT_THAT(trace, ::testing::HasSubstr(part));
}

TEST(BenchKernelKind, KnowsTheKindsByFileNamespaceAndLibrary) {
  const std::string anonymous =
      "_ZN6baleen46_GLOBAL__N__bccd5774_13_adamw_cuda_cu_bf76dbd1"
      "L11AdamwKernelILi4EfEEvllNS_13AdamwCudaArgsE";
  EXPECT_EQ(KernelKind(anonymous), "AdamW");
  EXPECT_EQ(ShortKernelName(anonymous), "AdamwKernel");
  EXPECT_EQ(KernelKind("_ZN6baleen16indexer_backward14GradientKernelENS0_6ParamsE"),
            "indexer backward");
  EXPECT_EQ(ShortKernelName("_ZN6baleen16indexer_backward14GradientKernelENS0_6ParamsE"),
            "GradientKernel");
  EXPECT_EQ(KernelKind("_ZN6baleen18dense_indexer_loss12TargetKernelENS0_6ParamsE"),
            "dense indexer loss");
  EXPECT_EQ(KernelKind("nvjet_sm90_tst_256x128_64x4_1x2_h_bz_coopA_NTN"), "GEMM");
  EXPECT_EQ(KernelKind("ncclDevKernel_ReduceScatter_Sum_f32_RING_LL(ncclDevKernelArgs)"),
            "messages");
  EXPECT_EQ(KernelKind("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_f16_knob_6"),
            "attention backward");
  EXPECT_EQ(KernelKind("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_f16_knob_6"),
            "attention");
  EXPECT_EQ(KernelKind("something_else"), "other");
}

}  // namespace
}  // namespace baleen
