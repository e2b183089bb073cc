// The layout matrix on GPUs: one training step in bf16 under mixtures of the parallel axes, over
// NCCL, against the same step on one rank's GPU. The one rank's choices of experts and keys are
// given to the parallel run (trainer/model/choice_replay.h), so that only rounding differs.
//
// A layout runs where mpirun has as many ranks as it. Each line printed is one case: the worst
// gradient, the losses, and how many choices would have been others.
#include <gtest/gtest.h>

#include <chrono>
#include <cmath>

#include "absl/strings/str_format.h"
#include "tests/cuda/gpu.h"
#include "tests/cuda/layout_case_support.h"
#include "tests/cuda/nccl_world_support.h"
#include "tests/support/status_matchers.h"
#include "tests/trainer/same_step.h"

namespace baleen::testing {
namespace {

// What two right gradients of one tensor may differ by in bf16.
constexpr double kCosine = 0.999;
constexpr double kNormError = 2e-2;
// But for tensors of which bf16 itself keeps less: where one rank's bf16 gradient is at 1 - c from
// its fp32 gradient with the same choices, two bf16 gradients with roundings of their own are at
// about 2 (1 - c), and at most at 4 (1 - c). Nearest to that are the indexers' k_norm, wk and wq_b:
// a gate relu(a) with a near 0 opens or closes with its whole term.
constexpr double kMostOfOwnRounding = 4;
// bf16 keeps 8 bits: a rounding is off by at most 2^-9 of the value. About 20 of them follow one
// another in a block, with random signs: 2^-9 * sqrt(20 * 4 blocks) of what a row adds to a loss.
constexpr double kRowError = 1.7e-2;

double RowsOf(const RigCase& c) {
  return static_cast<double>(c.stage.global_batch_size * c.stage.data.seq_length);
}

// Rows' roundings average out: three standard deviations of their mean.
double LossTolerance(const RigCase& c) { return 3 * kRowError / std::sqrt(RowsOf(c)); }

// sum p ln(p / pi) moves with roundings of ln p and ln pi in proportion to ln(p / pi), whose root
// mean square is sqrt(2 KL) of a row.
double KlTolerance(const RigCase& c, double kl) {
  return kl > 0 ? LossTolerance(c) * std::sqrt(2 * RowsOf(c) / kl) : 0;
}

using Pieces = std::vector<StepOutcome::Piece>;

// How near one gradient is to another.
struct Nearness {
  double cosine = 1, norm_error = 0, error = 0;
};

Nearness Compare(const std::vector<double>& a, const std::vector<double>& b) {
  double own = 0, other = 0, dot = 0, error = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    own += a[i] * a[i];
    other += b[i] * b[i];
    dot += a[i] * b[i];
    error += (a[i] - b[i]) * (a[i] - b[i]);
  }
  if (own == 0 && other == 0) return {};  // an expert without tokens
  return {dot / std::sqrt(own * other), std::abs(std::sqrt(own / other) - 1),
          std::sqrt(error / other)};
}

// Each piece against its place in the whole tensor.
std::map<std::string, Nearness> CompareAll(const Pieces& pieces, const Pieces& reference) {
  std::map<std::string, const StepOutcome::Piece*> whole;
  for (const StepOutcome::Piece& piece : reference) whole[piece.name] = &piece;
  std::map<std::string, Nearness> all;
  for (const StepOutcome::Piece& piece : pieces) {
    const auto found = whole.find(piece.name);
    if (found == whole.end()) {
      ADD_FAILURE() << piece.name;
    } else {
      all[piece.name] = Compare(piece.values, ValuesAt(piece.box, *found->second));
    }
  }
  return all;
}

// NaN is worse than anything.
Nearness Worst(const std::map<std::string, Nearness>& all) {
  Nearness worst;
  for (const auto& [name, one] : all) {
    if (!(one.cosine >= worst.cosine)) worst.cosine = one.cosine;
    if (!(one.norm_error <= worst.norm_error)) worst.norm_error = one.norm_error;
    if (!(one.error <= worst.error)) worst.error = one.error;
  }
  return worst;
}

double Relative(double a, double b) { return a == b ? 0 : std::abs(a - b) / std::abs(b); }

// The worst of all ranks.
Nearness WorstOfRanks(const Nearness& own) {
  const Tensor worst_3 = Context::Cpu().Zeros(DType::kF64, {3});
  double* const values = worst_3.data<double>();
  values[0] = 1 - own.cosine;
  values[1] = own.norm_error;
  values[2] = own.error;
  GpuWorld().AllReduce("worst", worst_3, ReduceOp::kMax);
  return {1 - values[0], values[1], values[2]};
}

double FlipRate(const ChoiceReplay& replay, ChoiceReplay::Kind kind) {
  const Tensor counts = Context::Cpu().Zeros(DType::kI64, {2});
  counts.data<int64_t>()[0] = replay.count(kind).choices;
  counts.data<int64_t>()[1] = replay.count(kind).flipped;
  GpuWorld().AllReduce("flips", counts);
  const int64_t* const count = counts.data<int64_t>();
  return count[0] == 0 ? 0 : static_cast<double>(count[1]) / static_cast<double>(count[0]);
}

class LayoutMatrixOnRanks : public ::testing::Test {
 protected:
  struct OneRank {
    StepOutcome outcome;
    ChoiceReplay choices;
    std::map<std::string, Nearness> rounding;  // against fp32; empty until somebody asks
  };

