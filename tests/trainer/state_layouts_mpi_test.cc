// A training state is the same under every layout: what layout X held in memory when it saved is
// what layout Y holds after it loaded, bit for bit: values of every parameter (those the state
// leaves to the source too), both moments, the router's bias, the place in the run. 20 pairs (X, Y)
// for the warm-up and for sparse training, saved after two steps of X.
//
// The comparison knows nothing of the state's own geometry: every rank's pieces, boxes and flat
// ranges, are put into whole tensors one element at a time. One mpirun of 8 ranks drives all pairs:
// X runs on the first ranks, Y on rank 0 and the last.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <map>
#include <set>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "checkpoints/state_digest.h"
#include "data/build.h"
#include "parallel/agree.h"
#include "parallel/mpi_communicator.h"
#include "tests/support/status_matchers.h"
#include "tests/trainer/late_gathers.h"
#include "trainer/step.h"
#include "trainer/train_state.h"

namespace baleen::testing {
namespace {

constexpr int kWorld = 8;
constexpr int64_t kSteps = 2;

// 7 layers for 8 pipeline ranks, 8 heads and widths that 8 tensor ranks divide; hidden size 20, so
// that even shares of the flat buffers end inside rows.
constexpr char kModel[] = R"(vocab_size: 264
hidden_size: 20
num_hidden_layers: 7
first_k_dense_replace: 1
num_nextn_predict_layers: 1
intermediate_size: 24
moe_intermediate_size: 8
n_routed_experts: 8
n_shared_experts: 1
num_experts_per_tok: 2
n_group: 4
topk_group: 2
num_attention_heads: 8
q_lora_rank: 12
kv_lora_rank: 12
qk_nope_head_dim: 6
qk_rope_head_dim: 8
v_head_dim: 5
max_position_embeddings: 64
initializer_range: 0.15
)";

struct Layout {
  int tensor = 1, context = 1, pipeline = 1, expert = 1, data = 1;
  ScheduleName schedule = ScheduleName::k1F1B;
  int ranks() const { return tensor * context * pipeline * data; }
  std::string DebugString() const {
    return absl::StrCat("tp ", tensor, " cp ", context, " pp ", pipeline, " ep ", expert, " dp ",
                        data, " ", baleen::Name(schedule));
  }
};

// Every axis alone, pairs, mixtures of all five, schedules with two parts a rank, numbers of ranks
// that divide nothing.
const std::vector<Layout>& Layouts() {
  static const auto* const layouts = new std::vector<Layout>{
      {},
      {.data = 8},
      {.tensor = 8},
      {.context = 8},
      {.pipeline = 8},
      {.expert = 8, .data = 8},
      {.data = 7},
      {.pipeline = 5},
      {.tensor = 2, .data = 3},
      {.context = 3, .data = 2},
      {.pipeline = 3, .data = 2},
      {.expert = 2, .data = 6},
      {.tensor = 2, .context = 3},
      {.tensor = 4, .pipeline = 2, .schedule = ScheduleName::kZbH1},
      {.tensor = 4, .context = 2, .expert = 8},
      {.pipeline = 4, .schedule = ScheduleName::kZbv},
      {.tensor = 2, .context = 2, .pipeline = 2, .expert = 4},
      {.tensor = 2, .pipeline = 2, .expert = 2, .data = 2, .schedule = ScheduleName::kInterleaved},
      {.context = 2, .pipeline = 2, .expert = 4, .data = 2, .schedule = ScheduleName::kDualPipeV},
      {.context = 4, .expert = 8, .data = 2},
  };
  return *layouts;
}

enum class StageKind { kWarmUp, kSparse };

StageConfig MakeStage(StageKind kind, const Layout& layout, Compute compute,
                      const std::string& data) {
  StageConfig stage = DefaultStageConfig();
  stage.name = kind == StageKind::kWarmUp ? "warm-up" : "sparse";
  stage.attention = kind == StageKind::kWarmUp ? AttentionMode::kDense : AttentionMode::kSparse;
  stage.train = kind == StageKind::kWarmUp ? TrainMode::kIndexer : TrainMode::kAll;
  stage.steps = kSteps;
  stage.micro_batch_size = 1;
  stage.global_batch_size = int64_t{2} * layout.pipeline * layout.data;  // enough for two parts
  stage.data.seq_length = 48;
  stage.data.train = {{.path = data, .weight = 1}};
  stage.data.validation.clear();
  stage.optimizer.lr = 1e-2;
  stage.dsa.index_topk = 6;
  stage.dsa.index_n_heads = 2;
  stage.dsa.index_head_dim = 12;
  stage.precision.compute = compute;
  stage.router.bias_update_speed = 1e-2;
  stage.parallelism.tensor = layout.tensor;
  stage.parallelism.context = layout.context;
  stage.parallelism.pipeline = layout.pipeline;
  stage.parallelism.expert = layout.expert;
  stage.parallelism.schedule = layout.schedule;
  return stage;
}

// ---- What ranks hold, as whole tensors
// -----------------------------------------------------------

struct WholeTensor {
  DType dtype = DType::kF32;
  Shape shape;
  std::vector<uint8_t> bytes;
  std::vector<bool> held;
};
using WholeState = std::map<std::string, WholeTensor>;

// Elements flat_begin, ... of `box`.
struct Held {
  std::string name;
  Shape shape;
  Box box;
  int64_t flat_begin = 0;
  Tensor data;
};

// All that this rank holds: parameters in full (copies of other ranks too) and its shares of the
// moments.
std::vector<Held> HeldBy(TrainingStage& stage) {
  std::vector<Held> pieces;
  for (const Parameter& p : stage.parameters().parameters()) {
    pieces.push_back({p.name, p.global_shape, p.box, 0, stage.parameters().value(p.id)});
    for (const OptimizerShard& shard : stage.optimizer().shards()) {
      if (shard.group != p.group || !shard.trains()) continue;
      const int64_t begin = std::max(p.begin, shard.begin);
      const int64_t end = std::min(p.begin + p.num_elements(), shard.begin + shard.count);
      if (begin >= end) continue;
      for (const auto& [prefix, moment] : {std::pair{"adam_m/", shard.m}, {"adam_v/", shard.v}}) {
        pieces.push_back({prefix + p.name, p.global_shape, p.box, begin - p.begin,
                          moment.Flat(begin - shard.begin, end - begin)});
      }
    }
  }
  return pieces;
}

// Copies must agree with each other.
void Place(const Held& piece, WholeState& state) {
  WholeTensor& whole = state[piece.name];
  const int64_t bytes = DTypeBytes(piece.data.dtype());
  if (whole.bytes.empty()) {
    whole.dtype = piece.data.dtype();
    whole.shape = piece.shape;
    whole.bytes.resize(NumElements(piece.shape) * bytes);
    whole.held.resize(NumElements(piece.shape));
  }
  ASSERT_EQ(whole.dtype, piece.data.dtype()) << piece.name;
  ASSERT_EQ(whole.shape, piece.shape) << piece.name;
  const auto* from = static_cast<const uint8_t*>(piece.data.raw());
  for (int64_t i = 0; i < piece.data.num_elements(); ++i, from += bytes) {
    int64_t rest = piece.flat_begin + i, at = 0, stride = 1;
    for (size_t d = piece.shape.size(); d-- > 0;) {
      at += (piece.box.offset[d] + rest % piece.box.extent[d]) * stride;
      rest /= piece.box.extent[d];
      stride *= piece.shape[d];
    }
    uint8_t* to = whole.bytes.data() + at * bytes;
    if (whole.held[at]) {
      ASSERT_EQ(std::memcmp(to, from, bytes), 0) << piece.name << ": copies differ at " << at;
    }
    std::memcpy(to, from, bytes);
    whole.held[at] = true;
  }
}

// Description and bytes of the pieces, one after the other.
std::string Pack(const std::vector<Held>& pieces) {
  std::string text;
  for (const Held& p : pieces) {
    absl::StrAppend(&text, p.name, " ", static_cast<int>(p.data.dtype()), " ", p.flat_begin, " ",
                    p.data.num_elements(), " ", p.shape.size());
    for (const Shape* numbers : {&p.shape, &p.box.offset, &p.box.extent})
      for (const int64_t n : *numbers) absl::StrAppend(&text, " ", n);
    text += '\n';
    text.append(static_cast<const char*>(p.data.raw()),
                p.data.num_elements() * DTypeBytes(p.data.dtype()));
  }
  return text;
}

void Unpack(const std::string& text, WholeState& state) {
  for (size_t at = 0; at < text.size();) {
    const size_t line = text.find('\n', at);
    std::istringstream words(text.substr(at, line - at));
    Held piece;
    int dtype = 0;
    int64_t count = 0;
    size_t dims = 0;
    words >> piece.name >> dtype >> piece.flat_begin >> count >> dims;
    for (Shape* numbers : {&piece.shape, &piece.box.offset, &piece.box.extent}) {
      numbers->resize(dims);
      for (int64_t& n : *numbers) words >> n;
    }
    piece.data = Context::Cpu().Zeros(static_cast<DType>(dtype), {count});
    const size_t bytes = count * DTypeBytes(piece.data.dtype());
    std::memcpy(piece.data.raw(), text.data() + line + 1, bytes);
    at = line + 1 + bytes;
    Place(piece, state);
  }
}

// On rank 0 of `ranks`; the others get nothing.
WholeState Collect(TrainingStage& stage, Communicator& ranks) {
  const std::string mine = Pack(HeldBy(stage));
  const Tensor bytes = Context::Cpu().Zeros(DType::kI64, {ranks.size()});
  bytes.data<int64_t>()[ranks.rank()] = static_cast<int64_t>(mine.size());
  ranks.AllReduce("sizes", bytes);
  WholeState state;
  if (ranks.rank() == 0) Unpack(mine, state);
  for (int from = 1; from < ranks.size(); ++from) {
    const Tensor packed = Context::Cpu().Zeros(DType::kU8, {bytes.data<int64_t>()[from]});
    if (ranks.rank() == from) {
      std::memcpy(packed.raw(), mine.data(), mine.size());
      ranks.Send("pieces", packed, 0);
    } else if (ranks.rank() == 0) {
      ranks.Recv("pieces", packed, from);
      Unpack(std::string(static_cast<const char*>(packed.raw()), packed.num_elements()), state);
    }
  }
  return state;
}

void ExpectSame(const WholeState& loaded, const WholeState& saved) {
  ASSERT_EQ(loaded.size(), saved.size());
  for (const auto& [name, whole] : saved) {
    const auto found = loaded.find(name);
    ASSERT_NE(found, loaded.end()) << name;
    EXPECT_EQ(found->second.shape, whole.shape) << name;
    for (const WholeTensor* one : {&whole, &found->second})
      EXPECT_TRUE(std::find(one->held.begin(), one->held.end(), false) == one->held.end()) << name;
    EXPECT_TRUE(found->second.bytes == whole.bytes) << name;
  }
}

// ---- Pairs
// ---------------------------------------------------------------------------------------

class StateLayouts : public ::testing::Test {
 protected:
  void SetUp() override {
    if (world_->size() < kWorld) GTEST_SKIP() << "needs 8 ranks";
    char name[] = "/tmp/baleen_layouts_XXXXXX";
    if (world_->rank() == 0) ASSERT_NE(::mkdtemp(name), nullptr);
    directory_ = BroadcastString(*world_, "directory", name, 0);
    if (world_->rank() == 0) {
      std::string text;
      for (int i = 0; i < 3000; ++i) absl::StrAppend(&text, i * 7919 % 1000, " ");
      ASSERT_THAT(WriteFileDurably(Path("text.txt"), text), IsOk());
      ASSERT_THAT(WriteFileDurably(Path("model.yaml"), kModel), IsOk());
      BuildOptions build;
      build.documents.inputs = {Path("text.txt")};
      build.prefix = Path("tokens");
      ASSERT_THAT(BuildTokens(build).status(), IsOk());
    }
    world_->Barrier("inputs");
    run_.seed = 5;
    ASSERT_OK_AND_ASSIGN(
        WeightSource source,
        WeightSource::Open({.checkpoint = std::nullopt, .config = Path("model.yaml")},
                           MakeStage(StageKind::kSparse, {}, Compute::kFp64, "").dsa, run_.seed));
    source_.emplace(std::move(source));
  }
  void TearDown() override {
    if (directory_.empty()) return;
    world_->Barrier("all done");
    if (world_->rank() == 0) std::filesystem::remove_all(directory_);
  }

