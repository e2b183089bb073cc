// The tour of docs/parallelism.md is what the code does: one step of a small model under tp 2 x cp
// 2 x pp 2 x ep 4, on 8 ranks, phase by phase. Held to the document's tables are the shape of every
// tensor they name, and every collective: operation, axis, label, bytes and order, none missing and
// none more.
//
// The numbers must be the letters' with this model's sizes. A tensor that nobody keeps is checked
// by the bytes of its collective.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/core/file.h"
#include "kernels/core/random.h"
#include "parallel/mpi_communicator.h"
#include "tests/support/status_matchers.h"
#include "tests/trainer/model_rig.h"
#include "tests/trainer/tour_rig.h"
#include "trainer/make_batch.h"
#include "trainer/optimizer.h"
#include "trainer/stage_layout.h"

namespace baleen::testing {
namespace {

// All sizes differ where they can, so that a wrong letter is a wrong number.
ModelConfig TourModel() {
  ModelConfig c = TinyConfig();
  c.num_hidden_layers = 2;  // one dense, one MoE: the tour's
  c.hidden_size = 40;
  c.num_attention_heads = 8;
  c.q_lora_rank = 18;
  c.kv_lora_rank = 12;
  c.qk_nope_head_dim = 6;
  c.v_head_dim = 5;
  c.vocab_size = 64;
  c.intermediate_size = 48;
  c.moe_intermediate_size = 14;
  c.index_n_heads = 3;
  c.index_head_dim = 10;
  c.index_topk = 9;
  return c;
}

StageConfig TourStage(AttentionMode attention, TrainMode train) {
  StageConfig stage = DefaultStageConfig();
  stage.name = "tour";
  stage.attention = attention;
  stage.train = train;
  stage.dsa.kernel = AttentionKernel::kSparse;
  stage.steps = 1;
  stage.global_batch_size = 1;
  stage.data.seq_length = 32;
  stage.recompute = Recompute::kNone;
  stage.optimizer.lr = 1e-3;
  stage.parallelism.tensor = stage.parallelism.context = stage.parallelism.pipeline = 2;
  stage.parallelism.expert = 4;
  stage.parallelism.layer_split = {1, 1};
  return stage;
}
// ---- The comparison ----------------------------------------------------------------------------

using Letters = std::map<std::string, int64_t>;

// "[R A, D]" -> the numbers: an element is a product of letters and numbers.
Shape Evaluate(const std::string& text, const Letters& letters) {
  CHECK(text.size() > 2 && text.front() == '[' && text.back() == ']') << text;
  Shape shape;
  for (absl::string_view element : absl::StrSplit(text.substr(1, text.size() - 2), ", ")) {
    shape.push_back(1);
    for (absl::string_view factor : absl::StrSplit(element, ' ')) {
      int64_t value = 0;
      if (!absl::SimpleAtoi(factor, &value)) {
        const auto found = letters.find(std::string(factor));
        CHECK(found != letters.end()) << "letter " << std::string(factor) << " in " << text;
        value = found->second;
      }
      shape.back() *= value;
    }
  }
  return shape;
}

int64_t Bytes(const TourRow& row, const Shape& shape) {
  return NumElements(shape) * (row.tensor.find("ids") != std::string::npos ? 4 : 8);
}

// Every tensor of the rows has its shape, and the rows' collectives are those of the phase.
void ExpectRows(const std::vector<TourRow>& rows, const TourPhase& record, Letters letters,
                const std::string& prefix) {
  EXPECT_FALSE(rows.empty());
  std::map<std::string, std::vector<TourCall>> expected;
  for (const TourRow& row : rows) {
    SCOPED_TRACE(row.tensor);
    const Shape shape = Evaluate(row.letters, letters);
    // N is the routing's; the document says so by the letter.
    Letters names = letters;
    names["N"] = -1;
    if (row.numbers.find('N') == std::string::npos) {
      EXPECT_EQ(Evaluate(row.numbers, {}), shape) << row.letters;
    } else {
      EXPECT_EQ(Evaluate(row.numbers, names), Evaluate(row.letters, names));
    }
    const auto found = record.tensors.find(row.tensor);
    if (found != record.tensors.end()) {
      EXPECT_EQ(ShapeString(found->second.shape()), ShapeString(shape));
    }
    EXPECT_TRUE(found != record.tensors.end() || !row.operation.empty())
        << "neither kept nor sent in this phase";
    if (!row.operation.empty())
      expected[row.axis].push_back({row.operation, row.label, Bytes(row, shape)});
  }
  for (const auto& [axis, calls] : record.calls) {
    for (const TourCall& call : calls) {
      if (!expected.count(axis)) ADD_FAILURE() << axis << " not in the table: " << call.label;
    }
  }
  for (const auto& [axis, calls] : expected) {
    const auto found = record.calls.find(axis);
    ASSERT_TRUE(found != record.calls.end()) << "nothing crossed " << axis;
    ASSERT_EQ(found->second.size(), calls.size()) << axis;
    for (size_t i = 0; i < calls.size(); ++i) {
      const TourCall& call = found->second[i];
      EXPECT_EQ(call.operation, calls[i].operation) << call.label;
      EXPECT_EQ(std::string(absl::StripPrefix(call.label, prefix)), calls[i].label);
      EXPECT_EQ(call.bytes, calls[i].bytes) << call.label;
    }
  }
}

class ParallelTour : public ::testing::Test {
 protected:
  // One step, forward and backward, with a look after each phase.
  void Run(AttentionMode attention, TrainMode train) {
    const StageConfig stage = TourStage(attention, train);
    ASSERT_OK_AND_ASSIGN(const Recipe recipe, MakeRecipe(stage, model_));
    ASSERT_OK_AND_ASSIGN(layout_, MakeStageLayout(stage, model_, recipe, world_->size()));
    axes_ = SplitGrid(*world_, layout_.grid, layout_.embedding_stages, layout_.expert_node_size);
    Model model(model_, layout_.PartsOf(axes_.pp->rank()), recipe.use_indexer,
                layout_.PlacementOf(world_->rank()), store_);
    store_.Allocate(context_, DType::kF64, axes_, recipe.trained);
    FillParameters();
    Optimizer optimizer(context_, store_, stage.optimizer, recipe.trained, axes_, *world_);
    optimizer.BeginStep();
    recorder_.emplace(axes_);
    MakeTourBatch();
    PassOptions pass{.scales = {.lm = 1, .mtp = 0.1, .kl = 1, .balance = 1e-2}};
    if (recipe.forward_only) pass.scales.balance = 0;
    StepStats stats = StepStats::Zeros(context_, 3, model_.n_routed_experts);
    const RopeTable rope = MakeModelRope(context_, model_, DType::kF64, 32);
    const ModelContext model_context{context_, model_, recipe.options, store_, rope, axes_};
    TourWork work(model_context, model.parts()[0], batch_, pass, recipe.forward_only, stats,
                  *recorder_);
    ASSERT_OK_AND_ASSIGN(const CheckedSchedule schedule, MakeCheckedSchedule(layout_.schedule));
    RunPipeline(schedule.schedule.programs[axes_.pp->rank()], layout_.part_rank, *axes_.pp, work);
    recorder_->Take("Messages");
    optimizer.ReduceGradients();
    recorder_->Take("Parameters");
  }