  static RigBackend Backend(ChoiceReplay* replay, const GridCommunicators* axes) {
    return {.context = Gpu(), .dtype = DType::kBF16, .replay = replay, .axes = axes};
  }

  // The same case on one rank, kept for the next layout.
  static OneRank& Reference(const RigCase& parallel) {
    static auto* const references = new std::map<std::string, OneRank>;
    const RigCase c = OnOneRank(parallel);
    const auto [found, is_new] = references->try_emplace(KeyOf(c));
    OneRank& one = found->second;
    if (!is_new) return one;
    one.choices.set_mode(ChoiceReplay::Mode::kRecord);
    auto outcome = RunOneStep(c, GpuSelf(), Backend(&one.choices, nullptr));
    CHECK_OK(outcome.status());
    one.outcome = *std::move(outcome);
    return one;
  }

  // How near one rank's bf16 gradient of a tensor is to its fp32 gradient, of the same values and
  // choices.
  static Nearness OwnRounding(const RigCase& c, OneRank& one, const std::string& name) {
    if (one.rounding.empty()) {
      ChoiceReplay choices = one.choices;
      choices.set_mode(ChoiceReplay::Mode::kReplay);
      RigBackend fp32 = Backend(&choices, nullptr);
      fp32.dtype = DType::kF32;
      fp32.bf16_weights = true;
      const auto exact = RunOneStep(OnOneRank(c), GpuSelf(), fp32);
      CHECK_OK(exact.status());
      one.rounding = CompareAll(one.outcome.gradients, exact->gradients);
    }
    return one.rounding.at(name);
  }

  static void ExpectNear(const std::map<std::string, Nearness>& all, const RigCase& c,
                         OneRank& one) {
    for (const auto& [name, found] : all) {
      EXPECT_LE(found.norm_error, kNormError) << name;
      if (found.cosine >= kCosine) continue;
      const double own = OwnRounding(c, one, name).cosine;
      std::printf("    rank %d: %s at %.5f; bf16 of fp32 on one rank %.5f\n", GpuWorld().rank(),
                  name.c_str(), found.cosine, own);
      EXPECT_GE(found.cosine, 1 - kMostOfOwnRounding * (1 - own)) << name << ", of fp32 " << own;
    }
  }