  std::string Path(absl::string_view name) const { return JoinPath(directory_, std::string(name)); }

  std::unique_ptr<TrainingStage> Make(StageKind kind, const Layout& layout, Compute compute,
                                      Communicator& ranks) {
    auto stage = TrainingStage::Make(run_, MakeStage(kind, layout, compute, Path("tokens")),
                                     source_->config(), ranks);
    CHECK_OK(stage.status());
    return *std::move(stage);
  }

  std::string Save(TrainingStage& stage, const ChangedParameters& changed,
                   const RunPosition& position, const std::string& folder) {
    SaveRequest request;
    request.directory = Path(folder);
    request.stage_name = stage.config().name;
    request.position = position;
    request.seed = run_.seed;
    request.identity = {{"run.seed", absl::StrCat(run_.seed)}};
    auto saved = SaveTrainState(stage, *source_, changed, request);
    CHECK_OK(saved.status());
    return *saved;
  }

  // Two steps of X from the source, saved. What X held is given to rank 0.
  WholeState TrainAndSave(StageKind kind, const Layout& x, Compute compute, Communicator& ranks) {
    const auto stage = Make(kind, x, compute, ranks);
    ChangedParameters changed;
    CHECK_OK(LoadStage(*stage, *source_, nullptr, false, changed));
    for (int64_t step = 0; step < kSteps; ++step) {
      const auto result = TrainStep(*stage, {step, 100 + step}, 1e-2, false);
      CHECK_OK(result.status());
      EXPECT_FALSE(result->skipped);
    }
    Save(*stage, changed, position_, "x");
    return Collect(*stage, ranks);
  }

