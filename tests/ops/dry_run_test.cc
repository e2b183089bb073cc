// A dry call of every op gives what the real call gives, except numbers: the same shapes, dtypes
// and bytes of the pool, held and at the peak, use by use. So the planner's figures are the
// trainer's.
#include <gtest/gtest.h>

#include <set>

#include "tests/ops/dry_cases.h"

namespace baleen {
namespace {

using namespace testing;  // NOLINT: the cases and the helpers of tests/support

// What the pool says after the call, with the results still held, and the results.
struct Outcome {
  std::vector<Tensor> results;
  std::map<std::string, MemoryUse> uses;
};
Outcome Measure(const Context& context, const OpCase& op, DType dtype) {
  const Call call = op.make(context, dtype);
  context.pool().ResetPeak();
  Outcome outcome;
  outcome.results = call();
  outcome.uses = context.pool().Uses();
  outcome.uses["total"] = context.pool().Total();
  return outcome;
}

class DryRun : public ::testing::TestWithParam<OpCase> {};

TEST_P(DryRun, TakesTheMemoryOfTheRealCall) {
  for (const DType dtype : {DType::kF32, DType::kF64}) {
    const Context real = Context::Cpu(), dry = Context::Dry();
    const Outcome expected = Measure(real, GetParam(), dtype),
                  found = Measure(dry, GetParam(), dtype);
    ASSERT_EQ(found.results.size(), expected.results.size());
    for (size_t i = 0; i < found.results.size(); ++i) {
      EXPECT_EQ(found.results[i].DebugString(), expected.results[i].DebugString()) << i;
    }
    ASSERT_EQ(found.uses.size(), expected.uses.size());
    for (const auto& [use, memory] : expected.uses) {
      EXPECT_EQ(found.uses.at(use).bytes, memory.bytes) << use << " " << dtype;
      EXPECT_EQ(found.uses.at(use).peak_bytes, memory.peak_bytes) << use << " " << dtype;
    }
  }
}

TEST_P(DryRun, TakesBF16WithItsSumsInF32) {
  const Context dry = Context::Dry();
  const Outcome f32 = Measure(dry, GetParam(), DType::kF32),
                bf16 = Measure(dry, GetParam(), DType::kBF16);
  ASSERT_EQ(bf16.results.size(), f32.results.size());
  for (size_t i = 0; i < bf16.results.size(); ++i) {
    EXPECT_EQ(bf16.results[i].shape(), f32.results[i].shape());
    const bool by_row =
        f32.results[i].dtype() != DType::kF32 || bf16.results[i].dtype() == DType::kF32;
    EXPECT_TRUE(by_row || bf16.results[i].dtype() == DType::kBF16) << bf16.results[i].DebugString();
  }
}

INSTANTIATE_TEST_SUITE_P(Ops, DryRun, ::testing::ValuesIn(AllCases()),
                         [](const auto& info) { return std::string(info.param.name); });

TEST(DryRunCounts, MultiplicationsAndAdditionsByOp) {
  OpCounter counter;
  const Context dry = Context::Dry(&counter);
  for (const OpCase& op : AllCases()) op.make(dry, DType::kBF16)();
  const auto flops = [&](const char* name) { return counter.ops.at(name).flops; };
  // Matmul and the three products of a linear layer.
  EXPECT_EQ(flops("matmul"), 2.0 * 4 * 7 * 300 * 9 + 3 * 2.0 * kT * kD * 700);
  // The three products, and one of two layers.
  EXPECT_EQ(flops("grouped_matmul"), 5 * 2.0 * 60 * 40 * kD);
  EXPECT_EQ(counter.ops.at("grouped_matmul").calls, 4);
  EXPECT_EQ(flops("fp8_matmul"), 3 * 2.0 * kT * 304 * 48);
  EXPECT_EQ(flops("fp8_grouped_matmul"), 2 * 2.0 * 60 * 304 * 48);
  const double pairs = kT * (kT + 1) / 2.0, listed = kT * kK;
  EXPECT_EQ(flops("Attention"), pairs * kH * 2 * (kQ + kV));
  EXPECT_EQ(flops("AttentionBackward"), pairs * kH * 2 * (3 * kQ + 2 * kV));
  EXPECT_EQ(flops("MaskedAttention"), listed * kH * 2 * (kQ + kV));
  EXPECT_EQ(flops("SparseAttention"), listed * kH * 2 * (kQ + kV));
  EXPECT_EQ(flops("SparseAttentionBackward"), listed * kH * 2 * (3 * kQ + 2 * kV));
  EXPECT_EQ(flops("IndexerScores"), pairs * kI * 2 * (kJ + 1));
  EXPECT_EQ(flops("IndexerScoresFp8"), pairs * kI * 2 * (kJ + 1));
  EXPECT_EQ(flops("SparseIndexerLoss"), listed * kI * kJ * 6);
  EXPECT_EQ(flops("DenseIndexerLoss"), pairs * 2 * (4 * kI * kJ + kH * kQ));
  EXPECT_EQ(counter.ops.at("swiglu").calls, 2);
  EXPECT_EQ(counter.ops.at("swiglu").bytes, 8.0 * kT * kD * 2);
}

TEST(DryRunComputes, Nothing) {
  const Context dry = Context::Dry();
  const Tensor x = RandomTensor(dry, DType::kF32, {64, 64}, 1);
  for (const double y : ToDoubles(Linear(dry, x, x))) ASSERT_EQ(y, 0);
  AddInPlace(dry, x, x);
  EXPECT_TRUE(SameBits(x, RandomTensor(dry, DType::kF32, {64, 64}, 1)));
}

// E experts, their groups, how many groups and experts a row takes.
struct Choice {
  int64_t E, n_group, topk_group, A;
};

TEST(DryRunRouter, GivesAllExpertsEquallyManyRowsFromTheRightNumberOfGroups) {
  const Context dry = Context::Dry();
  for (const Choice& choice :
       {Choice{256, 8, 4, 8}, Choice{8, 1, 1, 3}, Choice{16, 4, 2, 3}, Choice{4, 1, 1, 4}}) {
    const int64_t rows = choice.E * 12;
    const RouterParams params = {.n_group = choice.n_group,
                                 .topk_group = choice.topk_group,
                                 .num_experts_per_tok = choice.A};
    const RouterResult r = Route(dry, dry.Zeros(DType::kBF16, {rows, choice.E}),
                                 dry.Zeros(DType::kF32, {choice.E}), params);
    const Tensor counts = dry.Zeros(DType::kI64, {choice.E});
    CountExperts(dry, r.expert_ids_TA, counts);
    for (const double count : ToDoubles(counts)) EXPECT_EQ(count, 12.0 * choice.A) << choice.E;
    const Permutation p = BuildPermutation(dry, r.expert_ids_TA, 0, choice.E);
    EXPECT_EQ(p.offsets_L1.data<int32_t>()[choice.E], rows * choice.A);
    for (int64_t t = 0; t < rows; ++t) {
      const int32_t* ids = r.expert_ids_TA.data<int32_t>() + t * choice.A;
      std::set<int64_t> groups;
      for (int64_t a = 0; a < choice.A; ++a) {
        groups.insert(ids[a] / (choice.E / choice.n_group));
        if (a > 0) ASSERT_LT(ids[a - 1], ids[a]) << "row " << t;
      }
      ASSERT_EQ(static_cast<int64_t>(groups.size()), choice.topk_group) << "row " << t;
    }
  }
}

TEST(DryRunSelection, ReportsNoNaN) {
  const Context dry = Context::Dry();
  const TopkResult r = TopkSelect(dry, dry.Zeros(DType::kF32, {3, 8}), CausalWindows(dry, 3), 4);
  EXPECT_EQ(ToDoubles(r.nan_row_1), (std::vector<double>{-1}));
}

}  // namespace
}  // namespace baleen