  // The layouts of as many ranks as there are.
  void CheckAll(const std::vector<Layout>& layouts) {
    for (const Layout& layout : layouts) {
      if (layout.ranks() != GpuWorld().size()) continue;
      // Recipes share a grid, but for the warm-up with tp, which acts as cp there.
      GridCommunicators training, warm_up;
      for (const RecipeKind kind :
           {RecipeKind::kDense, RecipeKind::kWarmUp, RecipeKind::kSparse, RecipeKind::kMasked}) {
        const RigCase c = MakeGpuCase(kind, layout);
        SCOPED_TRACE(absl::StrCat(Name(kind), " ", layout.DebugString()));
        const bool own_grid = kind == RecipeKind::kWarmUp && layout.tensor > 1;
        GridCommunicators& axes = own_grid ? warm_up : training;
        if (axes.pp == nullptr) {
          ASSERT_OK_AND_ASSIGN(axes, SplitForCase(c, GpuWorld()));
        }
        Check(c, kind, layout, axes);
      }
    }
  }

  void Check(const RigCase& c, RecipeKind kind, const Layout& layout,
             const GridCommunicators& axes) {
    OneRank& one = Reference(c);
    one.choices.set_mode(ChoiceReplay::Mode::kReplay);
    one.choices.ResetCounts();
    const auto start = std::chrono::steady_clock::now();
    ASSERT_OK_AND_ASSIGN(const StepOutcome step,
                         RunOneStep(c, GpuWorld(), Backend(&one.choices, &axes)));
    const double seconds =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const StepOutcome& expected = one.outcome;
    const auto gradients = CompareAll(step.gradients, expected.gradients);
    const auto changes = CompareAll(step.changes, expected.changes);
    ExpectNear(gradients, c, one);
    ExpectNear(changes, c, one);
    const double loss = std::max({Relative(step.lm_loss, expected.lm_loss),
                                  Relative(step.mtp_loss, expected.mtp_loss),
                                  Relative(step.balance, expected.balance)});
    EXPECT_LE(loss, LossTolerance(c));
    double kl = 0;
    for (size_t layer = 0; layer < expected.kl.size(); ++layer) {
      const double error = Relative(step.kl[layer], expected.kl[layer]);
      if (error == 0) continue;  // also 0 of 0: no indexer learns
      EXPECT_LE(error, KlTolerance(c, expected.kl[layer])) << "KL of layer " << layer;
      kl = std::max(kl, error);
    }
    EXPECT_LE(Relative(step.norm_main, expected.norm_main), kNormError);
    EXPECT_LE(Relative(step.norm_indexer, expected.norm_indexer), kNormError);
    EXPECT_EQ(step.expert_counts, expected.expert_counts);
    EXPECT_EQ(step.selection_hash, expected.selection_hash);
    EXPECT_TRUE(step.values_are_rounded_masters);

    const Nearness worst = WorstOfRanks(Worst(gradients)), change = WorstOfRanks(Worst(changes));
    const std::string flips = FlipRates(c, axes, one);
    if (GpuWorld().rank() != 0) return;
    std::printf(
        "CASE tp%d cp%d pp%d ep%d dp%d %s %s | gradient cos %.5f norm %.1e err %.1e | "
        "update cos %.5f norm %.1e | loss %.1e kl %.1e | %s | %.2f s\n",
        layout.tensor, layout.context, layout.pipeline, layout.expert, layout.data,
        layout.pipeline > 1 ? std::string(baleen::Name(layout.schedule)).c_str() : "-", Name(kind),
        worst.cosine, worst.norm_error, worst.error, change.cosine, change.norm_error, loss, kl,
        flips.c_str(), seconds);
    std::fflush(stdout);
  }