  void FillParameters() {
    for (const Parameter& p : store_.parameters()) {
      const RandomStream random(5, NameStream(p.name));
      for (int64_t i = 0; i < p.num_elements(); ++i)
        store_.value(p.id).data<double>()[i] =
            (static_cast<double>(random.Integer(i) % 1000) - 499.5) / 1000;
    }
  }

  void MakeTourBatch() {
    Sample sample{.document_begins = {0}};
    for (int i = 0; i <= 32; ++i) sample.tokens.push_back((i * 7 + 3) % 64);
    batch_ = MakeBatch(context_, MakeMicrobatch({sample}, /*document_mask=*/false),
                       layout_.RowShareOf(world_->rank()));
  }

  // As in the document's legend.
  Letters Sizes(int64_t rows_at_experts) const {
    const int64_t tp = layout_.grid.tp_size();
    return {{"T", batch_.num_keys()},
            {"R", batch_.num_rows()},
            {"G", batch_.num_group_rows()},
            {"D", model_.hidden_size},
            {"H", model_.num_attention_heads / tp},
            {"q", model_.q_lora_rank},
            {"c", model_.kv_lora_rank},
            {"r", model_.qk_rope_head_dim},
            {"C", model_.kv_lora_rank + model_.qk_rope_head_dim},
            {"Q", model_.qk_nope_head_dim + model_.qk_rope_head_dim},
            {"n", model_.qk_nope_head_dim},
            {"V", model_.v_head_dim},
            {"I", model_.index_n_heads},
            {"J", model_.index_head_dim},
            {"K", model_.index_topk},
            {"E", model_.n_routed_experts},
            {"L", model_.n_routed_experts / layout_.grid.ep_size()},
            {"A", model_.num_experts_per_tok},
            {"F", model_.moe_intermediate_size},
            {"S", model_.n_shared_experts * model_.moe_intermediate_size / tp},
            {"W", model_.vocab_size / tp},
            {"B", batch_.num_sequences},
            {"P", tp},
            {"ep", layout_.grid.ep_size()},
            {"N", rows_at_experts}};
  }

