#include "tests/trainer/layout_rig.h"

#include <cmath>

#include "checkpoints/hf_init.h"
#include "kernels/core/random.h"
#include "kernels/core/transfer.h"
#include "kernels/ops/elementwise.h"
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

template <typename T>
void AdjustGate(const RigCase& c, const Parameter& p, const Tensor& value) {
  T* const data = value.data<T>();
  if (p.name.find("e_score_correction_bias") != std::string::npos)
    data[0] += static_cast<T>(c.first_expert_bias);
  const bool gate = p.name.find("mlp.gate.") != std::string::npos;
  if (c.expert_order.empty() || !gate) return;
  const int64_t experts = value.dim(0), width = value.num_elements() / experts;
  const std::vector<T> before(data, data + value.num_elements());
  for (int64_t slot = 0; slot < experts; ++slot)
    std::copy_n(&before[c.expert_order[slot] * width], width, data + slot * width);
}

void FillParameters(const RigCase& c, const ParameterStore& store, const RigBackend& backend,
                    Optimizer& optimizer) {
  const InitOptions init{.seed = 3, .standard_deviation = c.model.initializer_range};
  const Context host = Context::Cpu();
  for (const CatalogEntry& entry : TensorCatalog(c.model, {.with_indexer = true})) {
    for (int id = 0; id < store.size(); ++id) {
      const Parameter& p = store.at(id);
      if (SourceName(c, p.name) != entry.name) continue;
      Tensor value = host.Empty(StatisticsOf(backend.dtype), p.box.extent);
      FillInitial(entry, init, p.box, value.dtype(), value.raw());
      if (backend.dtype == DType::kF64) {
        AdjustGate<double>(c, p, value);
      } else {
        AdjustGate<float>(c, p, value);
      }
      if (backend.bf16_weights && p.group != ParameterGroup::kBuffer)
        value = Cast(host, Cast(host, value, DType::kBF16), value.dtype());
      optimizer.SetValues(id, 0, value, Optimizer::Origin::kSource);
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
    made.batches.back().number = first / micro;
  }
  made.scales = {.lm = 1.0 / static_cast<double>(targets),
                 .mtp = recipe.mtp_weight / static_cast<double>(mtp_targets),
                 .kl = recipe.indexer_weight / static_cast<double>(rows),
                 .balance = recipe.balance_weight / static_cast<double>(c.stage.global_batch_size)};
  return made;
}

// Over all ranks, on the host.
Tensor Summed(const Context& context, Communicator& world, const Tensor& tensor) {
  const Tensor sum = CopyToHost(context, tensor);
  world.AllReduce("test", sum);
  return sum;
}

void ReadStats(const Context& context, Communicator& world, const StepStats& stats,
               StepOutcome& outcome) {
  const auto doubles = [&](const Tensor& tensor) {
    return ToDoubles(Summed(context, world, tensor));
  };
  const auto integers = [&](const Tensor& tensor) {
    const Tensor sum = Summed(context, world, tensor);
    const int64_t* data = sum.data<int64_t>();
    return std::vector<int64_t>(data, data + sum.num_elements());
  };
  outcome.lm_loss = doubles(stats.lm_loss_1)[0];
  outcome.mtp_loss = doubles(stats.mtp_loss_1)[0];
  outcome.balance = doubles(stats.balance_1)[0];
  outcome.kl = doubles(stats.kl_L);
  outcome.mass = doubles(stats.mass_L);
  outcome.recall = doubles(stats.recall_L);
  outcome.ties = doubles(stats.ties_L);
  outcome.expert_counts = integers(stats.expert_counts_LE);
  outcome.selection_hash = integers(stats.selection_hash_L);
}

// Values or gradients on the host, one copy a bucket.
class HostBuckets {
 public:
  template <typename Pick>
  HostBuckets(const Context& context, const ParameterStore& store, Pick pick) : store_(store) {
    for (size_t index = 0; index < store.buckets().size(); ++index) {
      const Tensor bucket = pick(static_cast<int>(index));
      buckets_.push_back(bucket.empty() ? Tensor() : CopyToHost(context, bucket));
    }
  }
  Tensor Of(const Parameter& p) const {
    const int64_t first = p.begin - store_.buckets()[p.bucket].begin;
    return buckets_[p.bucket].Flat(first, p.num_elements());
  }

 private:
  const ParameterStore& store_;
  std::vector<Tensor> buckets_;
};

// Each group's shards are gathered over its axis: afterwards every rank has the whole sum of what
// it holds.
void ReadGradients(const Context& context, Optimizer& optimizer, const ParameterStore& store,
                   StepOutcome& outcome) {
  for (const OptimizerShard& shard : optimizer.shards()) {
    if (!shard.trains()) continue;
    const Tensor gradients = store.bucket_gradients(shard.bucket);
    const int64_t first = shard.begin - store.buckets()[shard.bucket].begin;
    shard.axis->AllGather("test gradients", gradients.Flat(first, shard.count), gradients);
  }
  const HostBuckets host(context, store,
                         [&](int bucket) { return store.bucket_gradients(bucket); });
  for (const Parameter& p : store.parameters()) {
    if (store.trains(p.id)) outcome.gradients.push_back({p.name, p.box, ToDoubles(host.Of(p))});
  }
}

// What the model computes with; of rounded ones that train, the masters of all ranks of the axis.
std::vector<StepOutcome::Piece> ReadValues(const Context& context, const Optimizer& optimizer,
                                           const ParameterStore& store, bool* rounded_masters) {
  const HostBuckets host(context, store, [&](int bucket) { return store.bucket_values(bucket); });
  std::vector<StepOutcome::Piece> pieces;
  for (const Parameter& p : store.parameters())
    pieces.push_back({p.name, p.box, ToDoubles(host.Of(p))});
  for (const OptimizerShard& shard : optimizer.shards()) {
    const Bucket& bucket = store.buckets()[shard.bucket];
    if (!shard.trains() || shard.master.dtype() == store.bucket_values(shard.bucket).dtype())
      continue;
    const Tensor masters = context.Empty(shard.master.dtype(), {bucket.count});
    shard.axis->AllGather("test masters", shard.master, masters);
    const Tensor on_host = CopyToHost(context, masters);
    for (const int id : bucket.parameters) {
      const Parameter& p = store.at(id);
      const Tensor master = on_host.Flat(p.begin - bucket.begin, p.num_elements());
      const Tensor rounded = Cast(Context::Cpu(), master, host.Of(p).dtype());
      if (!SameBits(rounded, host.Of(p))) *rounded_masters = false;
      pieces[id].values = ToDoubles(master);
    }
  }
  return pieces;
}

std::vector<StepOutcome::Piece> Difference(const std::vector<StepOutcome::Piece>& after,
                                           const std::vector<StepOutcome::Piece>& before) {
  std::vector<StepOutcome::Piece> difference = after;
  for (size_t p = 0; p < after.size(); ++p) {
    for (size_t i = 0; i < after[p].values.size(); ++i)
      difference[p].values[i] -= before[p].values[i];
  }
  return difference;
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
  const Context& context = model_context.context;
  StepStats stats = StepStats::Zeros(context, model_context.config.num_hidden_layers + 1,
                                     model_context.config.n_routed_experts);
  const int64_t rows = step.batches.front().num_keys();
  const Tensor sums_2T = Context::Cpu().Zeros(DType::kF64, {2, rows});
  ModelWork work(model_context, model, step.batches, pass, PassKind::kValidate, stats);
  work.set_loss_reader([&](const Batch& batch, const Tensor& loss_R) {
    const std::vector<double> losses = ToDoubles(CopyToHost(context, loss_R));
    for (int64_t r = 0; r < batch.num_rows(); ++r) {
      const int32_t row = batch.host.row_G[batch.host.own_begin + r];
      if (batch.host.target_G[batch.host.own_begin + r] < 0) continue;
      sums_2T.data<double>()[row] += losses[r];
      sums_2T.data<double>()[rows + row] += 1;
    }
  });
  RunPipeline(schedule.schedule.programs[pp.rank()], layout.part_rank, pp, work);
  world.AllReduce("test", sums_2T);
  const std::vector<double> sums = ToDoubles(sums_2T);
  outcome.validation_loss.assign(sums.begin(), sums.begin() + rows);
  outcome.validation_targets.assign(sums.begin() + rows, sums.end());
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<GridCommunicators> SplitForCase(const RigCase& c, Communicator& world) {
  ASSIGN_OR_RETURN(const Recipe recipe, MakeRecipe(c.stage, c.model));
  ASSIGN_OR_RETURN(const StageLayout layout,
                   MakeStageLayout(c.stage, c.model, recipe, world.size()));
  return SplitGrid(world, layout.grid, layout.embedding_stages, layout.expert_node_size);
}

absl::StatusOr<StepOutcome> RunOneStep(const RigCase& c, Communicator& world,
                                       const RigBackend& backend) {
  Context context = backend.context;
  ASSIGN_OR_RETURN(Recipe recipe, MakeRecipe(c.stage, c.model, context.device().kind));
  ASSIGN_OR_RETURN(const StageLayout layout,
                   MakeStageLayout(c.stage, c.model, recipe, world.size()));
  recipe.options.expert_rows = c.expert_rows >= 0 ? c.expert_rows : layout.expert_rows;
  if (c.row_chunk > 0) recipe.options.attention_chunk = recipe.options.mlp_chunk = c.row_chunk;
  ASSIGN_OR_RETURN(const CheckedSchedule schedule, MakeCheckedSchedule(layout.schedule));
  GridCommunicators own_axes;
  if (backend.axes == nullptr) {
    own_axes = SplitGrid(world, layout.grid, layout.embedding_stages, layout.expert_node_size);
  }
  const GridCommunicators& axes = backend.axes == nullptr ? own_axes : *backend.axes;

  ParameterStore store;
  const Model model(c.model, layout.PartsOf(axes.pp->rank()), recipe.use_indexer,
                    layout.PlacementOf(world.rank()), store);
  store.Allocate(context, backend.dtype, axes, recipe.trained, c.bucket_elements);
  Optimizer optimizer(context, store, c.stage.optimizer, recipe.trained, axes, world);
  FillParameters(c, store, backend, optimizer);
  const RopeTable rope = MakeModelRope(context, c.model, backend.dtype, c.stage.data.seq_length);

  const Microbatches step = MakeMicrobatches(c, recipe, layout, context, world.rank());
  PassOptions pass;
  pass.scales = step.scales;
  pass.measure_indexer = c.measure_indexer;
  const ModelContext model_context{context, c.model, recipe.options, store,
                                   rope,    axes,    backend.replay};
  StepOutcome outcome;
  if (c.validate) {
    RETURN_IF_ERROR(ReadValidation(model_context, model, layout, step, world, outcome));
  }
  const Program& program = schedule.schedule.programs[axes.pp->rank()];
  const PassKind kind = recipe.forward_only ? PassKind::kWarmUp : PassKind::kTrain;
  const bool rounded = backend.dtype != StatisticsOf(backend.dtype);
  for (int number = 1; number <= c.steps; ++number) {
    StepStats stats =
        StepStats::Zeros(context, c.model.num_hidden_layers + 1, c.model.n_routed_experts);
    ModelWork work(model_context, model, step.batches, pass, kind, stats);
    optimizer.BeginStep();
    work.set_gradients_ready([&](int first, int end) { optimizer.GradientsReady(first, end); });
    RunPipeline(program, layout.part_rank, *axes.pp, work);
    optimizer.ReduceGradients();
    optimizer.ComputeNorms();
    const bool last = number == c.steps;
    std::vector<StepOutcome::Piece> before;
    if (last) {
      ReadStats(context, world, stats, outcome);
      outcome.norm_main = optimizer.Norm(ClipGroup::kMain).value_or(0);
      outcome.norm_indexer = optimizer.Norm(ClipGroup::kIndexer).value_or(0);
      ReadGradients(context, optimizer, store, outcome);
      if (rounded)
        before = ReadValues(context, optimizer, store, &outcome.values_are_rounded_masters);
    }
    optimizer.Update(c.stage.optimizer.lr, number);
    if (!last) continue;
    outcome.values = ReadValues(context, optimizer, store, &outcome.values_are_rounded_masters);
    if (rounded) outcome.changes = Difference(outcome.values, before);
  }
  return outcome;
}

}  // namespace baleen::testing
