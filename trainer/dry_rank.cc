#include "trainer/dry_rank.h"

#include <algorithm>
#include <set>

#include "data/loader.h"
#include "trainer/make_batch.h"
#include "trainer/optimizer.h"
#include "trainer/pretend_grid.h"
#include "trainer/training_stage.h"

namespace baleen {
namespace {

void AddMessages(const CommunicationLog& more, int64_t times, CommunicationLog& sum) {
  for (const auto& [key, count] : more.counts) {
    CommunicationLog::Count& entry = sum.counts[key];
    entry.calls += times * count.calls;
    entry.bytes_sent += times * count.bytes_sent;
  }
}

double Flops(const OpCounter& counter) {
  double flops = 0;
  for (const auto& [op, count] : counter.ops) flops += count.flops;
  return flops;
}

Microbatch EmptyMicrobatch(const StageConfig& stage) {
  std::vector<Sample> samples(stage.micro_batch_size);
  for (Sample& sample : samples) {
    sample.tokens.assign(stage.data.seq_length + 1, 0);
    sample.document_begins = {0};
  }
  return MakeMicrobatch(samples, false);
}

// The rank's state, in the order in which TrainingStage and TrainStep make it.
class DryRank {
 public:
  explicit DryRank(const DryRankRequest& request)
      : request_(request),
        options_(request.recipe.options),
        rank_(request.world_rank),
        pipeline_rank_(request.layout.grid.At(rank_).pp),
        peaks_(context_.pool()) {
    options_.expert_rows = request.layout.expert_rows;
    const StageLayout& layout = request.layout;
    world_ = MakePretendCommunicator(rank_, layout.grid.world_size(), "world", &log_);
    axes_ = MakePretendGrid(layout.grid, rank_, layout.embedding_stages, layout.expert_node_size,
                            &log_);
    model_.emplace(request.model, layout.PartsOf(pipeline_rank_), request.recipe.use_indexer,
                   layout.PlacementOf(rank_), parameters_);
    parameters_.Allocate(context_, request.dtype, axes_, request.recipe.trained);
    rope_ = MakeModelRope(context_, request.model, request.dtype, request.stage.data.seq_length);
    optimizer_.emplace(context_, parameters_, request.stage.optimizer, request.recipe.trained,
                       axes_, *world_);
    between_steps_ = context_.pool().Uses();
    total_between_steps_ = context_.pool().Total();
  }

  RankPlan Run() {
    if (total_between_steps_.bytes > request_.most_bytes) return Result();
    MakeBatches();
    StepStats stats = StepStats::Zeros(
        context_, request_.model.num_hidden_layers + request_.model.num_nextn_predict_layers,
        request_.model.n_routed_experts);
    PassOptions pass;
    const Recipe& recipe = request_.recipe;
    pass.scales = {.lm = 1, .mtp = recipe.mtp_weight, .kl = 1, .balance = recipe.balance_weight};
    const ModelContext model{context_, request_.model, options_, parameters_, rope_, axes_};
    const PassKind kind = recipe.forward_only ? PassKind::kWarmUp : PassKind::kTrain;
    ModelWork work(model, *model_, batches_, pass, kind, stats);
    peaks_.Take();
    RunProgram(work);
    ReduceStats(stats);
    Update();
    return Result();
  }

 private:
  void MakeBatches() {
    const Tensor counts = context_.Zeros(DType::kI64, {4});
    const BytesByUse before = HeldBytes(context_.pool());
    const Batch batch =
        MakeBatch(context_, EmptyMicrobatch(request_.stage), request_.layout.RowShareOf(rank_));
    const int64_t bytes = Difference(HeldBytes(context_.pool()), before)[context_.use()];
    const int count = request_.layout.schedule.num_microbatches;
    for (int m = 1; m < count; ++m) {
      other_batches_.push_back(context_.pool().Allocate(bytes, context_.use()));
    }
    batches_.assign(std::max(2, count), batch);  // alike: one stands for all
    axes_.dp->AllReduce("batch counts", counts);
  }

  void RunProgram(ModelWork& work) {
    const int num_parts = request_.schedule.num_parts();
    const Program& program = request_.schedule.programs[pipeline_rank_];
    const Rehearsed rehearsed = Rehearse(work, program);
    PlannedWork planned(context_, work, rehearsed, num_parts, peaks_);
    RunPipeline(program, request_.schedule.part_rank, *axes_.pp, planned);
    for (const Action& action : program) {
      const auto found = rehearsed.counted.find(TypeOf(action));
      if (found == rehearsed.counted.end()) continue;  // a message
      AddMessages(found->second.messages, 1, log_);
      flops_ += Flops(found->second.ops);
    }
    actions_ = rehearsed.counted;
  }

