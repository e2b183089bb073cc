// The choice of the indexer's kernels and the sizes of their workspaces.
#include "kernels/ops/indexer/indexer_kernels.h"

#include <algorithm>

#include "kernels/core/check.h"

namespace baleen {
namespace {

// What the tuned kernels are made for.
constexpr int64_t kTunedWidth = 128;
constexpr int64_t kTunedMainWidth = 192;
constexpr int64_t kTunedMostChosen = 2048;
constexpr int64_t kGroupRows = 4;  // rows that the sparse loss takes together

// Budgets. Sparse, tuned: 16 KB a row of 2048 keys, and 524 B a key that each chunk passes over
// (70 us at 128K keys); 256 MiB are 11 000 rows beside 128K keys, whose gradients take 5 ms. Dense,
// tuned: 14 B a pair, measured equally fast from 2048 to 8192 rows a chunk; 1 GiB are 2300 rows
// beside 32K keys, and the least it can do, 256 rows beside 128K keys, are 0.6 GiB. General: a
// chunk of 256 MiB fills the GPU.
constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kSparseBudget = 256 * kMiB;
constexpr int64_t kDenseBudget = 1024 * kMiB;
constexpr int64_t kGeneralBudget = 256 * kMiB;
constexpr int64_t kFewestTunedRows = 256;
constexpr int64_t kMultiprocessors = 132;  // at most, of the GPUs with these kernels

int64_t DivideUp(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t RoundUp(int64_t bytes) { return DivideUp(bytes, 256) * 256; }

// What LaunchIndexerBackward needs (indexer_backward_cuda.h).
int64_t SparseTunedBytes(int64_t T, int64_t S, int64_t K) {
  const int64_t groups = DivideUp(T, kGroupRows), pairs = kGroupRows * K;
  return 256 + RoundUp(8 * S) + RoundUp(4 * T) + RoundUp(4 * groups * pairs) +
         RoundUp(128 * groups) + RoundUp(4 * groups * DivideUp(pairs, 64) * 64) + RoundUp(4 * S) +
         RoundUp(4 * S * kTunedWidth);
}

// No less than LaunchDenseIndexerLoss needs (dense_indexer_loss_cuda.h) for chunks of `rows` rows,
// a multiple of 256.
int64_t DenseTunedBytes(int64_t rows, int64_t S) {
  const int64_t padded_keys = DivideUp(S, 768) * 768, key_blocks = DivideUp(S, 256);
  const int64_t pairs = rows * padded_keys;
  const int64_t of_pairs = 14 * pairs + 4 * pairs / 192;  // scores, masks, delta; loss shares
  const int64_t of_rows = rows * (4 + 64 * 2);            // lse, packed weights
  const int64_t of_keys = 2 * kTunedWidth * S + 12 * (key_blocks + 1);
  const int64_t partial_dk = (kMultiprocessors + key_blocks) * 256 * kTunedWidth * 4;
  return RoundUp(of_pairs + of_rows + of_keys + partial_dk) + 16 * 256;
}

// Chunks of about equal size, in steps of `unit` rows, at least `fewest`; as few as keep
// `bytes(rows)` within the budget.
template <typename Bytes>
IndexerChunks FitRows(int64_t T, int64_t unit, int64_t fewest, int64_t budget, Bytes bytes) {
  constexpr int64_t kProbe = 2048;  // rows; so many that what is rounded up does not matter
  const int64_t per_row = DivideUp(bytes(2 * kProbe) - bytes(kProbe), kProbe);
  const int64_t fixed = bytes(kProbe) - per_row * kProbe;
  const int64_t fit = std::max<int64_t>(0, budget - fixed) / std::max<int64_t>(1, per_row);
  const int64_t most = std::max(fit / unit * unit, fewest);
  const int64_t chunks = std::max<int64_t>(1, DivideUp(T, most));
  const int64_t rows = std::max(unit, DivideUp(DivideUp(T, chunks), unit) * unit);
  return {rows, bytes(rows)};
}

}  // namespace

std::string NameOf(IndexerKernel kernel) {
  return kernel == IndexerKernel::kTuned ? "tensor cores" : "general (fp32 arithmetic)";
}

IndexerKernel ChooseIndexerScores(DType dtype, int64_t I, int64_t J) {
  return dtype == DType::kBF16 ? ChooseIndexerScoresFp8(I, J) : IndexerKernel::kGeneral;
}

IndexerKernel ChooseIndexerScoresFp8(int64_t I, int64_t J) {
  const bool tuned = (I == 64 || I == 32) && J == kTunedWidth;
  return tuned ? IndexerKernel::kTuned : IndexerKernel::kGeneral;
}

IndexerKernel ChooseSparseIndexerLoss(DType dtype, int64_t I, int64_t J, int64_t K) {
  return K <= kTunedMostChosen ? ChooseIndexerScores(dtype, I, J) : IndexerKernel::kGeneral;
}

IndexerKernel ChooseDenseIndexerLoss(DType dtype, int64_t I, int64_t J, int64_t Q) {
  const bool tuned = dtype == DType::kBF16 && I >= 1 && I <= kTunedDenseHeads && J == kTunedWidth &&
                     Q == kTunedMainWidth;
  return tuned ? IndexerKernel::kTuned : IndexerKernel::kGeneral;
}

void CheckTunedAlignment(const char* op, std::initializer_list<const Tensor*> operands) {
  for (const Tensor* tensor : operands) {
    CHECK_EQ(reinterpret_cast<uintptr_t>(tensor->raw()) % 16, 0u)
        << op << ": " << tensor->DebugString() << " does not begin at a multiple of 16 bytes";
  }
}

IndexerChunks PlanSparseIndexerChunks(DType dtype, int64_t T, int64_t S, int64_t I, int64_t J,
                                      int64_t K) {
  if (ChooseSparseIndexerLoss(dtype, I, J, K) == IndexerKernel::kTuned) {
    // Whole groups of rows.
    return FitRows(T, kGroupRows, kFewestTunedRows, kSparseBudget,
                   [=](int64_t rows) { return SparseTunedBytes(rows, S, K); });
  }
  // Products [rows, K, I], delta [rows, K] and the slots of each key [S, rows].
  return FitRows(T, 1, 1, kGeneralBudget,
                 [=](int64_t rows) { return RoundUp(4 * rows * (K * (I + 1) + S)); });
}

IndexerChunks PlanDenseIndexerChunks(DType dtype, int64_t T, int64_t S, int64_t I, int64_t J,
                                     int64_t Q) {
  if (ChooseDenseIndexerLoss(dtype, I, J, Q) == IndexerKernel::kTuned) {
    return FitRows(T, kFewestTunedRows, kFewestTunedRows, kDenseBudget,
                   [=](int64_t rows) { return DenseTunedBytes(rows, S); });
  }
  // Products [rows, S, I], delta and target [rows, S].
  return FitRows(T, 1, 1, kGeneralBudget,
                 [=](int64_t rows) { return RoundUp(4 * rows * S * (I + 2)); });
}

IndexerWorkspace MakeIndexerWorkspace(const Context& context, int64_t bytes) {
  constexpr int64_t kAlignment = 256;
  Context own = context;
  const ScopedUse use(own, "indexer workspace");
  const Tensor memory = own.Empty(DType::kF32, {(bytes + kAlignment) / 4});
  const auto address = reinterpret_cast<uintptr_t>(memory.raw());
  return {memory, reinterpret_cast<void*>((address + kAlignment - 1) / kAlignment * kAlignment)};
}

}  // namespace baleen