  // Y filled from X's files, and saved again at once.
  WholeState LoadAndSave(StageKind kind, const Layout& y, Compute compute, Communicator& ranks) {
    auto state = OpenState(Path("x/step-00000007"), ranks);
    CHECK_OK(state.status());
    const auto stage = Make(kind, y, compute, ranks);
    ChangedParameters changed;
    CHECK_OK(LoadStage(*stage, *source_, &*state, true, changed));
    Save(*stage, changed, PositionOf(state->metadata()), "y");
    return Collect(*stage, ranks);
  }

  // The files of both, against what X held. On rank 0.
  void CheckFiles(StageKind kind, const WholeState& held) {
    ASSERT_OK_AND_ASSIGN(StateReader x, StateReader::Open(Path("x/step-00000007")));
    ASSERT_OK_AND_ASSIGN(StateReader y, StateReader::Open(Path("y/step-00000007")));
    // Blocks of 1000 bytes end inside rows.
    ASSERT_OK_AND_ASSIGN(const StateDigest x_digest, DigestState(x, 1000));
    ASSERT_OK_AND_ASSIGN(const StateDigest y_digest, DigestState(y));
    EXPECT_EQ(x_digest.tensors, y_digest.tensors);
    EXPECT_EQ(x_digest.whole, y_digest.whole);

    std::set<std::string> missing;
    for (const auto& [name, whole] : held) missing.insert(name);
    bool has_bias = false;
    for (const TensorDigest& tensor : x_digest.tensors) {
      EXPECT_EQ(missing.erase(tensor.name), 1u) << tensor.name;
      EXPECT_EQ(tensor.hash, Hash128(held.at(tensor.name).bytes)) << tensor.name;
      const bool bias = absl::StrContains(tensor.name, "e_score_correction_bias");
      has_bias = has_bias || bias;
      // Everything saved has moved: no zeros where moments and the router's bias are.
      const std::vector<uint8_t>& bytes = held.at(tensor.name).bytes;
      if (bias || absl::StartsWith(tensor.name, "adam_")) {
        EXPECT_TRUE(std::any_of(bytes.begin(), bytes.end(), [](uint8_t b) { return b != 0; }))
            << tensor.name;
      }
    }
    EXPECT_EQ(has_bias, kind == StageKind::kSparse);
    // What is in no file is named as the source's, all of it, whichever ranks held it.
    StateMetadata metadata = x.metadata();
    std::set<std::string> frozen;
    for (const FrozenSource& source : metadata.sources)
      frozen.insert(source.tensors.begin(), source.tensors.end());
    EXPECT_EQ(frozen, missing);
    EXPECT_EQ(frozen.empty(), kind == StageKind::kSparse);
    // Place in the run and the rest: only the layout's name may differ.
    metadata.layout = y.metadata().layout;
    EXPECT_EQ(metadata, y.metadata());
    EXPECT_EQ(metadata.consumed_samples, position_.consumed_samples);
    EXPECT_EQ(metadata.extra.at("skipped_steps"), "3");
  }

