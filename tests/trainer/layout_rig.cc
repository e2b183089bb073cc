#include "tests/trainer/layout_rig.h"

#include <cmath>

#include "checkpoints/hf_init.h"
#include "kernels/core/random.h"
#include "parallel/pipeline_engine.h"
#include "tests/support/random_tensor.h"
#include "trainer/make_batch.h"

namespace baleen::testing {
namespace {

Sample MakeSample(const RigCase& c, int64_t index) {
  const RandomStream random(7, NameStream(absl::StrCat("sample ", index)));
  Sample sample;
  for (int64_t i = 0; i <= c.stage.data.seq_length; ++i) {
    sample.tokens.push_back(
        static_cast<int32_t>(random.Integer(i) % static_cast<uint64_t>(c.model.vocab_size)));
  }
  sample.document_begins = {0};
  for (int32_t at : {5 + static_cast<int32_t>(index) % 3, 17})
    if (c.document_mask && at < c.stage.data.seq_length) sample.document_begins.push_back(at);
  return sample;
}

// "experts.3." -> "experts.<place>.": whose initial values an expert's slot takes.
std::string SourceName(const RigCase& c, const std::string& name) {
  const size_t at = name.find(".experts.");
  if (c.expert_order.empty() || at == std::string::npos) return name;
  const size_t begin = at + 9, end = name.find('.', begin);
  const int slot = std::stoi(name.substr(begin, end - begin));
  return name.substr(0, begin) + std::to_string(c.expert_order[slot]) + name.substr(end);
}

void Permute(const RigCase& c, const Parameter& p) {
  const bool gate = p.name.find("mlp.gate.") != std::string::npos;
  if (c.expert_order.empty() || !gate) return;
  const int64_t experts = p.value.dim(0), width = p.value.num_elements() / experts;
  const std::vector<double> before = ToDoubles(p.value);
  for (int64_t slot = 0; slot < experts; ++slot) {
    for (int64_t i = 0; i < width; ++i)
      p.value.data<double>()[slot * width + i] = before[c.expert_order[slot] * width + i];
  }
}

void FillParameters(const RigCase& c, const ParameterStore& store) {
  const InitOptions init{.seed = 3, .standard_deviation = c.model.initializer_range};
  for (const CatalogEntry& entry : TensorCatalog(c.model, {.with_indexer = true})) {
    for (const Parameter& p : store.parameters()) {
      if (SourceName(c, p.name) != entry.name) continue;
      FillInitial(entry, init, p.box, p.value.dtype(), p.value.raw());
      if (p.name.find("e_score_correction_bias") != std::string::npos)
        p.value.data<double>()[0] += c.first_expert_bias;
      Permute(c, p);
    }
  }
}

struct Microbatches {
  std::vector<Batch> batches;
  LossScales scales;
};

Microbatches MakeMicrobatches(const RigCase& c, const Recipe& recipe, const StageLayout& layout,
                              const Context& context, int world_rank) {
  Microbatches made;
  int64_t targets = 0, mtp_targets = 0, rows = 0;
  const int64_t micro = c.stage.micro_batch_size, dp = layout.grid.dp_size();
  const ProcessGrid::Coordinates at = layout.grid.At(world_rank);
  for (int64_t first = 0; first < c.stage.global_batch_size; first += micro) {
    std::vector<Sample> samples;
    for (int64_t b = first; b < first + micro; ++b)
      samples.push_back(MakeSample(c, c.sample_order.empty() ? b : c.sample_order[b]));
    const Microbatch microbatch = MakeMicrobatch(samples, c.document_mask);
    targets += microbatch.num_targets;
    mtp_targets += microbatch.num_mtp_targets;
    rows += microbatch.num_samples * microbatch.seq_length;
    if (first / micro % dp != at.dp) continue;
    made.batches.push_back(MakeBatch(context, microbatch, layout.RowShareOf(world_rank)));
  }
  made.scales = {.lm = 1.0 / static_cast<double>(targets),
                 .mtp = recipe.mtp_weight / static_cast<double>(mtp_targets),
                 .kl = recipe.indexer_weight / static_cast<double>(rows),
                 .balance = recipe.balance_weight / static_cast<double>(c.stage.global_batch_size)};
  return made;
}

std::vector<double> Summed(Communicator& world, const Tensor& tensor) {
  world.AllReduce("test", tensor);
  return ToDoubles(tensor);
}

std::vector<int64_t> SummedInts(Communicator& world, const Tensor& tensor) {
  world.AllReduce("test", tensor);
  const int64_t* data = tensor.data<int64_t>();
  return {data, data + tensor.num_elements()};
}

void ReadStats(Communicator& world, const StepStats& stats, StepOutcome& outcome) {
  outcome.lm_loss = Summed(world, stats.lm_loss_1)[0];
  outcome.mtp_loss = Summed(world, stats.mtp_loss_1)[0];
  outcome.balance = Summed(world, stats.balance_1)[0];
  outcome.kl = Summed(world, stats.kl_L);
  outcome.mass = Summed(world, stats.mass_L);
  outcome.recall = Summed(world, stats.recall_L);
  outcome.ties = Summed(world, stats.ties_L);
  outcome.expert_counts = SummedInts(world, stats.expert_counts_LE);
  outcome.selection_hash = SummedInts(world, stats.selection_hash_L);
}

// Each group's shards are gathered over its axis: afterwards every rank has the whole sum of what
// it holds.
void ReadGradients(Optimizer& optimizer, const ParameterStore& store, StepOutcome& outcome) {
  for (const OptimizerShard& shard : optimizer.shards()) {
    const Tensor& grad = store.buffer(shard.group).grad;
    const Bucket& bucket = store.buckets()[shard.bucket];
    shard.axis->AllGather("test gradients", grad.Flat(shard.begin, shard.count),
                          grad.Flat(bucket.begin, bucket.count));
  }
  for (const Parameter& p : store.parameters()) {
    if (!p.grad.empty()) outcome.gradients.push_back({p.name, p.box, ToDoubles(p.grad)});
  }
}

void ReadValues(Optimizer& optimizer, const ParameterStore& store, double lr,
                StepOutcome& outcome) {
  optimizer.Update(lr, /*step=*/1);
  optimizer.GatherParameters();
  for (const Parameter& p : store.parameters())
    outcome.values.push_back({p.name, p.box, ToDoubles(p.value)});
}

// A pass without backward: the losses of each row, by its place in the microbatch.
absl::Status ReadValidation(const ModelContext& model_context, const Model& model,
                            const StageLayout& layout, const Microbatches& step,
                            Communicator& world, StepOutcome& outcome) {
  ScheduleSpec spec = layout.schedule;
  spec.forward_only = true;
  ASSIGN_OR_RETURN(const CheckedSchedule schedule, MakeCheckedSchedule(spec));
  Communicator& pp = *model_context.axes.pp;
  PassOptions pass;
  pass.train = false;
  StepStats stats =
      StepStats::Zeros(model_context.context, model_context.config.num_hidden_layers + 1,
                       model_context.config.n_routed_experts);
  const int64_t rows = step.batches.front().num_keys();
  const Tensor sums_2T = model_context.context.Zeros(DType::kF64, {2, rows});
  ModelWork work(model_context, model, step.batches, pass, PassKind::kValidate, stats);
  work.set_loss_reader([&](const Batch& batch, const Tensor& loss_R) {
    for (int64_t r = 0; r < batch.num_rows(); ++r) {
      const int32_t row = batch.row_R.data<int32_t>()[r];
      if (batch.host.target_G[batch.host.own_begin + r] < 0) continue;
      sums_2T.data<double>()[row] += loss_R.data<double>()[r];
      sums_2T.data<double>()[rows + row] += 1;
    }
  });
  RunPipeline(schedule.schedule.programs[pp.rank()], layout.part_rank, pp, work);
  const std::vector<double> sums = Summed(world, sums_2T);
  outcome.validation_loss.assign(sums.begin(), sums.begin() + rows);
  outcome.validation_targets.assign(sums.begin() + rows, sums.end());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<StepOutcome> RunOneStep(const RigCase& c, Communicator& world) {
  Context context = Context::Cpu();
  ASSIGN_OR_RETURN(Recipe recipe, MakeRecipe(c.stage, c.model));
  ASSIGN_OR_RETURN(const StageLayout layout,
                   MakeStageLayout(c.stage, c.model, recipe, world.size()));
  recipe.options.expert_rows = c.expert_rows >= 0 ? c.expert_rows : layout.expert_rows;
  if (c.attention_chunk > 0) recipe.options.attention_chunk = c.attention_chunk;
  ASSIGN_OR_RETURN(const CheckedSchedule schedule, MakeCheckedSchedule(layout.schedule));
  const GridCommunicators axes =
      SplitGrid(world, layout.grid, layout.embedding_stages, layout.expert_node_size);

  ParameterStore store;
  const Model model(c.model, layout.PartsOf(axes.pp->rank()), recipe.use_indexer,
                    layout.PlacementOf(world.rank()), store);
  store.Allocate(context, DType::kF64, axes, recipe.trained, c.bucket_elements);
  FillParameters(c, store);
  Optimizer optimizer(context, store, c.stage.optimizer, recipe.trained, axes, world);
  const RopeTable rope = MakeModelRope(context, c.model, DType::kF64, c.stage.data.seq_length);

  const Microbatches step = MakeMicrobatches(c, recipe, layout, context, world.rank());
  PassOptions pass;
  pass.scales = step.scales;
  pass.measure_indexer = c.measure_indexer;
  StepStats stats =
      StepStats::Zeros(context, c.model.num_hidden_layers + 1, c.model.n_routed_experts);
  const ModelContext model_context{context, c.model, recipe.options, store, rope, axes};
  StepOutcome outcome;
  if (c.validate) {
    RETURN_IF_ERROR(ReadValidation(model_context, model, layout, step, world, outcome));
  }
  ModelWork work(model_context, model, step.batches, pass,
                 recipe.forward_only ? PassKind::kWarmUp : PassKind::kTrain, stats);
  optimizer.ZeroGradients();
  work.set_gradients_ready([&](int first, int end) { optimizer.GradientsReady(first, end); });
  RunPipeline(schedule.schedule.programs[axes.pp->rank()], layout.part_rank, *axes.pp, work);

  ReadStats(world, stats, outcome);
  optimizer.ReduceGradients();
  optimizer.ComputeNorms();
  outcome.norm_main = optimizer.Norm(ClipGroup::kMain).value_or(0);
  outcome.norm_indexer = optimizer.Norm(ClipGroup::kIndexer).value_or(0);
  ReadGradients(optimizer, store, outcome);
  ReadValues(optimizer, store, c.stage.optimizer.lr, outcome);
  return outcome;
}

}  // namespace baleen::testing
