// What runs on a GPU for sparse attention, and the memory it takes: host functions, and a dry
// context's account of them.
#include <gtest/gtest.h>

#include "kernels/ops/attention/sparse_attention.h"
#include "kernels/ops/attention/sparse_attention_backward_plan_cuda.h"
#include "kernels/ops/attention/sparse_attention_forward_plan_cuda.h"
#include "kernels/ops/attention/sparse_attention_general_cuda.h"
#include "kernels/ops/attention/sparse_attention_packs_cuda.h"

namespace baleen {
namespace {

constexpr size_t kGiB = size_t{1} << 30;
// Bytes of the rows of 32 queries of K = 2048, three chunks of them: as bf16, and short.
constexpr size_t kStepBytes = size_t{3} * 32 * 2048 * 576 * 2;
constexpr size_t kShortStepBytes = size_t{3} * 32 * 2048 * (512 / 8 * 12 + 64 * 2);

SparseAttentionBackwardPlan PlanOf(const SparseAttentionBackwardShape& shape, size_t budget) {
  return PlanSparseAttentionBackward(shape, budget);
}

TEST(PlanSparseAttentionForward, DividesTheWorksOfTheLastTurnAmongAllMultiprocessors) {
  struct Case {
    int tokens, heads, queries_a_pack, selected, whole, divided, parts;
  };
  for (const Case& c : {Case{4096, 64, 1, 2048, 31 * 132, 4, 16},
                        {4096, 128, 1, 2048, 62 * 132, 8, 16},
                        {32768, 64, 1, 2048, 248 * 132, 32, 4},
                        {198, 64, 1, 2048, 132, 66, 2},
                        {140, 64, 1, 192, 132, 8, 3},         // no more than blocks of keys
                        {199, 64, 1, 2048, 199, 0, 1},        // too many left to divide
                        {131072, 64, 1, 2048, 131072, 0, 1},  // 128 left
                        {264, 64, 1, 2048, 264, 0, 1},        // none left
                        {131, 64, 1, 2048, 131, 0, 1},        // less than a turn
                        {140, 64, 1, 64, 140, 0, 1},          // one block of keys
                        {1057, 16, 4, 8192, 264, 1, 16}}) {   // 265 packs
    const int works = SparseAttentionForwardWorks(c.tokens, c.heads, c.queries_a_pack);
    const SparseAttentionForwardPlan plan = PlanSparseAttentionForward(works, c.selected);
    EXPECT_EQ(plan.whole, c.whole) << c.tokens;
    EXPECT_EQ(plan.divided, c.divided) << c.tokens;
    EXPECT_EQ(plan.parts, c.parts) << c.tokens;
    EXPECT_EQ(plan.whole + plan.divided, works) << c.tokens;
    EXPECT_EQ(plan.turns, c.whole + c.divided * c.parts) << c.tokens;
    EXPECT_EQ(SparseAttentionForwardPartFloats(plan), int64_t{c.divided} * c.parts * 64 * 513)
        << c.tokens;
  }
}

TEST(PlanSparseAttentionBackward, TakesTheChunksThatTheBenchFoundBest) {
  // Two tiles of heads gain nothing beyond 288 queries up to 32K keys.
  EXPECT_EQ(PlanOf({4096, 8192, 128, 2048}, 16 * kGiB).chunk, 288);
  EXPECT_EQ(PlanOf({4096, 32768, 65, 2048}, 16 * kGiB).chunk, 288);
  EXPECT_EQ(PlanOf({4096, 32769, 128, 2048}, 16 * kGiB).chunk, 1024);
  EXPECT_EQ(PlanOf({4096, 8192, 64, 2048}, 16 * kGiB).chunk, 1024);
}

TEST(PlanSparseAttentionBackward, GivesFourFifthsOfTheBudgetToRows) {
  for (const size_t steps : {1, 2, 9}) {
    for (const int heads : {64, 128}) {
      const size_t step = heads == 64 ? kShortStepBytes : kStepBytes;
      const size_t enough = step * steps / 4 * 5;  // a multiple of 5
      EXPECT_EQ(PlanOf({4096, 8192, heads, 2048}, enough).chunk, 32 * static_cast<int>(steps));
      if (steps == 1) continue;
      EXPECT_EQ(PlanOf({4096, 8192, heads, 2048}, enough - 5).chunk,
                32 * static_cast<int>(steps - 1));
    }
  }
  // Never below 32 queries, nor below one chunk a launch, whatever the budget.
  const SparseAttentionBackwardPlan least = PlanOf({4096, 1 << 20, 128, 2048}, 1);
  EXPECT_EQ(least.chunk, 32);
  EXPECT_EQ(least.span, 32);
}

TEST(PlanSparseAttentionBackward, LaunchesWholeChunksAndNoMoreThanThereAreQueries) {
  // 4096 queries are 15 chunks of 288.
  EXPECT_EQ(PlanOf({4096, 8192, 128, 2048}, 16 * kGiB).span, 15 * 288);
  // At most 8192 queries, 29 chunks, in a launch.
  EXPECT_EQ(PlanOf({100000, 8192, 128, 2048}, 16 * kGiB).span, 29 * 288);
  // Fewer where a fifth of the budget holds the index of fewer: here 264 bytes a key and chunk.
  const SparseAttentionBackwardShape many_keys{4096, 1 << 20, 128, 64};
  const size_t three = size_t{5} * 3 * 264 << 20;
  EXPECT_EQ(PlanOf(many_keys, three).chunk, 1024);
  EXPECT_EQ(PlanOf(many_keys, three).span, 3 * 1024);
  EXPECT_EQ(PlanOf(many_keys, three - 5).span, 2 * 1024);
  // Chunks of a few queries take a few queries' memory.
  EXPECT_EQ(PlanOf({40, 8192, 128, 2048}, 16 * kGiB).chunk, 64);
  EXPECT_EQ(PlanOf({1, 8192, 16, 64}, 16 * kGiB).chunk, 32);
  EXPECT_EQ(PlanOf({0, 0, 16, 64}, 16 * kGiB).span, 32);
}

TEST(SparseAttentionBackwardWorkspace, HoldsEachPartOnceAndStaysNearTheBudget) {
  const SparseAttentionBackwardShape shape{4096, 8191, 128, 2048};
  const SparseAttentionBackwardPlan plan{64, 128};
  const SparseAttentionBackwardLayout layout = LayOutSparseAttentionBackward(shape, plan);
  const size_t parts[] = {layout.masks_WS,   layout.ranks_WS, layout.starts_CS, layout.counts_CS,
                          layout.counters_C, layout.rows,     layout.bytes};
  const size_t sizes[] = {size_t{4} * 4 * 8191, size_t{4} * 4 * 8191, size_t{2} * 4 * 8191,
                          size_t{2} * 4 * 8191, (3 * 2 + 64 / 8) * 4, kStepBytes * 2};
  for (int i = 0; i < 6; ++i) {
    EXPECT_EQ(parts[i] % 256, 0u) << i;
    EXPECT_GE(parts[i + 1], parts[i] + sizes[i]) << i;
    EXPECT_LT(parts[i + 1], parts[i] + sizes[i] + 256) << i;
  }
  for (const size_t budget : {kGiB / 2, kGiB, 5 * kGiB / 2, 5 * kGiB}) {
    for (const int keys : {64, 8192, 131072}) {
      for (const int heads : {1, 64, 128}) {
        const SparseAttentionBackwardShape many{4096, keys, heads, 2048};
        EXPECT_LE(SparseAttentionBackwardWorkspace(many, PlanOf(many, budget)), budget + 4096)
            << budget << " bytes, " << keys << " keys, " << heads << " heads";
      }
    }
  }
}

TEST(PlanSparseAttentionBackwardPacks, TakesNoMoreMemoryThanSingleQueriesOrTheBudget) {
  constexpr size_t kBudget = 5 * kGiB / 2;
  for (const int tokens : {528, 1056, 4096, 4097, 100000}) {
    for (const int keys : {0, 1, 8192, 131072, 1 << 22, 1 << 28}) {
      for (const int heads : {16, 32}) {
        const SparseAttentionBackwardShape shape{tokens, keys, heads, 2048};
        const SparseAttentionBackwardPlan single = PlanOf(shape, kBudget);
        const SparseAttentionBackwardPacksPlan packs =
            PlanSparseAttentionBackwardPacks(shape, single, 64 / heads, kBudget);
        SCOPED_TRACE(::testing::Message()
                     << tokens << " queries, " << keys << " keys, " << heads << " heads");
        if (keys <= 131072) {
          EXPECT_EQ(packs.queries, 64 / heads);
        } else if (keys == 1 << 28) {
          EXPECT_EQ(packs.queries, 1);
        }
        const size_t bytes = SparseAttentionBackwardWorkspace(shape, single);
        EXPECT_LE(SparseAttentionBackwardWorkspace(shape, single, packs), std::max(bytes, kBudget));
        if (packs.queries == 1) continue;
        EXPECT_EQ(packs.shape.num_tokens, (tokens + packs.queries - 1) / packs.queries);
        EXPECT_EQ(packs.shape.num_selected, packs.queries * 2048);
        // A launch has whole chunks, whichever the device chooses.
        for (const int chunk : packs.chunks) {
          EXPECT_EQ(packs.span % chunk, 0);
          EXPECT_EQ(chunk % 32, 0);
          EXPECT_EQ(chunk % packs.packs_a_sum, 0);
          EXPECT_LE(chunk, packs.LargestChunk());
          EXPECT_GE(chunk, packs.SmallestChunk());
        }
        const SparseAttentionBackwardLayout layout = LayOutSparseAttentionBackward(packs);
        EXPECT_LE(layout.rows + size_t(packs.ring_rows) * kScatterRowBytesShort, layout.bytes);
      }
    }
  }
  // Four chunks at least, of 64 packs or more.
  const auto largest = [&](int tokens, int queries) {
    const SparseAttentionBackwardShape shape{tokens, 8192, 64 / queries, 2048};
    return PlanSparseAttentionBackwardPacks(shape, PlanOf(shape, kBudget), queries, kBudget)
        .LargestChunk();
  };
  EXPECT_EQ(largest(4096, 2), 384);
  EXPECT_EQ(largest(4096, 4), 256);
  EXPECT_EQ(largest(4092, 4), 192);
  EXPECT_EQ(largest(528, 2), 64);
  EXPECT_EQ(largest(400, 2), 64);
  // All queries of a call of up to 8192 go in one launch.
  const SparseAttentionBackwardShape shape{4096, 8192, 16, 2048};
  EXPECT_GE(PlanSparseAttentionBackwardPacks(shape, PlanOf(shape, kBudget), 4, kBudget).span, 1024);
  EXPECT_EQ(PlanSparseAttentionBackwardPacks(shape, PlanOf(shape, kBudget), 1, kBudget).queries, 1);
}

TEST(ChunkSparseAttentionGeneral, TakesAllRowsOfASmallModelAndOneAtLeast) {
  const SparseAttentionGeneralChunk tiny = ChunkSparseAttentionGeneral(4096, 255, 64);
  EXPECT_EQ(tiny.rows, 4096);
  EXPECT_EQ(tiny.slots, 4096 * 64);
  EXPECT_EQ(tiny.floats, int64_t{4096} * 64 * 256);
  EXPECT_EQ(ChunkSparseAttentionGeneral(4096, 576, 2048).rows, 113);  // of 4.7 MB
  EXPECT_EQ(ChunkSparseAttentionGeneral(4096, 8192, 1 << 20).rows, 1);
  EXPECT_EQ(ChunkSparseAttentionGeneral(0, 576, 2048).floats, 0);
}

TEST(SparseAttentionKernelName, SaysWhichShapesRunOnTensorCores) {
  const std::string fast = SparseAttentionKernelName(DType::kBF16, 128, 576, 512, 2048);
  EXPECT_EQ(fast, "bf16 on tensor cores");
  EXPECT_EQ(SparseAttentionKernelName(DType::kBF16, 33, 576, 512, 1), fast);
  EXPECT_EQ(SparseAttentionKernelName(DType::kBF16, 1, 576, 512, 1), fast + ", packs of 4 queries");
  EXPECT_EQ(SparseAttentionKernelName(DType::kBF16, 16, 576, 512, 2048),
            fast + ", packs of 4 queries, backward where it pays");
  EXPECT_EQ(SparseAttentionKernelName(DType::kBF16, 32, 576, 512, 2048),
            fast + ", packs of 2 queries, backward where it pays");
  EXPECT_EQ(SparseAttentionKernelName(DType::kBF16, 96, 576, 512, 100), fast);
  const std::string general = SparseAttentionKernelName(DType::kBF16, 4, 256, 128, 64);
  EXPECT_EQ(general, "general, fp32 arithmetic");
  EXPECT_EQ(SparseAttentionKernelName(DType::kF32, 128, 576, 512, 2048), general);
  EXPECT_EQ(SparseAttentionKernelName(DType::kBF16, 129, 576, 512, 2048), general);
  EXPECT_EQ(SparseAttentionKernelName(DType::kBF16, 128, 576, 512, 2049), general);
  EXPECT_EQ(SparseAttentionKernelName(DType::kBF16, 128, 576, 448, 2048), general);
}

TEST(SparseAttentionQueriesAPack, FillsTheRowsWithNeighboursWhereThereAreEnough) {
  EXPECT_EQ(SparseAttentionQueriesAPack(4096, 1), 4);
  EXPECT_EQ(SparseAttentionQueriesAPack(4096, 16), 4);
  EXPECT_EQ(SparseAttentionQueriesAPack(4096, 17), 2);
  EXPECT_EQ(SparseAttentionQueriesAPack(4096, 32), 2);
  EXPECT_EQ(SparseAttentionQueriesAPack(4096, 33), 1);
  EXPECT_EQ(SparseAttentionQueriesAPack(4096, 128), 1);
  // Each of 132 multiprocessors has two packs at least.
  EXPECT_EQ(SparseAttentionQueriesAPack(1056, 16), 4);
  EXPECT_EQ(SparseAttentionQueriesAPack(1055, 16), 2);
  EXPECT_EQ(SparseAttentionQueriesAPack(527, 16), 1);
  EXPECT_EQ(SparseAttentionQueriesAPack(0, 16), 1);
}

TEST(SparseAttentionPacks, CountsTheLastPackAndRoundsTheUnionUp) {
  SparseAttentionPacks packs;
  packs.num_tokens = 1057;
  packs.num_selected = 50;
  packs.queries = 4;
  EXPECT_EQ(packs.NumPacks(), 265);
  EXPECT_EQ(packs.Width(), 256);
  packs.queries = 2;
  EXPECT_EQ(packs.NumPacks(), 529);
  EXPECT_EQ(packs.Width(), 128);
}

// Peak bytes of the kernels' workspaces in a dry forward.
int64_t DryForwardWorkspaces(int64_t T, int64_t H, int64_t K) {
  const Context dry = Context::Dry();
  SparseAttention(dry, dry.Empty(DType::kBF16, {T, H, 576}), dry.Empty(DType::kBF16, {9, 576}),
                  dry.Empty(DType::kI32, {T, K}), 512, 1.0);
  const auto uses = dry.pool().Uses();
  const auto found = uses.find("kernel workspaces");
  return found == uses.end() ? 0 : found->second.peak_bytes;
}

TEST(DrySparseAttention, TakesTheListsOfPacksOrPaddedOnesAndTheParts) {
  EXPECT_EQ(DryForwardWorkspaces(132, 64, 2048), 0);
  EXPECT_EQ(DryForwardWorkspaces(4096, 64, 2048), int64_t{4} * 16 * 64 * 513 * 4);
  EXPECT_EQ(DryForwardWorkspaces(4096, 64, 50), 4096 * 64 * 4);
  EXPECT_EQ(DryForwardWorkspaces(4096, 16, 2048), 4096 * 2048 * 4 + 1024 * 4);
  EXPECT_EQ(DryForwardWorkspaces(4096, 32, 50), 2048 * 128 * 4 + 2048 * 4);
}

// Peak bytes of the kernels' workspaces in a dry backward.
int64_t DryWorkspaces(DType dtype, int64_t T, int64_t S, int64_t H, int64_t C, int64_t V,
                      int64_t K) {
  const Context dry = Context::Dry();
  SparseAttentionBackward(
      dry, dry.Empty(dtype, {T, H, V}), dry.Empty(dtype, {T, H, C}), dry.Empty(dtype, {S, C}),
      {dry.Empty(dtype, {T, H, V}), dry.Empty(DType::kF32, {T, H})}, dry.Empty(DType::kI32, {T, K}),
      1.0, dry.Empty(DType::kF32, {S, C}), dry.Empty(DType::kF32, {T, K}));
  const auto uses = dry.pool().Uses();
  const auto found = uses.find("kernel workspaces");
  return found == uses.end() ? 0 : found->second.peak_bytes;
}

TEST(DrySparseAttentionBackward, TakesTheWorkspacesOfAGpu) {
  const SparseAttentionBackwardShape shape{4096, 32768, 128, 2048};
  const size_t large = SparseAttentionBackwardWorkspace(shape, {288, 15 * 288});
  EXPECT_EQ(DryWorkspaces(DType::kBF16, 4096, 32768, 128, 576, 512, 2048),
            static_cast<int64_t>(large));
  EXPECT_GT(large, 2 * kGiB * 19 / 20);
  // Packs: their unions, how many keys each has, the choice; all else is the single queries'.
  const SparseAttentionBackwardShape few{4096, 32768, 16, 2048};
  const size_t single = SparseAttentionBackwardWorkspace(few, {384, 11 * 384});
  EXPECT_EQ(DryWorkspaces(DType::kBF16, 4096, 32768, 16, 576, 512, 2048),
            static_cast<int64_t>(single) + 4096 * 2048 * 4 + 1024 * 4 + 192);
  // Lists and target padded to 64 slots.
  const SparseAttentionBackwardShape padded{32, 128, 16, 64};
  EXPECT_EQ(
      DryWorkspaces(DType::kBF16, 32, 128, 16, 576, 512, 50),
      static_cast<int64_t>(SparseAttentionBackwardWorkspace(padded, {32, 32})) + 2 * 32 * 64 * 4);
  // The general kernels': contributions, two arrays of slots, offsets (64 bytes at least).
  EXPECT_EQ(DryWorkspaces(DType::kBF16, 32, 63, 4, 256, 128, 64),
            4 * (32 * 64 * 256 + 2 * 32 * 64 + 64));
  // fp32 dry is the CPU's.
  EXPECT_EQ(DryWorkspaces(DType::kF32, 32, 63, 4, 256, 128, 64), 0);
}

}  // namespace
}  // namespace baleen
