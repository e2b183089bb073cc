// Launch choices of the CUDA kernels: pure host functions, so they are tested where no GPU is.
#include <gtest/gtest.h>

#include "kernels/ops/indexer/dense_indexer_loss_cuda.h"
#include "kernels/ops/indexer/indexer_backward_cuda.h"
#include "kernels/ops/indexer/indexer_scores_cuda.h"
#include "kernels/ops/indexer/topk_select_cuda.h"
#include "kernels/ops/linear/matmul_choices_cuda.h"

namespace baleen {
namespace {

constexpr int kSharedLimit = 227 * 1024;  // bytes a block of an H100 may have
constexpr int kSms = 132;

// 0: cuBLASLt's own choice.
uint32_t MatmulTile(MatmulPass pass, int64_t m, int64_t n, int64_t k) {
  const auto choice = ChooseMatmulKernel({pass, m, n, k});
  return choice ? choice->tile : 0;
}

TEST(ChooseMatmulKernel, NamesOneForMeasuredShapesOnly) {
  EXPECT_EQ(MatmulTile(MatmulPass::kForward, 8192, 32768, 512), k128x152.tile);
  EXPECT_EQ(MatmulTile(MatmulPass::kForward, 4096, 32768, 512), k128x152.tile);
  EXPECT_EQ(MatmulTile(MatmulPass::kForward, 4095, 32768, 512), 0) << "few rows were not measured";
  EXPECT_EQ(MatmulTile(MatmulPass::kInput, 8192, 32768, 512), 0) << "another form";
  EXPECT_EQ(MatmulTile(MatmulPass::kInput, 8192, 7168, 576), k128x152.tile);
  // Rows are what a weight's gradient sums over; its widths are the weight's.
  EXPECT_EQ(MatmulTile(MatmulPass::kWeight, 7168, 16384, 8192), k128x160.tile);
  EXPECT_EQ(MatmulTile(MatmulPass::kWeight, 7168, 16384, 1024), 0);
  EXPECT_EQ(MatmulTile(MatmulPass::kWeight, 16384, 7168, 8192), 0);
}

TEST(ChooseMatmulKernel, HasOneRowForAShape) {
  for (const MatmulTableRow& row : kMatmulTable) {
    for (const MatmulTableRow& other : kMatmulTable) {
      const bool alike = row.pass == other.pass && row.n == other.n && row.k == other.k;
      EXPECT_EQ(alike, &row == &other) << row.n << " " << row.k;
    }
    const bool weight = row.pass == MatmulPass::kWeight;
    EXPECT_EQ(MatmulTile(row.pass, weight ? row.k : 8192, row.n, weight ? 8192 : row.k),
              row.choice.tile);
  }
}

TEST(PlanTopkSelect, GivesEachRowABlockAndFitsTheLongestRow) {
  EXPECT_EQ(PlanTopkSelect(17, 100).num_blocks, 17);
  EXPECT_EQ(PlanTopkSelect(17, 100).threads % 32, 0);
  const TopkSelectPlan longest = PlanTopkSelect(4096, kTopkSelectMaxKeys);
  EXPECT_LE(longest.shared_bytes, kSharedLimit);
  // Two bits a key, so a row of twice the keys takes that much more.
  EXPECT_GT(longest.shared_bytes, PlanTopkSelect(4096, kTopkSelectMaxKeys / 2).shared_bytes);
}

TEST(PlanIndexerScores, NeverStartsMoreBlocksThanTilesOrMultiprocessors) {
  for (const IndexerDtype dtype : {IndexerDtype::kBf16, IndexerDtype::kE4m3}) {
    EXPECT_EQ(PlanIndexerScores(dtype, 1, 1, 64, kSms).num_blocks, 1);
    const IndexerScoresPlan large = PlanIndexerScores(dtype, 4096, 131072, 64, kSms);
    EXPECT_EQ(large.num_blocks, kSms);
    EXPECT_LE(large.shared_bytes, kSharedLimit);
    // 64 heads fill the columns of a tile twice as fast as 32.
    EXPECT_EQ(PlanIndexerScores(dtype, 4096, 4096, 32, kSms).rows_per_tile,
              2 * large.rows_per_tile);
  }
}

TEST(PlanIndexerBackward, TakesRowsInGroupsOfFour) {
  EXPECT_EQ(PlanIndexerBackward(1, kSms).gradient_blocks, 1);
  EXPECT_EQ(PlanIndexerBackward(4, kSms).gradient_blocks, 1);
  EXPECT_EQ(PlanIndexerBackward(5, kSms).gradient_blocks, 2);
  EXPECT_EQ(PlanIndexerBackward(4096, kSms).gradient_blocks, kSms);
  EXPECT_LE(PlanIndexerBackward(4096, kSms).gradient_shared_bytes, kSharedLimit);
}

TEST(IndexerBackwardWorkspace, GrowsWithSelectedPairsAndKeys) {
  const size_t base = IndexerBackwardWorkspaceBytes(128, 4096, 512);
  EXPECT_GE(base, size_t{8} * 128 * 512);
  EXPECT_GT(IndexerBackwardWorkspaceBytes(256, 4096, 512), base);
  EXPECT_GT(IndexerBackwardWorkspaceBytes(128, 8192, 512), base);
}

TEST(PlanDenseIndexerLoss, TakesEqualChunksThatFitTheBudget) {
  const size_t budget = size_t{4} << 30;
  const DenseIndexerLossPlan plan = PlanDenseIndexerLoss(32768, 32768, kSms, budget);
  EXPECT_LE(plan.workspace_bytes, budget);
  // 14 bytes a pair: 4 GiB hold 9362 rows of 32768 keys, so four chunks of 8192.
  EXPECT_EQ(plan.rows_per_chunk, 8192);
  EXPECT_GE(plan.workspace_bytes, size_t{14} * 8192 * 32768);
  EXPECT_EQ(PlanDenseIndexerLoss(100, 1000, kSms, budget).rows_per_chunk, 256);
  // Never below 256 rows, whatever the budget.
  EXPECT_EQ(PlanDenseIndexerLoss(4096, 131072, kSms, 1).rows_per_chunk, 256);
}

}  // namespace
}  // namespace baleen