  // Leaves no trace in the step's peaks and messages.
  Rehearsed Rehearse(ModelWork& work, const Program& program) {
    std::set<ActionType> both;
    for (const Action& action : program) {
      if (action.kind == ActionKind::kForwardBackward) both.insert(TypeOf(action));
    }
    const std::string makeup = Makeup(both);
    if (request_.memo != nullptr && request_.memo->count(makeup) > 0) {
      return Renumbered(request_.memo->at(makeup), [&](int index) { return layers()[index].part; });
    }
    Rehearsal rehearsal(context_, work, counter_, log_, request_.schedule.num_parts());
    CommunicationLog before = std::exchange(log_, {});
    for (const PartLayers& part : layers()) {
      request_.recipe.forward_only ? rehearsal.ForwardOnly(part.part) : rehearsal.Train(part.part);
    }
    for (const auto& [kind, part, backward_part] : both) rehearsal.Both(part, backward_part);
    peaks_.Restart();
    log_ = std::move(before);
    if (request_.memo != nullptr) {
      (*request_.memo)[makeup] =
          Renumbered(rehearsal.found, [&](int part) { return IndexOf(part); });
    }
    return std::move(rehearsal.found);
  }

  int IndexOf(int part) const {
    const std::vector<PartLayers> parts = layers();
    return static_cast<int>(std::find_if(parts.begin(), parts.end(),
                                         [&](const PartLayers& own) { return own.part == part; }) -
                            parts.begin());
  }

  // What decides the footprints of the rank's actions.
  std::string Makeup(const std::set<ActionType>& both) const {
    std::string text;
    for (const PartLayers& part : layers()) {
      absl::StrAppend(&text, part.first ? "embedding " : "");
      for (int64_t layer = part.begin; layer < part.end; ++layer) {
        absl::StrAppend(&text, request_.model.IsMoeLayer(layer) ? "moe " : "dense ");
      }
      absl::StrAppend(&text, part.last ? "head; " : "; ");
    }
    for (const auto& [kind, part, backward_part] : both) {
      absl::StrAppend(&text, IndexOf(part), "+", IndexOf(backward_part), " ");
    }
    return text;
  }

  template <typename Function>
  static Rehearsed Renumbered(const Rehearsed& from, Function number) {
    const auto renumber = [&](const ActionType& type) {
      const auto& [kind, part, backward_part] = type;
      return ActionType{kind, number(part), backward_part < 0 ? -1 : number(backward_part)};
    };
    Rehearsed to;
    for (const auto& [type, footprint] : from.footprints) to.footprints[renumber(type)] = footprint;
    for (const auto& [type, work] : from.counted) to.counted[renumber(type)] = work;
    return to;
  }

  void ReduceStats(StepStats& stats) {
    for (const Tensor* tensor :
         {&stats.lm_loss_1, &stats.mtp_loss_1, &stats.balance_1, &stats.kl_L,
          &stats.expert_counts_LE, &stats.mass_L, &stats.best_mass_L, &stats.recall_L,
          &stats.sampled_rows_L, &stats.ties_L, &stats.selection_hash_L, &stats.nan_rows_1}) {
      world_->AllReduce("step stats", *tensor);
    }
  }

  void Update() {
    reduction_ = Counted([&] {
      optimizer_->BeginStep();
      optimizer_->ReduceGradients();
      optimizer_->ComputeNorms();
    });
    update_ = Counted([&] { optimizer_->Update(request_.stage.optimizer.lr, 1); });
    peaks_.Take();
  }

  // What `work` does, its messages among those of the step.
  template <typename Function>
  CountedWork Counted(Function work) {
    counter_.ops.clear();
    const CommunicationLog before = std::exchange(log_, {});
    work();
    const CountedWork counted{counter_, log_};
    AddMessages(before, 1, log_);
    return counted;
  }

  RankPlan Result() const {
    RankPlan plan;
    plan.pipeline_rank = pipeline_rank_;
    plan.world_rank = rank_;
    plan.parts = layers();
    plan.uses = between_steps_;
    plan.total = total_between_steps_;
    for (const auto& [use, bytes] : peaks_.bytes()) {
      MemoryUse& memory = use.empty() ? plan.total : plan.uses[use];
      memory.peak_bytes = std::max(bytes, memory.peak_bytes);
    }
    plan.actions = actions_;
    plan.reduction = reduction_;
    plan.update = update_;
    plan.messages = log_;
    plan.flops = flops_;
    plan.spans = SpansOf(request_.layout);
    return plan;
  }

  std::vector<PartLayers> layers() const { return request_.layout.PartsOf(pipeline_rank_); }

  const DryRankRequest& request_;
  ModelOptions options_;
  const int rank_;
  const int pipeline_rank_;
  OpCounter counter_;
  CommunicationLog log_;
  Context context_ = Context::Dry(&counter_);
  std::unique_ptr<Communicator> world_;
  GridCommunicators axes_;
  ParameterStore parameters_;
  std::optional<Model> model_;
  RopeTable rope_;
  std::optional<Optimizer> optimizer_;
  std::vector<std::shared_ptr<Storage>> other_batches_;
  std::vector<Batch> batches_;
  Peaks peaks_;
  std::map<std::string, MemoryUse> between_steps_;
  MemoryUse total_between_steps_;
  std::map<ActionType, CountedWork> actions_;
  CountedWork reduction_, update_;
  double flops_ = 0;
};

}  // namespace

RankPlan RunDry(const DryRankRequest& request) { return DryRank(request).Run(); }

}  // namespace baleen
