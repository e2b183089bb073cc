#include "trainer/bench/op_goals.h"

#include <cstdlib>

#include "absl/strings/match.h"

namespace baleen {
namespace {

constexpr int64_t kKi = 1024;

struct Row {
  int64_t heads = 0, keys = 0;
  BenchIds ids = BenchIds::kRandom;
  double peer = 0, goal = 0;
};

// FlashMLA, 4096 queries on S keys, top-k 2048, measured on an H100 with the ids of bench_ids.h.
constexpr Row kFlashMla[] = {
    {64, 4 * kKi, BenchIds::kRandom, 656.2},   {64, 8 * kKi, BenchIds::kRandom, 580.4},
    {64, 16 * kKi, BenchIds::kRandom, 579.3},  {64, 32 * kKi, BenchIds::kRandom, 538.9},
    {64, 64 * kKi, BenchIds::kRandom, 470.3},  {64, 128 * kKi, BenchIds::kRandom, 394.3},
    {64, 32 * kKi, BenchIds::kNear, 648.6},    {64, 128 * kKi, BenchIds::kNear, 607.2},
    {128, 4 * kKi, BenchIds::kRandom, 593.1},  {128, 8 * kKi, BenchIds::kRandom, 604.0},
    {128, 16 * kKi, BenchIds::kRandom, 597.7}, {128, 32 * kKi, BenchIds::kRandom, 545.4},
    {128, 64 * kKi, BenchIds::kRandom, 525.0}, {128, 128 * kKi, BenchIds::kRandom, 512.1},
    {128, 32 * kKi, BenchIds::kNear, 546.6},   {128, 128 * kKi, BenchIds::kNear, 568.3},
};
constexpr double kOverFlashMla = 1.05;
// Fewer heads than a tile of 64: the peer pads to 64, and the goal is a multiple of what it then
// does of use, with near ids, which queries can share.
struct Packing {
  int64_t heads;
  double over_padding;
};
constexpr Packing kPacking[] = {{16, 2.5}, {32, 1.6}};

// cuDNN frontend, on an H200 at S queries of S keys, 64 heads, random ids; goals with the KL target
// and reproducible bits.
constexpr Row kSparseBackward[] = {
    {64, 4 * kKi, BenchIds::kRandom, 370, 470},  {64, 8 * kKi, BenchIds::kRandom, 372, 470},
    {64, 16 * kKi, BenchIds::kRandom, 338, 470}, {64, 32 * kKi, BenchIds::kRandom, 234, 240},
    {64, 4 * kKi, BenchIds::kNear, 0, 470},      {64, 8 * kKi, BenchIds::kNear, 0, 470},
    {64, 16 * kKi, BenchIds::kNear, 0, 470},     {64, 32 * kKi, BenchIds::kNear, 0, 400},
    {128, 4 * kKi, BenchIds::kRandom, 0, 540},   {128, 8 * kKi, BenchIds::kRandom, 0, 540},
    {128, 16 * kKi, BenchIds::kRandom, 0, 540},  {128, 32 * kKi, BenchIds::kRandom, 0, 450},
    {128, 4 * kKi, BenchIds::kNear, 0, 540},     {128, 8 * kKi, BenchIds::kNear, 0, 540},
    {128, 16 * kKi, BenchIds::kNear, 0, 540},    {128, 32 * kKi, BenchIds::kNear, 0, 450},
};
constexpr double kDeterministic = 0.85;  // of the goals above: the only mode is deterministic

// DeepGEMM's fp8 scores, 4096 queries, fp32 out, measured on an H100.
constexpr Row kDeepGemm[] = {
    {64, 4 * kKi, BenchIds::kRandom, 939.7},    {64, 8 * kKi, BenchIds::kRandom, 1106.1},
    {64, 32 * kKi, BenchIds::kRandom, 1038.6},  {64, 64 * kKi, BenchIds::kRandom, 950.7},
    {64, 128 * kKi, BenchIds::kRandom, 1018.9}, {32, 4 * kKi, BenchIds::kRandom, 834.0},
    {32, 8 * kKi, BenchIds::kRandom, 856.1},    {32, 32 * kKi, BenchIds::kRandom, 885.8},
    {32, 64 * kKi, BenchIds::kRandom, 914.7},   {32, 128 * kKi, BenchIds::kRandom, 843.9},
};
constexpr double kOverDeepGemm = 1.1, kBf16Scores = 640;

// FlashInfer's top-k 2048 of random fp32 scores, microseconds a row, measured on an H100.
constexpr Row kFlashInfer[] = {
    {0, 8 * kKi, BenchIds::kRandom, 0.070},   {0, 16 * kKi, BenchIds::kRandom, 0.106},
    {0, 32 * kKi, BenchIds::kRandom, 0.154},  {0, 64 * kKi, BenchIds::kRandom, 0.260},
    {0, 128 * kKi, BenchIds::kRandom, 0.519},
};
constexpr double kOverFlashInfer = 1.3;

// Dense causal attention 192/128, 128 heads, one sequence, measured on an H100 through PyTorch.
constexpr Row kCudnnForward[] = {{128, 4 * kKi, BenchIds::kRandom, 599},
                                 {128, 8 * kKi, BenchIds::kRandom, 583},
                                 {128, 16 * kKi, BenchIds::kRandom, 596},
                                 {128, 32 * kKi, BenchIds::kRandom, 587}};
constexpr Row kCudnnBackward[] = {{128, 4 * kKi, BenchIds::kRandom, 436},
                                  {128, 8 * kKi, BenchIds::kRandom, 450},
                                  {128, 16 * kKi, BenchIds::kRandom, 473},
                                  {128, 32 * kKi, BenchIds::kRandom, 491}};
constexpr Row kFlashAttention3[] = {{128, 4 * kKi, BenchIds::kRandom, 658},
                                    {128, 8 * kKi, BenchIds::kRandom, 703},
                                    {128, 16 * kKi, BenchIds::kRandom, 690},
                                    {128, 32 * kKi, BenchIds::kRandom, 708}};
constexpr double kOfCudnn = 0.95, kOfUnmasked = 0.9;

constexpr double kWarmUp = 600, kIndexerBackward = 0.35;
constexpr int64_t kIndexerBackwardKeys = 64 * kKi, kTopk = 2048;

// Shares of the ceiling measured in the same call.
constexpr double kGemmShare = 90, kGroupedShare = 85, kGroupedWeightShare = 75, kCopyShare = 80;
// Less is over within some launches' time, in which a copy of it would not reach its speed either.
constexpr double kCopyLikeBytes = 100e6;
// Linear layers whose widths are a model's; the others are slivers of a step.
constexpr const char* kLargeLayers[] = {"q_a.", "q_b.", "kv_a.",   "kv_b.",
                                        "o.",   "mlp_", "shared_", "head."};

template <size_t n>
const Row* Find(const Row (&rows)[n], int64_t heads, int64_t keys, BenchIds ids) {
  for (const Row& row : rows) {
    if (row.heads == heads && row.keys == keys && row.ids == ids) return &row;
  }
  return nullptr;
}

std::optional<OpGoal> Over(const Row* row, const char* name, double factor,
                           GoalUnit unit = GoalUnit::kTeraflops) {
  if (row == nullptr) return std::nullopt;
  const double goal = unit == GoalUnit::kMicrosecondsRow ? row->peer / factor : row->peer * factor;
  return OpGoal{unit, row->peer, name, goal};
}

std::optional<OpGoal> SparseForwardGoal(const OpCase& op) {
  for (const Packing& packing : kPacking) {
    if (op.heads != packing.heads || *op.ids != BenchIds::kNear) continue;
    const Row* const padded = Find(kFlashMla, 64, op.keys, *op.ids);
    if (padded == nullptr) return std::nullopt;
    const double useful = padded->peer * static_cast<double>(op.heads) / 64;
    return OpGoal{GoalUnit::kTeraflops, useful, "FlashMLA, padded to 64",
                  useful * packing.over_padding};
  }
  return Over(Find(kFlashMla, op.heads, op.keys, *op.ids), "FlashMLA", kOverFlashMla);
}

std::optional<OpGoal> SparseBackwardGoal(const OpCase& op) {
  const Row* const row = Find(kSparseBackward, op.heads, op.keys, *op.ids);
  if (row == nullptr) return std::nullopt;
  return OpGoal{GoalUnit::kTeraflops, row->peer, row->peer > 0 ? "cuDNN frontend (H200)" : "",
                row->goal * kDeterministic};
}

std::optional<OpGoal> IndexerGoal(const OpCase& op, const OpSizes& sizes) {
  if (op.op == "indexer.scores") return OpGoal{GoalUnit::kTeraflops, 0, "", kBf16Scores};
  if (op.op == "indexer.scores_fp8")
    return Over(Find(kDeepGemm, op.heads, op.keys, BenchIds::kRandom), "DeepGEMM", kOverDeepGemm);
  if (sizes.model.index_topk != kTopk) return std::nullopt;
  if (absl::StartsWith(op.op, "indexer.topk")) {
    return Over(Find(kFlashInfer, 0, op.keys, BenchIds::kRandom), "FlashInfer", kOverFlashInfer,
                GoalUnit::kMicrosecondsRow);
  }
  if (op.keys > kIndexerBackwardKeys || op.heads != 64) return std::nullopt;
  return OpGoal{GoalUnit::kMicrosecondsRow, 0, "", kIndexerBackward};
}

std::optional<OpGoal> DenseGoal(const OpCase& op) {
  const bool forward = absl::EndsWith(op.op, "forward");
  const bool masked = absl::StartsWith(op.op, "masked");
  if (op.rows != op.keys) return std::nullopt;
  if (masked && forward)
    return Over(Find(kFlashAttention3, op.heads, op.keys, BenchIds::kRandom), "FA3, no mask",
                kOfUnmasked);
  const Row* const row = forward ? Find(kCudnnForward, op.heads, op.keys, BenchIds::kRandom)
                                 : Find(kCudnnBackward, op.heads, op.keys, BenchIds::kRandom);
  return Over(row, masked ? "cuDNN, no mask" : "cuDNN", masked ? kOfUnmasked : kOfCudnn);
}

OpGoal Share(double percent) { return {GoalUnit::kPercent, 0, "", percent}; }

std::optional<OpGoal> ProductGoal(const OpCase& op) {
  if (absl::StartsWith(op.op, "grouped.")) {
    return Share(absl::StrContains(op.op, ".wgrad") ? kGroupedWeightShare : kGroupedShare);
  }
  for (const char* const layer : kLargeLayers) {
    if (absl::StartsWith(op.op, absl::StrCat("gemm.", layer))) return Share(kGemmShare);
  }
  return std::nullopt;
}

}  // namespace

std::optional<OpGoal> GoalOf(const OpCase& op, const OpSizes& sizes, double bytes) {
  if (!sizes.cuda || sizes.dtype != DType::kBF16) return std::nullopt;
  const bool main_heads = sizes.model.latent_dim() == 576 && sizes.model.kv_lora_rank == 512 &&
                          sizes.model.qk_head_dim() == 192 && sizes.model.v_head_dim == 128;
  if (absl::StartsWith(op.op, "sparse_attention.")) {
    if (!main_heads || sizes.model.index_topk != kTopk) return std::nullopt;
    return absl::EndsWith(op.op, "forward") ? SparseForwardGoal(op) : SparseBackwardGoal(op);
  }
  if (absl::StartsWith(op.op, "indexer.")) {
    return sizes.model.index_head_dim == 128 ? IndexerGoal(op, sizes) : std::nullopt;
  }
  if (absl::StrContains(op.op, "attention.")) return main_heads ? DenseGoal(op) : std::nullopt;
  if (op.op == "warmup.whole") {
    if (!main_heads || op.heads != 128) return std::nullopt;
    return OpGoal{GoalUnit::kTeraflops, 0, "", kWarmUp};
  }
  if (op.bound != OpBound::kCopy) return ProductGoal(op);
  if (bytes < kCopyLikeBytes || absl::StartsWith(op.op, "copy.")) return std::nullopt;
  return Share(kCopyShare);
}

double Ratio(GoalUnit unit, double figure, double reference) {
  return unit == GoalUnit::kMicrosecondsRow ? reference / figure : figure / reference;
}

}  // namespace baleen