  // Of the files of X, which are removed.
  std::string TakeDigestOfX() {
    std::string whole;
    if (world_->rank() == 0) {
      auto state = StateReader::Open(Path("x/step-00000007"));
      CHECK_OK(state.status());
      const auto digest = DigestState(*state);
      CHECK_OK(digest.status());
      whole = digest->whole;
      std::filesystem::remove_all(Path("x"));
    }
    world_->Barrier("digest");
    return whole;
  }

  void CheckPair(StageKind kind, const Layout& x, const Layout& y, Compute compute) {
    SCOPED_TRACE(absl::StrCat(x.DebugString(), " -> ", y.DebugString()));
    const int rank = world_->rank();
    WholeState saved, loaded;
    {
      const auto ranks = world_->Split(rank < x.ranks() ? 0 : 1, rank, "x");
      if (rank < x.ranks()) saved = TrainAndSave(kind, x, compute, *ranks);
    }
    world_->Barrier("saved");
    // Rank 0 looks at both; the other ranks of Y are not X's, as far as there are enough.
    const int place = rank == 0 ? 0 : kWorld - rank;
    {
      const auto ranks = world_->Split(place < y.ranks() ? 0 : 1, place, "y");
      if (place < y.ranks()) loaded = LoadAndSave(kind, y, compute, *ranks);
    }
    if (rank == 0) {
      ExpectSame(loaded, saved);
      CheckFiles(kind, saved);
      std::filesystem::remove_all(Path("x"));
      std::filesystem::remove_all(Path("y"));
    }
    world_->Barrier("compared");
  }

