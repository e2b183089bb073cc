// The layout matrix: one training step under every mixture of the parallel axes equals one rank's,
// in losses, statistics, selected keys, norms and every gradient, to 1e-10 of each tensor's norm in
// fp64. One mpirun of 8 ranks drives all layouts: a layout of n ranks runs on the first n.
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "absl/strings/str_split.h"
#include "kernels/core/random.h"
#include "parallel/agree.h"
#include "parallel/expert_exchange.h"
#include "parallel/mpi_communicator.h"
#include "tests/support/status_matchers.h"
#include "tests/trainer/layout_cases.h"

namespace baleen::testing {
namespace {

constexpr double kTolerance = 1e-10;

double Relative(double a, double b) { return std::abs(a - b) / std::max(1.0, std::abs(b)); }

void ExpectNear(const std::vector<double>& a, const std::vector<double>& b, const char* what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  for (size_t i = 0; i < a.size(); ++i) EXPECT_LE(Relative(a[i], b[i]), kTolerance) << what << i;
}

// The piece against its place in the whole tensor; the error relative to the norm of the whole.
double PieceError(const StepOutcome::Piece& piece, const StepOutcome::Piece& whole) {
  double norm = 0, error = 0;
  for (const double v : whole.values) norm += v * v;
  const std::vector<double> place = ValuesAt(piece.box, whole);
  for (size_t i = 0; i < place.size(); ++i)
    error += (piece.values[i] - place[i]) * (piece.values[i] - place[i]);
  if (norm == 0) return error == 0 ? 0 : INFINITY;
  return std::sqrt(error / norm);
}

void ExpectSamePieces(const std::vector<StepOutcome::Piece>& pieces,
                      const std::vector<StepOutcome::Piece>& reference, Communicator& ranks,
                      const char* what) {
  std::map<std::string, const StepOutcome::Piece*> whole;
  for (const StepOutcome::Piece& piece : reference) whole[piece.name] = &piece;
  std::string names;
  for (const StepOutcome::Piece& piece : pieces) {
    ASSERT_TRUE(whole.count(piece.name)) << piece.name;
    EXPECT_LE(PieceError(piece, *whole[piece.name]), kTolerance) << what << piece.name;
    absl::StrAppend(&names, piece.name, " ");
  }
  // Together the ranks hold every one.
  std::set<std::string> held;
  for (const std::string& text : AllGatherStrings(ranks, "names", names)) {
    for (absl::string_view name : absl::StrSplit(text, ' ', absl::SkipEmpty()))
      held.insert(std::string(name));
  }
  EXPECT_EQ(held.size(), reference.size());
}

void ExpectSameStep(const StepOutcome& step, const StepOutcome& reference, Communicator& ranks) {
  EXPECT_LE(Relative(step.lm_loss, reference.lm_loss), kTolerance);
  EXPECT_LE(Relative(step.mtp_loss, reference.mtp_loss), kTolerance);
  EXPECT_LE(Relative(step.balance, reference.balance), kTolerance);
  ExpectNear(step.kl, reference.kl, "KL of layer ");
  ExpectNear(step.mass, reference.mass, "mass of layer ");
  ExpectNear(step.recall, reference.recall, "recall of layer ");
  EXPECT_EQ(step.ties, reference.ties);
  EXPECT_EQ(step.expert_counts, reference.expert_counts);
  EXPECT_EQ(step.selection_hash, reference.selection_hash);
  EXPECT_LE(Relative(step.norm_main, reference.norm_main), kTolerance);
  EXPECT_LE(Relative(step.norm_indexer, reference.norm_indexer), kTolerance);

  ExpectNear(step.validation_loss, reference.validation_loss, "validation loss of row ");
  EXPECT_EQ(step.validation_targets, reference.validation_targets);
  ExpectSamePieces(step.gradients, reference.gradients, ranks, "gradient of ");
  ExpectSamePieces(step.values, reference.values, ranks, "value of ");
}

class LayoutMatrix : public ::testing::Test {
 protected:
  void SetUp() override {
    if (world_->size() < 8) GTEST_SKIP() << "needs 8 ranks";
  }

  // Runs `c` on the first `ranks` ranks; the others wait at the next Split.
  void Check(const RigCase& c, int ranks, const std::string& what) {
    const auto part = world_->Split(world_->rank() < ranks ? 0 : 1, world_->rank(), "part");
    if (world_->rank() >= ranks) return;
    SCOPED_TRACE(what);
    const StepOutcome& reference = Reference(c);
    ASSERT_OK_AND_ASSIGN(const StepOutcome step, RunOneStep(c, *part));
    ExpectSameStep(step, reference, *part);
  }

