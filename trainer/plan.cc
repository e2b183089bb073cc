#include "trainer/plan.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "absl/strings/str_join.h"
#include "trainer/flops.h"

namespace baleen {
namespace {

DeviceKind DeviceOf(const PlanRequest& request) {
  return request.device.name == "cpu" ? DeviceKind::kCpu : DeviceKind::kCuda;
}

// All that precedes the dry runs.
absl::StatusOr<StagePlan> OpenPlan(const PlanRequest& request) {
  StagePlan plan;
  plan.request = request;
  plan.request.model = EffectiveModel(request.model, request.stage.dsa);
  const ModelConfig& model = plan.request.model;
  RETURN_IF_ERROR(model.Validate(absl::StrCat("stage '", request.stage.name, "'")));
  if (request.stage.data.seq_length > model.max_position_embeddings) {
    return ConfigError(
        "stage '", request.stage.name, "': data.seq_length = ", request.stage.data.seq_length,
        " is more than the model's max_position_embeddings = ", model.max_position_embeddings);
  }
  ASSIGN_OR_RETURN(plan.recipe, MakeRecipe(request.stage, model, DeviceOf(request)));
  ASSIGN_OR_RETURN(plan.layout,
                   MakeStageLayout(request.stage, model, plan.recipe, request.world_size));
  plan.dtype = ComputeDType(request.stage.precision, DeviceOf(request));
  return plan;
}

// Of the first rank of a pipeline stage.
DryRankRequest DryRequest(const StagePlan& plan, const Schedule& schedule, int pipeline_rank,
                          RehearsalMemo& memo) {
  return {.stage = plan.request.stage,
          .model = plan.request.model,
          .recipe = plan.recipe,
          .layout = plan.layout,
          .schedule = schedule,
          .dtype = plan.dtype,
          .world_rank = plan.layout.grid.DenseRank(pipeline_rank, 0, 0, 0),
          .memo = &memo};
}

// The seconds of a message between neighbouring pipeline ranks.
double MessageSeconds(const StagePlan& plan) {
  const DeviceSpec& device = plan.request.device;
  const double bytes = static_cast<double>(plan.layout.rows_per_rank *
                                           plan.request.model.hidden_size * DTypeBytes(plan.dtype));
  const ProcessGrid& grid = plan.layout.grid;
  const int distance = grid.world_size() / grid.pp_size();
  return device.call_seconds +
         bytes /
             (distance < device.ranks_per_node ? device.node_bandwidth : device.network_bandwidth);
}

// The gathers run beside AdamW, then beside the next step's first forward of the rank's parts.
double UpdateSeconds(const RankPlan& rank, const DeviceSpec& device) {
  double forward = 0;
  for (const auto& [type, work] : rank.actions) {
    if (std::get<0>(type) == ActionKind::kForward)
      forward += Seconds(work, rank.spans, device, Overlap::kNone);
  }
  const double adamw = Seconds({rank.update.ops, {}}, rank.spans, device, Overlap::kNone);
  const double both = Seconds(rank.update, rank.spans, device, Overlap::kMessages);
  return Seconds(rank.reduction, rank.spans, device, Overlap::kNone) + adamw +
         std::max(0.0, both - adamw - forward);
}

absl::Status Predict(const Schedule& schedule, StagePlan& plan) {
  const DeviceSpec& device = plan.request.device;
  std::map<ActionType, double> seconds;
  for (const RankPlan& rank : plan.ranks) {
    for (const auto& [type, work] : rank.actions) {
      // The engine interleaves the phases of two microbatches: one computes while the other's rows
      // travel.
      const bool both = std::get<0>(type) == ActionKind::kForwardBackward;
      seconds[type] = Seconds(work, rank.spans, device, both ? Overlap::kMessages : Overlap::kNone);
    }
    plan.update_seconds = std::max(plan.update_seconds, UpdateSeconds(rank, device));
  }
  ASSIGN_OR_RETURN(plan.timeline,
                   SimulateSchedule(
                       schedule, [&](const Action& action) { return seconds.at(TypeOf(action)); },
                       MessageSeconds(plan)));
  double busy = 0;
  const int ranks = static_cast<int>(plan.timeline.ranks.size());
  for (int rank = 0; rank < ranks; ++rank) busy += plan.timeline.Busy(rank);
  plan.bubble = 1 - busy / (ranks * plan.timeline.makespan);
  plan.step_seconds = plan.timeline.makespan + plan.update_seconds;
  const StageConfig& stage = plan.request.stage;
  const auto tokens = static_cast<double>(stage.global_batch_size * stage.data.seq_length);
  plan.tokens_per_second = tokens / plan.step_seconds;
  const TokenFlops flops =
      ModelFlopsPerToken(plan.request.model, plan.recipe, stage.data.seq_length);
  plan.mfu = flops.total * plan.tokens_per_second / (plan.request.world_size * device.matmul_flops);
  return absl::OkStatus();
}

// Bytes that a rank may hold, the device's reserve left out.
int64_t MostBytes(const DeviceSpec& device, int world_size) {
  // Ranks on the CPU share their host.
  const int sharers = device.name == "cpu" ? world_size : 1;
  return device.memory_bytes / sharers - device.reserved_bytes;
}

}  // namespace

double Seconds(const CountedWork& work, const std::map<std::string, int>& spans,
               const DeviceSpec& device, Overlap overlap) {
  double compute = 0, messages = 0;
  for (const auto& [op, count] : work.ops.ops) {
    const auto own = device.op_flops.find(op);
    const double rate = own == device.op_flops.end() ? device.matmul_flops : own->second;
    compute += std::max(count.flops / rate, count.bytes / device.memory_bandwidth);
  }
  for (const auto& [key, count] : work.messages.counts) {
    const auto span = spans.find(key.communicator);
    CHECK(span != spans.end()) << key.communicator;
    const double bandwidth =
        span->second <= device.ranks_per_node ? device.node_bandwidth : device.network_bandwidth;
    messages += static_cast<double>(count.calls) * device.call_seconds +
                static_cast<double>(count.bytes_sent) / bandwidth;
  }
  return overlap == Overlap::kMessages ? std::max(compute, messages) : compute + messages;
}

int64_t StagePlan::NeededBytes(size_t index) const {
  return ranks[index].total.peak_bytes + request.device.reserved_bytes;
}

size_t StagePlan::HeaviestRank() const {
  size_t heaviest = 0;
  for (size_t i = 1; i < ranks.size(); ++i) {
    if (NeededBytes(i) > NeededBytes(heaviest)) heaviest = i;
  }
  return heaviest;
}

bool StagePlan::Fits() const {
  return ranks[HeaviestRank()].total.peak_bytes <= MostBytes(request.device, request.world_size);
}

absl::StatusOr<StagePlan> PlanStage(const PlanRequest& request) {
  ASSIGN_OR_RETURN(StagePlan plan, OpenPlan(request));
  ASSIGN_OR_RETURN(const CheckedSchedule checked, MakeCheckedSchedule(plan.layout.schedule));
  RehearsalMemo memo;
  for (int rank = 0; rank < plan.layout.grid.pp_size(); ++rank) {
    plan.ranks.push_back(RunDry(DryRequest(plan, checked.schedule, rank, memo)));
  }
  RETURN_IF_ERROR(Predict(checked.schedule, plan));
  return plan;
}

namespace {

// ---- The search for layouts that fit -----------------------------------------------------------

struct Candidate {
  ParallelismConfig parallelism;
  Recompute recompute{};
  double distance = 0;  // doublings of axes; a change of recompute or schedule counts half of one
};

double Doublings(int64_t a, int64_t b) {
  return std::abs(std::log2(static_cast<double>(a) / static_cast<double>(b)));
}

// The asked schedule, and 1f1b, which holds the fewest microbatches at once.
std::vector<ParallelismConfig> Schedules(const ParallelismConfig& asked) {
  std::vector<ParallelismConfig> schedules = {asked};
  if (asked.schedule == ScheduleName::k1F1B) return schedules;
  ParallelismConfig& other = schedules.emplace_back(asked);
  other.schedule = ScheduleName::k1F1B;
  if (asked.virtual_stages) other.virtual_stages = 1;
  if (asked.parts_per_rank() != other.parts_per_rank()) other.layer_split.clear();
  return schedules;
}

std::vector<Candidate> Candidates(const PlanRequest& request) {
  const ParallelismConfig& asked = request.stage.parallelism;
  const std::vector<int64_t> sizes = {1, 2, 4, 8, 16, 32, 64, 128, 256};
  std::vector<Candidate> candidates;
  for (const Recompute recompute : {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
    // Less recomputation than asked never helps.
    if (recompute < request.stage.recompute) continue;
    for (const int64_t tensor : sizes) {
      for (const int64_t pipeline : sizes) {
        for (const int64_t context : sizes) {
          for (const int64_t expert : sizes) {
            if (request.world_size % (tensor * pipeline * context) != 0) continue;
            const double axes = Doublings(tensor, asked.tensor) +
                                Doublings(pipeline, asked.pipeline) +
                                Doublings(context, asked.context) + Doublings(expert, asked.expert);
            for (const ParallelismConfig& schedule : Schedules(asked)) {
              Candidate candidate{.parallelism = schedule, .recompute = recompute};
              candidate.parallelism.tensor = tensor;
              candidate.parallelism.pipeline = pipeline;
              candidate.parallelism.context = context;
              candidate.parallelism.expert = expert;
              if (pipeline != asked.pipeline) candidate.parallelism.layer_split.clear();
              candidate.distance = axes + (recompute == request.stage.recompute ? 0 : 0.5) +
                                   (schedule.schedule == asked.schedule ? 0 : 0.5);
              if (candidate.distance > 0) candidates.push_back(std::move(candidate));
            }
          }
        }
      }
    }
  }
  std::stable_sort(candidates.begin(), candidates.end(),
                   [](const Candidate& a, const Candidate& b) { return a.distance < b.distance; });
  return candidates;
}

std::string ChangesOf(const Candidate& candidate, const StageConfig& asked) {
  std::vector<std::string> changes;
  const auto add = [&](const char* key, int64_t now, int64_t before) {
    if (now != before) changes.push_back(absl::StrCat("parallelism.", key, "=", now));
  };
  add("tensor", candidate.parallelism.tensor, asked.parallelism.tensor);
  add("pipeline", candidate.parallelism.pipeline, asked.parallelism.pipeline);
  add("context", candidate.parallelism.context, asked.parallelism.context);
  add("expert", candidate.parallelism.expert, asked.parallelism.expert);
  if (candidate.parallelism.schedule != asked.parallelism.schedule) {
    changes.push_back(absl::StrCat("parallelism.schedule=", Name(candidate.parallelism.schedule)));
  }
  if (candidate.parallelism.virtual_stages != asked.parallelism.virtual_stages) {
    changes.push_back("parallelism.virtual_stages=1");
  }
  if (candidate.parallelism.layer_split != asked.parallelism.layer_split) {
    changes.push_back("parallelism.layer_split=[]");
  }
  if (candidate.recompute != asked.recompute) {
    changes.push_back(absl::StrCat("recompute=", std::string(Name(candidate.recompute))));
  }
  return absl::StrJoin(changes, " ");
}

// The most that a rank needs, or nothing as soon as one does not fit.
std::optional<int64_t> NeededIfFits(const PlanRequest& request) {
  const auto plan = OpenPlan(request);
  if (!plan.ok()) return std::nullopt;
  const auto checked = MakeCheckedSchedule(plan->layout.schedule);
  if (!checked.ok()) return std::nullopt;
  const int64_t limit = MostBytes(request.device, request.world_size);
  const int stages = plan->layout.grid.pp_size();
  RehearsalMemo memo;
  int64_t most = 0;
  // The ends of a pipeline hold most, one or the other: a layout that does not fit is soon known.
  for (int i = 0; i < stages; ++i) {
    const int rank = i % 2 == 0 ? i / 2 : stages - 1 - i / 2;
    DryRankRequest dry = DryRequest(*plan, checked->schedule, rank, memo);
    dry.most_bytes = limit;
    const RankPlan found = RunDry(dry);
    const int64_t held = std::max(found.total.bytes, found.total.peak_bytes);
    if (held > limit) return std::nullopt;
    most = std::max(most, held + request.device.reserved_bytes);
  }
  return most;
}

}  // namespace

std::vector<FittingLayout> NearestFittingLayouts(const PlanRequest& request, size_t count) {
  constexpr int kMostTried = 24;  // layouts that can be; each costs dry runs of its ends or more
  std::vector<FittingLayout> fitting;
  int tried = 0;
  for (const Candidate& candidate : Candidates(request)) {
    if (fitting.size() == count || tried == kMostTried) break;
    PlanRequest changed = request;
    changed.stage.parallelism = candidate.parallelism;
    changed.stage.recompute = candidate.recompute;
    if (!OpenPlan(changed).ok()) continue;
    ++tried;
    const std::optional<int64_t> needed = NeededIfFits(changed);
    if (needed) fitting.push_back({ChangesOf(candidate, request.stage), *needed});
  }
  return fitting;
}

}  // namespace baleen