  void ExpectPhase(const std::string& phase, const std::vector<TourRow>& rows) {
    SCOPED_TRACE(absl::StrCat("rank ", world_->rank(), ", ", phase));
    ExpectRows(rows, (*recorder_)[phase], Sizes(rows_at_experts_), kLayerPrefix);
  }

  // N of this rank, and all ranks of the stage together have every (token, expert) pair once.
  void FindRowsAtExperts(const std::string& phase) {
    const auto& tensors = (*recorder_)[phase].tensors;
    const auto found = tensors.find("saved.moe.experts.rows_ND");
    ASSERT_TRUE(found != tensors.end());
    rows_at_experts_ = found->second.dim(0);
    const Tensor sum = IntTensor(context_, {static_cast<int32_t>(rows_at_experts_)});
    axes_.ep->AllReduce("test", sum);
    EXPECT_EQ(sum.data<int32_t>()[0], batch_.num_keys() * model_.num_experts_per_tok);
  }

  std::vector<TourRow> Messages() {
    std::vector<TourRow> own;
    for (const TourRow& row : tables_["Messages"]) {
      if (row.label[0] - '0' == axes_.pp->rank()) own.push_back(row);
    }
    return own;
  }

  std::unique_ptr<Communicator> world_ = WrapMpiWorld();
  TourTables tables_ = ReadTourTables();
  ModelConfig model_ = TourModel();
  Context context_ = Context::Cpu();
  StageLayout layout_;
  GridCommunicators axes_;
  ParameterStore store_;
  Batch batch_;
  std::optional<TourRecorder> recorder_;
  int64_t rows_at_experts_ = 0;
};

std::vector<TourRow> Joined(const std::vector<std::vector<TourRow>>& lists) {
  std::vector<TourRow> all;
  for (const std::vector<TourRow>& rows : lists) all.insert(all.end(), rows.begin(), rows.end());
  return all;
}

TEST_F(ParallelTour, SparseStepIsWhatTheDocumentSays) {
  Run(AttentionMode::kSparse, TrainMode::kAll);
  ExpectPhase("Messages", Messages());
  if (axes_.pp->rank() == 0) return ExpectPhase("Embedding", tables_["Embedding"]);
  FindRowsAtExperts("Forward: experts");
  for (const char* phase : kTourPhases) {
    for (const char* direction : {"Forward: ", "Backward: "})
      ExpectPhase(absl::StrCat(direction, phase), tables_[absl::StrCat(direction, phase)]);
  }
  // The MTP module looks its tokens up, and asks the head once more.
  std::vector<TourRow> lookup = tables_["Embedding"];
  lookup.erase(std::remove_if(lookup.begin(), lookup.end(),
                              [](const TourRow& row) { return row.operation.empty(); }),
               lookup.end());
  ExpectPhase("Head", Joined({tables_["Head"], lookup, tables_["Head"]}));
  ExpectPhase("Weights", tables_["Weights"]);
}

TEST_F(ParallelTour, WarmUpIsWhatTheDocumentSays) {
  Run(AttentionMode::kDense, TrainMode::kIndexer);
  EXPECT_EQ(layout_.grid.tp_size(), 1);
  EXPECT_EQ(layout_.grid.cp_size(), 4);
  if (axes_.pp->rank() == 0) return;
  FindRowsAtExperts("Warm-up: experts");
  ExpectPhase("Warm-up: attention", tables_["Warm-up: attention"]);
  // Behind the attention all is as in the sparse stage, with tp 1.
  std::map<std::string, std::vector<TourCall>> steps;
  for (const char* phase : kTourPhases) {
    for (const auto& [axis, calls] : (*recorder_)[absl::StrCat("Warm-up: ", phase)].calls)
      steps[axis].insert(steps[axis].end(), calls.begin(), calls.end());
  }
  for (const auto& [axis, calls] : steps) {
    std::vector<TourCall> real = (*recorder_)["the real warm-up"].calls.at(axis);
    ASSERT_GE(real.size(), calls.size()) << axis;
    for (size_t i = 0; i < calls.size(); ++i) {
      EXPECT_EQ(real[i].label, calls[i].label);
      EXPECT_EQ(real[i].bytes, calls[i].bytes) << real[i].label;
    }
  }
}

// Which axis the gradients of a parameter cross, and which part of it a rank holds.
TEST_F(ParallelTour, ParametersLieWhereTheDocumentSays) {
  Run(AttentionMode::kSparse, TrainMode::kAll);
  EXPECT_GE(tables_["Parameters"].size(), 10u);
  for (const TourRow& row : tables_["Parameters"]) {
    SCOPED_TRACE(row.tensor);
    EXPECT_EQ(Evaluate(row.numbers, {}), Evaluate(row.letters, Sizes(0)));
    std::string name = row.tensor;
    const size_t expert = name.find("{e}");
    if (expert != std::string::npos)
      name.replace(expert, 3, std::to_string(axes_.ep->rank() * Sizes(0)["L"]));
    if (!absl::StartsWith(name, "model.")) name = absl::StrCat(kLayerPrefix, name);
    if (name == absl::StrCat(kLayerPrefix, "lm_head.weight")) name = "lm_head.weight";
    const int id = store_.Find(name);
    if (axes_.pp->rank() == 0 && id < 0) continue;  // the layer of the tour is on the other stage
    ASSERT_GE(id, 0) << name;
    const Parameter& p = store_.at(id);
    EXPECT_EQ(ShapeString(store_.value(id).shape()), ShapeString(Evaluate(row.letters, Sizes(0))));
    EXPECT_EQ(AxisOf(p.group, axes_).name(), row.axis);
    const int64_t bytes = store_.bucket_gradients(p.bucket).bytes();
    const std::vector<TourCall>& calls = (*recorder_)["Parameters"].calls.at(row.axis);
    EXPECT_TRUE(std::any_of(calls.begin(), calls.end(), [&](const TourCall& call) {
      return call.operation == row.operation && call.label == row.label && call.bytes == bytes;
    }));
  }
}

// The messages that the document shows for layouts that cannot be.
TEST(ParallelLimits, AreRefusedInTheDocumentsWords) {
  ASSERT_OK_AND_ASSIGN(const std::string document, ReadFile("docs/parallelism.md", 1 << 20));
  struct Case {
    int ranks, tensor, pipeline, context, expert;
    int64_t seq_length = 128, global_batch_size = 8;
  };
  for (const Case& c : std::vector<Case>{{12, 2, 2, 2, 1},
                                         {8, 2, 2, 2, 3},
                                         {3, 3, 1, 1, 1},
                                         {4, 2, 1, 2, 1, /*seq_length=*/100},
                                         {4, 1, 1, 1, 1, 128, /*global_batch_size=*/6}}) {
    StageConfig stage = TourStage(AttentionMode::kSparse, TrainMode::kAll);
    stage.name = "sparse";
    stage.parallelism.layer_split.clear();
    stage.parallelism.tensor = c.tensor;
    stage.parallelism.pipeline = c.pipeline;
    stage.parallelism.context = c.context;
    stage.parallelism.expert = c.expert;
    stage.data.seq_length = c.seq_length;
    stage.global_batch_size = c.global_batch_size;
    ModelConfig model = TourModel();
    model.num_attention_heads = 128;
    ASSERT_OK_AND_ASSIGN(const Recipe recipe, MakeRecipe(stage, model));
    const absl::Status status = MakeStageLayout(stage, model, recipe, c.ranks).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    const std::string message = absl::StrCat("`", status.message(), "`");
    EXPECT_NE(document.find(message), std::string::npos) << "not in the document: " << message;
  }
}

}  // namespace
}  // namespace baleen::testing