  void CheckPairs(StageKind kind) {
    const int count = static_cast<int>(Layouts().size());
    ASSERT_EQ(count, 20);
    for (int i = 0; i < count; ++i) {
      // Each layout saves once and loads once; no layout meets itself.
      const int j = (i * 7 + 3) % count;
      ASSERT_NE(i, j);
      CheckPair(kind, Layouts()[i], Layouts()[j], i % 2 == 0 ? Compute::kFp64 : Compute::kFp32);
      if (HasFailure()) return;
    }
  }

  std::unique_ptr<Communicator> world_ = WrapMpiWorld();
  std::string directory_;
  RunSection run_;
  std::optional<WeightSource> source_;
  RunPosition position_{.step = 7,
                        .stage_index = 1,
                        .stage_step = kSteps,
                        .consumed_samples = 4711,
                        .consumed_tokens = 123456789012,
                        .skipped_steps = 3};
};

TEST_F(StateLayouts, WarmUpStatesOf20PairsLoadBitForBit) { CheckPairs(StageKind::kWarmUp); }

TEST_F(StateLayouts, SparseStatesOf20PairsLoadBitForBit) { CheckPairs(StageKind::kSparse); }

// The last gradients travel while the host asks for the step's statistics.
TEST_F(StateLayouts, NoGradientIsLeftBehindWhenStatisticsAreAskedFor) {
  const auto ranks = world_->Split(0, world_->rank(), "ranks");
  const auto stage = Make(StageKind::kSparse, {.pipeline = 2, .data = 4}, Compute::kFp32, *ranks);
  ChangedParameters changed;
  ASSERT_THAT(LoadStage(*stage, *source_, nullptr, false, changed), IsOk());
  std::string record;
  const StepWatch watch = [&](StepPhase phase) {
    if (phase == StepPhase::kStatistics) record = stage->axes().embedding->FlightRecord();
  };
  ASSERT_THAT(TrainStep(*stage, {}, 1e-2, false, watch).status(), IsOk());
  EXPECT_TRUE(absl::StrContains(record, "ReduceScatter gradients")) << record;
}

// Whoever saves or reads a state waits for values that are on their way.
TEST_F(StateLayouts, AStateIsTheSameWhenValuesArriveLate) {
  for (const StageKind kind : {StageKind::kWarmUp, StageKind::kSparse}) {
    const Layout layout{.tensor = 2, .expert = 2, .data = 4};
    const auto prompt = world_->Split(0, world_->rank(), "prompt");
    const WholeState expected = TrainAndSave(kind, layout, Compute::kFp32, *prompt);
    const auto expected_files = TakeDigestOfX();
    const auto late = MakeLateGathers(world_->Split(0, world_->rank(), "late"));
    ExpectSame(TrainAndSave(kind, layout, Compute::kFp32, *late), expected);
    EXPECT_TRUE(TakeDigestOfX() == expected_files);
  }
}

}  // namespace
}  // namespace baleen::testing
