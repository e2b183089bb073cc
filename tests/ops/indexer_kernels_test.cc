// Which kernel serves which shape on CUDA, and the workspaces that a plan counts: host functions,
// tested where no GPU is.
#include "kernels/ops/indexer/indexer_kernels.h"

#include <gtest/gtest.h>

#include "kernels/ops/indexer/indexer_loss.h"
#include "kernels/ops/indexer/indexer_ops_cuda.h"
#include "kernels/ops/indexer/indexer_scores.h"
#include "tests/ops/attention_oracle.h"

namespace baleen {
namespace {

using testing::CausalWindows;

constexpr DType kF32 = DType::kF32, kBF16 = DType::kBF16;
constexpr int64_t kGiB = int64_t{1} << 30;

TEST(ChooseIndexerKernel, TakesTheTensorCoresForPublishedShapesInBF16Only) {
  const auto tuned = IndexerKernel::kTuned, general = IndexerKernel::kGeneral;
  EXPECT_EQ(ChooseIndexerScores(kBF16, 64, 128), tuned);
  EXPECT_EQ(ChooseIndexerScores(kBF16, 32, 128), tuned);
  EXPECT_EQ(ChooseIndexerScores(kF32, 64, 128), general);
  EXPECT_EQ(ChooseIndexerScores(kBF16, 4, 128), general);
  EXPECT_EQ(ChooseIndexerScores(kBF16, 64, 64), general);
  EXPECT_EQ(ChooseSparseIndexerLoss(kBF16, 32, 128, 2048), tuned);
  EXPECT_EQ(ChooseSparseIndexerLoss(kBF16, 32, 128, 2049), general);
  EXPECT_EQ(ChooseSparseIndexerLoss(kF32, 32, 128, 2048), general);
  EXPECT_EQ(ChooseDenseIndexerLoss(kBF16, 64, 128, 192), tuned);
  EXPECT_EQ(ChooseDenseIndexerLoss(kBF16, 32, 128, 192), tuned);  // among heads of zeros
  EXPECT_EQ(ChooseDenseIndexerLoss(kBF16, 65, 128, 192), general);
  EXPECT_EQ(ChooseDenseIndexerLoss(kBF16, 64, 128, 256), general);
  EXPECT_EQ(ChooseIndexerScoresFp8(64, 128), tuned);
  EXPECT_EQ(ChooseIndexerScoresFp8(32, 128), tuned);
  EXPECT_EQ(ChooseIndexerScoresFp8(16, 128), general);
  EXPECT_EQ(ChooseIndexerScoresFp8(64, 64), general);
  EXPECT_TRUE(HasFp8IndexerScores(kBF16, 32, 128));
  EXPECT_FALSE(HasFp8IndexerScores(kF32, 32, 128));  // the CPU's, or a run in fp32
  EXPECT_FALSE(HasFp8IndexerScores(kBF16, 48, 128));
  EXPECT_EQ(IndexerScoresKernelName(kBF16, 64, 128), "tensor cores");
  EXPECT_EQ(IndexerScoresFp8KernelName(), "FP8 tensor cores");
  EXPECT_EQ(SparseIndexerLossKernelName(kBF16, 64, 128, 2048), "tensor cores");
  EXPECT_EQ(DenseIndexerLossKernelName(kBF16, 64, 128, 160), "general (fp32 arithmetic)");
}

TEST(PlanIndexerChunks, KeepsEqualChunksWithinTheBudget) {
  // 16 KB a row of 2048 keys, 524 B a key.
  const IndexerChunks sparse = PlanSparseIndexerChunks(kBF16, 32768, 131072, 64, 128, 2048);
  EXPECT_LE(sparse.bytes, kGiB / 4);
  EXPECT_GE(sparse.bytes, kGiB / 4 * 8 / 10);
  EXPECT_EQ(sparse.rows, 10924);  // three chunks, an even number of rows
  // 14 B a pair.
  const IndexerChunks dense = PlanDenseIndexerChunks(kBF16, 32768, 32768, 64, 128, 192);
  EXPECT_LE(dense.bytes, kGiB);
  EXPECT_EQ(dense.rows % 256, 0);
  EXPECT_GE(dense.bytes, kGiB * 8 / 10);
  // Never below 256 rows, whatever that takes.
  EXPECT_EQ(PlanDenseIndexerChunks(kBF16, 4096, int64_t{1} << 18, 64, 128, 192).rows, 256);
  EXPECT_EQ(PlanSparseIndexerChunks(kBF16, 4096, int64_t{1} << 20, 64, 128, 2048).rows, 256);
  // The general kernels, down to a row at a time.
  for (const IndexerChunks& general : {PlanSparseIndexerChunks(kF32, 4096, 8192, 64, 128, 2048),
                                       PlanDenseIndexerChunks(kF32, 4096, 8192, 64, 128, 192)}) {
    EXPECT_LE(general.bytes, kGiB / 4);
    EXPECT_GT(general.bytes, kGiB / 4 * 8 / 10);
  }
  EXPECT_EQ(PlanDenseIndexerChunks(kF32, 4096, int64_t{1} << 21, 64, 128, 192).rows, 1);
}

TEST(PlanIndexerChunks, TakesNoMoreThanTheRowsNeed) {
  EXPECT_EQ(PlanSparseIndexerChunks(kF32, 17, 100, 4, 32, 8).rows, 17);
  EXPECT_EQ(PlanSparseIndexerChunks(kF32, 17, 100, 4, 32, 8).bytes,
            (4 * 17 * (8 * 5 + 100) + 255) / 256 * 256);
  EXPECT_EQ(PlanSparseIndexerChunks(kBF16, 17, 100, 64, 128, 8).rows, 20);
  EXPECT_EQ(PlanDenseIndexerChunks(kBF16, 17, 100, 64, 128, 192).rows, 256);
  EXPECT_GE(PlanDenseIndexerChunks(kF32, 0, 100, 4, 32, 16).rows, 1);
}

TEST(PlanIndexerChunks, HoldsWhatTheTunedKernelsAskFor) {
  if constexpr (kHaveCuda) {
    for (const int64_t keys : {1, 100, 4096, 8191, 131072}) {
      for (const int64_t rows : {1, 255, 1000, 5000}) {
        SCOPED_TRACE(::testing::Message() << rows << " x " << keys);
        const IndexerChunks sparse = PlanSparseIndexerChunks(kBF16, rows, keys, 64, 128, 2048);
        EXPECT_EQ(sparse.bytes, SparseIndexerLossTunedBytes(sparse.rows, keys, 2048));
        const IndexerChunks dense = PlanDenseIndexerChunks(kBF16, rows, keys, 64, 128, 192);
        const int64_t asked = DenseIndexerLossTunedBytes(dense.rows, keys, 132);
        EXPECT_GE(dense.bytes, asked);
        EXPECT_LE(dense.bytes, asked + 8192);
      }
    }
  } else {
    GTEST_SKIP() << "this build has no CUDA kernels";
  }
}

TEST(IndexerWorkspace, IsCountedInADryCallOfBF16) {
  const int64_t T = 40, S = 40, I = 64, J = 128, K = 16;
  const auto peak = [&](DType dtype) {
    const Context dry = Context::Dry();
    const DType sums = DType::kF32;
    SparseIndexerLoss(dry, dry.Empty(dtype, {T, I, J}), dry.Empty(dtype, {S, J}),
                      dry.Empty(sums, {T, I}), dry.Empty(DType::kI32, {T, K}),
                      dry.Empty(sums, {T, K}), 1, 1, dry.Empty(sums, {S, J}));
    const int64_t sparse = dry.pool().Uses()["indexer workspace"].peak_bytes;
    dry.pool().ResetPeak();
    DenseIndexerLoss(
        dry, dry.Empty(dtype, {T, I, J}), dry.Empty(dtype, {S, J}), dry.Empty(sums, {T, I}),
        {dry.Empty(dtype, {T, 2, 192}), dry.Empty(dtype, {S, 2, 192}), dry.Empty(sums, {T, 2}), 1},
        CausalWindows(dry, T), 1, 64, dry.Empty(sums, {S, J}));
    return std::pair{sparse, dry.pool().Uses()["indexer workspace"].peak_bytes};
  };
  EXPECT_EQ(peak(kF32), (std::pair<int64_t, int64_t>{0, 0}));
  const auto [sparse, dense] = peak(kBF16);
  EXPECT_GE(sparse, PlanSparseIndexerChunks(kBF16, T, S, I, J, K).bytes);
  EXPECT_GE(dense, PlanDenseIndexerChunks(kBF16, T, S, I, J, 192).bytes);
  EXPECT_LE(sparse, PlanSparseIndexerChunks(kBF16, T, S, I, J, K).bytes + 512);
}

// A plan of a GPU's run: the kernel of codes holds its result alone, the definition numbers too.
TEST(IndexerScoresFp8Plan, CountsWhatTheKernelTakes) {
  const int64_t T = 16, S = 1000;
  const auto peak_beside = [&](int64_t heads) {
    OpCounter counter;
    const Context dry = Context::Dry(&counter);
    const Fp8Codes q = QuantiseFp8(dry, dry.Empty(kBF16, {T, heads, 128}), 128),
                   k = QuantiseFp8(dry, dry.Empty(kBF16, {S, 128}), 128);
    const Tensor w = dry.Empty(kF32, {T, heads});
    const KeyWindows windows = CausalWindows(dry, T, S - T);
    const int64_t before = dry.pool().Total().bytes;
    dry.pool().ResetPeak();
    const Tensor scores = IndexerScoresFp8(dry, q, k, w, windows);
    EXPECT_EQ(scores.DebugString(), "F32[16, 1000]");
    EXPECT_EQ(counter.ops.at("QuantiseFp8").bytes, (T * heads + S) * (3 * 128 + 4));
    EXPECT_GT(counter.ops.at("IndexerScoresFp8").flops, 0);
    return dry.pool().Total().peak_bytes - before;
  };
  EXPECT_EQ(peak_beside(64), 4 * T * S);
  EXPECT_GT(peak_beside(16), 4 * T * S + 4 * T * 16 * 128);
}

// The tuned dense kernels get 64 heads, of which 32 are zeros: q, dq, w and dw once more, twice as
// wide.
TEST(IndexerWorkspace, CountsHeadsOfZerosInADryCall) {
  const int64_t T = 512, S = 512, J = 128;
  const auto peak = [&](int64_t heads) {
    const Context dry = Context::Dry();
    DenseIndexerLoss(
        dry, dry.Empty(kBF16, {T, heads, J}), dry.Empty(kBF16, {S, J}), dry.Empty(kF32, {T, heads}),
        {dry.Empty(kBF16, {T, 2, 192}), dry.Empty(kBF16, {S, 2, 192}), dry.Empty(kF32, {T, 2}), 1},
        CausalWindows(dry, T), 1, 64, dry.Empty(kF32, {S, J}));
    return dry.pool().Total().peak_bytes;
  };
  const int64_t of_heads = T * (2 * J * 2 + 2 * 4);  // q and dq in bf16, w and dw in fp32
  EXPECT_GE(peak(32), peak(64) + 32 * of_heads);
}

}  // namespace
}  // namespace baleen