  // A third with document masks, a quarter of those that have indexers with measured ones.
  void CheckAll(const std::vector<Layout>& layouts, int64_t layers,
                const std::vector<RecipeKind>& kinds) {
    int index = 0;
    for (const Layout& layout : layouts) {
      for (const RecipeKind kind : kinds) {
        RigCase c = MakeCase(kind, layout, layers);
        c.document_mask = index % 3 == 0;
        c.measure_indexer = kind != RecipeKind::kDense && index / 4 % 4 == 1;
        ++index;
        Check(c, layout.ranks(), absl::StrCat(Name(kind), " ", layout.DebugString()));
      }
    }
  }

  // The same case on one rank, kept for the next layout.
  const StepOutcome& Reference(RigCase c) {
    c = OnOneRank(c);
    const std::string key = KeyOf(c);
    const auto found = references_.find(key);
    if (found != references_.end()) return found->second;
    const auto self = MakeSelfCommunicator();
    auto outcome = RunOneStep(c, *self);
    CHECK_OK(outcome.status());
    return references_.emplace(key, *std::move(outcome)).first->second;
  }

  std::unique_ptr<Communicator> world_ = WrapMpiWorld();
  static std::map<std::string, StepOutcome> references_;
};

std::map<std::string, StepOutcome> LayoutMatrix::references_;

// Every axis alone and every pair, in all four forms.
TEST_F(LayoutMatrix, EveryAxisAndEveryPairEqualsOneRank) {
  const std::vector<Layout> layouts = {
      {.data = 2},
      {.data = 8},
      {.tensor = 2},
      {.tensor = 4},
      {.tensor = 8},
      {.context = 2},
      {.context = 8},
      {.pipeline = 2},
      {.expert = 2, .data = 2},
      {.expert = 8, .data = 8},
      {.tensor = 2, .data = 2},
      {.context = 2, .data = 2},
      {.pipeline = 2, .data = 2},
      {.expert = 2, .data = 4},
      {.tensor = 2, .context = 2},
      {.tensor = 4, .context = 2},
      {.tensor = 2, .pipeline = 2},
      {.tensor = 2, .expert = 2},
      {.tensor = 4, .expert = 2},
      {.context = 2, .pipeline = 2},
      {.context = 2, .expert = 2},
      {.context = 4, .expert = 4},
      {.pipeline = 2, .expert = 2, .data = 2},
  };
  CheckAll(layouts, 3,
           {RecipeKind::kDense, RecipeKind::kWarmUp, RecipeKind::kSparse, RecipeKind::kMasked});
}

// Three and more axes, each schedule, each recompute mode, two hops between experts.
TEST_F(LayoutMatrix, ThreeAndMoreAxesUnderEverySchedule) {
  std::vector<Layout> layouts;
  for (const ScheduleName schedule :
       {ScheduleName::kGpipe, ScheduleName::k1F1B, ScheduleName::kInterleaved, ScheduleName::kZbH1,
        ScheduleName::kZbv, ScheduleName::kDualPipeV}) {
    const auto recompute = static_cast<Recompute>(layouts.size() % 3);
    layouts.push_back({.tensor = 2,
                       .context = 2,
                       .pipeline = 2,
                       .expert = 4,
                       .schedule = schedule,
                       .recompute = recompute});
    layouts.push_back({.tensor = 2, .pipeline = 2, .expert = 2, .data = 2, .schedule = schedule});
    layouts.push_back({.context = 2,
                       .pipeline = 2,
                       .expert = 4,
                       .data = 2,
                       .schedule = schedule,
                       .recompute = Recompute::kFull,
                       .expert_node_size = 2});
  }
  layouts.push_back({.tensor = 2,
                     .context = 2,
                     .expert = 8,
                     .data = 2,
                     .recompute = Recompute::kSelective,
                     .expert_node_size = 4});
  layouts.push_back({.tensor = 2, .context = 4, .expert = 8, .expert_node_size = 2});
  layouts.push_back({.pipeline = 2, .schedule = ScheduleName::kInterleaved, .virtual_stages = 3});
  CheckAll(layouts, 7, {RecipeKind::kDense, RecipeKind::kWarmUp, RecipeKind::kSparse});
}

TEST_F(LayoutMatrix, DeepPipelinesUnderEverySchedule) {
  std::vector<Layout> layouts;
  for (const ScheduleName schedule :
       {ScheduleName::kGpipe, ScheduleName::k1F1B, ScheduleName::kInterleaved, ScheduleName::kZbH1,
        ScheduleName::kZbv, ScheduleName::kDualPipeV}) {
    layouts.push_back({.pipeline = 4, .schedule = schedule});
    layouts.push_back({.tensor = 2, .pipeline = 4, .expert = 2, .schedule = schedule});
  }
  layouts.push_back({.pipeline = 8});
  CheckAll(layouts, 7, {RecipeKind::kDense, RecipeKind::kWarmUp, RecipeKind::kMasked});
}

// Attention and MLPs in chunks of rows, the experts' rows in rounds: other sizes agree to rounding.
TEST_F(LayoutMatrix, ChunksAndRoundsChangeNothing) {
  for (const RecipeKind kind :
       {RecipeKind::kDense, RecipeKind::kWarmUp, RecipeKind::kSparse, RecipeKind::kMasked}) {
    for (const Recompute recompute : {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
      const Layout layout{.tensor = 2, .context = 2, .expert = 4, .recompute = recompute};
      RigCase c = MakeCase(kind, layout, 3);
      c.row_chunk = 5;
      c.document_mask = recompute != Recompute::kSelective;
      c.expert_rows = MinimumExpertRows(4, 2, c.model.num_experts_per_tok) + 3;
      Check(c, 4, absl::StrCat(Name(kind), " chunks, ", layout.DebugString()));
    }
  }
}

// Rows of several sequences lie together on a rank, each cut zigzag; and passes without backward.
TEST_F(LayoutMatrix, SeveralSequencesInAMicrobatchEqualOneRank) {
  const std::vector<Layout> layouts = {
      {.context = 4},
      {.tensor = 2, .context = 2, .expert = 4, .data = 2},
      {.tensor = 2, .pipeline = 2, .expert = 2, .data = 2},
      {.tensor = 2, .context = 2, .pipeline = 2, .schedule = ScheduleName::kZbv},
  };
  for (size_t i = 0; i < layouts.size(); ++i) {
    for (const RecipeKind kind :
         {RecipeKind::kDense, RecipeKind::kWarmUp, RecipeKind::kSparse, RecipeKind::kMasked}) {
      RigCase c = MakeCase(kind, layouts[i], 3);
      c.stage.micro_batch_size = 2;
      c.document_mask = i % 2 == 1;
      c.validate = kind != RecipeKind::kWarmUp;
      Check(c, layouts[i].ranks(),
            absl::StrCat("two sequences, ", Name(kind), " ", layouts[i].DebugString()));
    }
  }
}

// Every token to expert 0, then none: exact, whatever the layout.
TEST_F(LayoutMatrix, OneExpertGetsEverythingOrNothing) {
  for (const double bias : {1e3, -1e3}) {
    for (const ScheduleName schedule :
         {ScheduleName::kGpipe, ScheduleName::k1F1B, ScheduleName::kInterleaved,
          ScheduleName::kZbH1, ScheduleName::kZbv, ScheduleName::kDualPipeV}) {
      const Layout layout{
          .context = 2, .pipeline = 2, .expert = 4, .data = 2, .schedule = schedule};
      RigCase c = MakeCase(RecipeKind::kSparse, layout, 7);
      c.first_expert_bias = bias;
      c.expert_rows = bias > 0 ? MinimumExpertRows(4, 2, c.model.num_experts_per_tok) : -1;
      Check(c, 8, absl::StrCat("bias ", bias, " ", layout.DebugString()));
    }
  }
}

// 200 layouts drawn at random that can be, all of them right; those that cannot are refused with a
// ConfigError on every rank.
TEST_F(LayoutMatrix, RandomLayoutsNeitherHangNorDiffer) {
  const RandomStream random(11, NameStream("layouts"));
  int draw = 0, ran = 0;
  const auto pick = [&](std::vector<int> values) {
    return values[random.Integer(draw++) % values.size()];
  };
  for (int trial = 0; trial < 4000 && ran < 200; ++trial) {
    Layout layout;
    layout.tensor = pick({1, 1, 2, 4});
    layout.context = pick({1, 1, 2, 3});
    layout.pipeline = pick({1, 1, 2, 4});
    layout.data = pick({1, 2});
    layout.expert = pick({1, 2, 4, 8});
    layout.schedule = static_cast<ScheduleName>(pick({0, 1, 2, 3, 4, 5}));
    layout.recompute = static_cast<Recompute>(pick({0, 1, 2}));
    layout.expert_node_size = pick({0, 0, 2});
    const auto kind = static_cast<RecipeKind>(pick({0, 1, 2, 3}));
    if (layout.ranks() > 8) continue;
    RigCase c = MakeCase(kind, layout, 3);
    c.stage.global_batch_size = 4;
    c.stage.data.seq_length = 16;
    const auto recipe = MakeRecipe(c.stage, c.model);
    ASSERT_THAT(recipe.status(), IsOk());
    const auto made = MakeStageLayout(c.stage, c.model, *recipe, layout.ranks());
    if (!made.ok()) {
      EXPECT_EQ(made.status().code(), absl::StatusCode::kInvalidArgument) << made.status();
      continue;
    }
    ++ran;
    Check(c, layout.ranks(), absl::StrCat(Name(kind), " ", layout.DebugString()));
  }
  EXPECT_EQ(ran, 200);
}

// Metamorphic: another order of the microbatches, or of the experts' names, is the same step.
TEST_F(LayoutMatrix, OrderOfMicrobatchesAndNamesOfExpertsDoNotMatter) {
  const Layout layout{.tensor = 2, .pipeline = 2, .expert = 2, .data = 2};
  RigCase c = MakeCase(RecipeKind::kSparse, layout, 3);
  c.sample_order = {3, 1, 7, 0, 6, 2, 5, 4};
  Check(c, 8, "permuted microbatches");

  RigCase renamed = MakeCase(RecipeKind::kDense, layout, 3);
  // Inside groups and of whole groups, so that group-limited routing means the same.
  renamed.expert_order = {5, 4, 1, 0, 6, 7, 2, 3};
  const StepOutcome& reference = Reference(MakeCase(RecipeKind::kDense, layout, 3));
  ASSERT_OK_AND_ASSIGN(const StepOutcome step, RunOneStep(renamed, *world_));
  EXPECT_LE(Relative(step.lm_loss, reference.lm_loss), kTolerance);
  EXPECT_LE(Relative(step.norm_main, reference.norm_main), kTolerance);
  const int64_t experts = renamed.model.n_routed_experts;
  for (size_t i = 0; i < step.expert_counts.size(); ++i) {
    EXPECT_EQ(step.expert_counts[i],
              reference.expert_counts[i / experts * experts + renamed.expert_order[i % experts]]);
  }
}

// What the comparison in bf16 on GPUs rests on: a run that would send every row to expert 0 takes
// the choices of another run instead, and is then that run's step.
TEST_F(LayoutMatrix, ReplayedChoicesReplaceTheOwn) {
  constexpr auto kExperts = ChoiceReplay::Kind::kExperts, kKeys = ChoiceReplay::Kind::kKeys;
  const Layout layout{.tensor = 2, .pipeline = 2, .expert = 2, .data = 2};
  RigCase c = MakeCase(RecipeKind::kSparse, layout, 3);
  c.document_mask = true;
  ChoiceReplay choices;
  RigBackend backend;
  backend.replay = &choices;
  const auto self = MakeSelfCommunicator();
  ASSERT_OK_AND_ASSIGN(const StepOutcome recorded, RunOneStep(OnOneRank(c), *self, backend));

  choices.set_mode(ChoiceReplay::Mode::kCompare);
  choices.ResetCounts();
  ASSERT_OK_AND_ASSIGN(const StepOutcome compared, RunOneStep(c, *world_, backend));
  ExpectSameStep(compared, recorded, *world_);
  EXPECT_GT(choices.count(kExperts).choices, 0);
  EXPECT_GT(choices.count(kKeys).choices, 0);
  EXPECT_EQ(choices.count(kExperts).flipped, 0);
  EXPECT_EQ(choices.count(kKeys).flipped, 0);

  choices.set_mode(ChoiceReplay::Mode::kReplay);
  choices.ResetCounts();
  c.first_expert_bias = 1e3;  // moves the choice alone, not the experts' weights
  c.stage.recompute = Recompute::kFull;
  ASSERT_OK_AND_ASSIGN(const StepOutcome replayed, RunOneStep(c, *world_, backend));
  EXPECT_GT(choices.count(kExperts).flipped, 0);
  EXPECT_EQ(choices.count(kKeys).flipped, 0);
  EXPECT_LE(Relative(replayed.lm_loss, recorded.lm_loss), kTolerance);
  EXPECT_EQ(replayed.expert_counts, recorded.expert_counts);
  EXPECT_EQ(replayed.selection_hash, recorded.selection_hash);
  ExpectSamePieces(replayed.gradients, recorded.gradients, *world_, "gradient of ");
}

// The same job with its ranks numbered in another order.
TEST_F(LayoutMatrix, NamesOfRanksDoNotMatter) {
  const Layout layout{.tensor = 2, .context = 2, .expert = 4, .data = 2};
  const RigCase c = MakeCase(RecipeKind::kSparse, layout, 3);
  const auto shuffled = world_->Split(0, (world_->rank() * 5 + 3) % 8, "shuffled");
  ASSERT_OK_AND_ASSIGN(const StepOutcome step, RunOneStep(c, *shuffled));
  ExpectSameStep(step, Reference(c), *shuffled);
}

}  // namespace
}  // namespace baleen::testing