  // Of the pass that has just replayed `one`'s choices, and of one that makes its own.
  static std::string FlipRates(RigCase c, const GridCommunicators& axes, OneRank& one) {
    constexpr auto kExperts = ChoiceReplay::Kind::kExperts, kKeys = ChoiceReplay::Kind::kKeys;
    const double experts = FlipRate(one.choices, kExperts), keys = FlipRate(one.choices, kKeys);
    // Where every choice is the one rank's, it is so without replay too.
    if (experts == 0 && keys == 0) return "no flips";
    // A warm-up's pass is its forward pass already; it is the dense one's.
    if (c.stage.train == TrainMode::kIndexer)
      return absl::StrFormat("flips of experts %.2e", experts);
    c.validate = true;  // a forward pass alone
    c.steps = 0;
    one.choices.set_mode(ChoiceReplay::Mode::kCompare);
    one.choices.ResetCounts();
    EXPECT_THAT(RunOneStep(c, GpuWorld(), Backend(&one.choices, &axes)).status(), IsOk());
    return absl::StrFormat("flips of experts %.2e, keys %.2e; without replay %.2e, %.2e", experts,
                           keys, FlipRate(one.choices, kExperts), FlipRate(one.choices, kKeys));
  }
};

TEST_F(LayoutMatrixOnRanks, EveryAxisEqualsOneRank) {
  CheckAll({
      {.tensor = 2},
      {.context = 2},
      {.data = 2},
      {.expert = 2, .data = 2},
      {.pipeline = 2},
      {.pipeline = 2, .schedule = ScheduleName::kZbH1},
      {.pipeline = 2, .schedule = ScheduleName::kZbv},
      {.pipeline = 2, .schedule = ScheduleName::kDualPipeV},
      {.tensor = 2, .expert = 2},
      {.context = 2, .expert = 2},
  });
}

TEST_F(LayoutMatrixOnRanks, EveryPairOfAxesEqualsOneRank) {
  CheckAll({
      {.tensor = 2, .context = 2},
      {.tensor = 2, .data = 2},
      {.context = 2, .data = 2},
      {.tensor = 2, .pipeline = 2, .schedule = ScheduleName::kZbH1},
      {.context = 2, .pipeline = 2, .schedule = ScheduleName::kZbv},
      {.pipeline = 2, .data = 2},
      {.pipeline = 2, .expert = 2, .data = 2, .schedule = ScheduleName::kDualPipeV},
      {.expert = 2, .data = 4},
      {.tensor = 2, .expert = 4, .data = 2},
      {.context = 2, .expert = 4, .data = 2},
  });
}

TEST_F(LayoutMatrixOnRanks, ThreeAndMoreAxesEqualOneRank) {
  CheckAll({
      {.tensor = 2, .pipeline = 2, .expert = 2, .data = 2, .schedule = ScheduleName::kZbv},
      {.tensor = 2,
       .context = 2,
       .pipeline = 2,
       .expert = 4,
       .schedule = ScheduleName::kDualPipeV,
       .recompute = Recompute::kFull},
  });
}

// Nothing in a step depends on who comes first: NCCL adds in an order of its own, always the same.
TEST_F(LayoutMatrixOnRanks, TheSameLayoutTwiceGivesTheSameBits) {
  const int size = GpuWorld().size();
  Layout layout = {.data = size};
  if (size % 2 == 0) layout = {.tensor = 2, .expert = 2, .data = size / 2};
  if (size == 4) layout = {.context = 2, .expert = 2, .data = 2};
  RigCase c = MakeGpuCase(RecipeKind::kSparse, layout);
  c.steps = 2;
  ASSERT_OK_AND_ASSIGN(const StepOutcome first, RunOneStep(c, GpuWorld(), Backend(nullptr, {})));
  ASSERT_OK_AND_ASSIGN(const StepOutcome second, RunOneStep(c, GpuWorld(), Backend(nullptr, {})));
  EXPECT_TRUE(std::isfinite(first.lm_loss) && first.lm_loss > 0);
  ExpectSameStep(first, second);
}

}  // namespace
}  // namespace baleen::testing
