// A plan as text for people and as JSON for programs.
#include <algorithm>
#include <cmath>
#include <set>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "nlohmann/json.hpp"
#include "trainer/flops.h"
#include "trainer/plan.h"

namespace baleen {
namespace {

constexpr int kMostSlots = 120;  // columns of the schedule's grid

std::string Bytes(double bytes) {
  if (bytes < 1024) return absl::StrFormat("%.0f B", bytes);
  if (bytes < (1 << 20)) return absl::StrFormat("%.1f KiB", bytes / 1024);
  if (bytes < (1 << 30)) return absl::StrFormat("%.1f MiB", bytes / (1 << 20));
  return absl::StrFormat("%.2f GiB", bytes / (1 << 30));
}

std::string Time(double seconds) {
  if (seconds < 1e-3) return absl::StrFormat("%.1f us", seconds * 1e6);
  if (seconds < 1) return absl::StrFormat("%.1f ms", seconds * 1e3);
  if (seconds < 600) return absl::StrFormat("%.2f s", seconds);
  if (seconds < 2 * 86400) return absl::StrFormat("%.1f h", seconds / 3600);
  return absl::StrFormat("%.1f days", seconds / 86400);
}

// "layers 3..6" of each part, with what the first and the last part hold besides.
std::string PartsText(const RankPlan& rank) {
  std::vector<std::string> parts;
  for (const PartLayers& part : rank.parts) {
    std::string text;
    if (part.first) text = "embedding ";
    if (part.begin < part.end) absl::StrAppend(&text, part.begin, "..", part.end - 1);
    if (part.last) absl::StrAppend(&text, part.begin < part.end ? " " : "", "head");
    parts.push_back(std::move(text));
  }
  return absl::StrJoin(parts, ", ");
}

int64_t PeakOf(const RankPlan& rank, const char* use) {
  const auto found = rank.uses.find(use);
  return found == rank.uses.end() ? 0 : found->second.peak_bytes;
}

std::string HeadText(const StagePlan& plan) {
  const StageConfig& stage = plan.request.stage;
  const StageLayout& layout = plan.layout;
  std::string text = absl::StrCat(
      "stage '", stage.name, "': attention ", std::string(Name(stage.attention)), ", trains ",
      std::string(Name(stage.train)), ", ", std::string(DTypeName(plan.dtype)), ", recompute ",
      std::string(Name(stage.recompute)), "\n");
  absl::StrAppend(&text, "  grid      ", layout.grid.DebugString(), "\n");
  absl::StrAppend(&text, "  batch     ", stage.global_batch_size, " sequences x ",
                  stage.data.seq_length, " tokens, micro batch ", stage.micro_batch_size, ": ",
                  layout.schedule.num_microbatches, " microbatches a pipeline, ",
                  layout.rows_per_rank, " rows a rank\n");
  absl::StrAppend(&text, "  kernel    ", plan.recipe.kernel, "\n");
  return text;
}

std::string MemoryText(const StagePlan& plan) {
  const DeviceSpec& device = plan.request.device;
  const bool small = plan.NeededBytes(plan.HeaviestRank()) < (int64_t{1} << 30);
  const double unit = small ? 1 << 20 : 1 << 30;
  std::string text = absl::StrFormat(
      "  memory    of the first rank of each pipeline stage, peaks of a step in %s\n"
      "  %5s %7s  %-24s %10s %10s %10s %11s %8s %9s %9s\n",
      small ? "MiB" : "GiB", "pp", "rank", "layers", "parameters", "gradients", "optimizer",
      "activations", "other", "reserved", "total");
  const auto in_unit = [&](int64_t bytes) { return static_cast<double>(bytes) / unit; };
  for (size_t i = 0; i < plan.ranks.size(); ++i) {
    const RankPlan& rank = plan.ranks[i];
    int64_t other = 0;
    for (const auto& [use, memory] : rank.uses) {
      static const auto* const named =
          new std::set<std::string>{"parameters", "gradients", "optimizer", "activations"};
      if (named->count(use) == 0) other += memory.peak_bytes;
    }
    absl::StrAppendFormat(&text, "  %5d %7d  %-24s %10.3f %10.3f %10.3f %11.3f %8.3f %9.3f %9.3f\n",
                          rank.pipeline_rank, rank.world_rank, PartsText(rank),
                          in_unit(PeakOf(rank, "parameters")), in_unit(PeakOf(rank, "gradients")),
                          in_unit(PeakOf(rank, "optimizer")), in_unit(PeakOf(rank, "activations")),
                          in_unit(other), in_unit(device.reserved_bytes),
                          in_unit(plan.NeededBytes(i)));
  }
  const size_t heaviest = plan.HeaviestRank();
  absl::StrAppend(&text, "  ", plan.Fits() ? "fits" : "DOES NOT FIT", ": pipeline rank ", heaviest,
                  " needs ", Bytes(static_cast<double>(plan.NeededBytes(heaviest))), " of ",
                  Bytes(static_cast<double>(device.memory_bytes)),
                  device.name == "cpu"
                      ? absl::StrCat(" that ", plan.request.world_size, " ranks share on one host")
                      : std::string(),
                  "\n");
  return text;
}

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

// One kind of message whatever the layer, the part and the microbatch: "model.layers.3.mlp combine"
// and "model.layers.4.mlp combine" are "layers mlp combine", "0F3>1" is "activations".
std::string KindOf(const CommunicationLog::Key& key) {
  if (key.communicator == "pp") {
    return key.label.find('F') != std::string::npos ? "activations" : "gradients";
  }
  std::string kind;
  for (size_t i = 0; i < key.label.size(); ++i) {
    if (IsDigit(key.label[i]) && i > 0 && key.label[i - 1] == '.') {
      while (i + 1 < key.label.size() && (IsDigit(key.label[i + 1]) || key.label[i + 1] == '.'))
        ++i;
      if (!kind.empty()) kind.back() = ' ';
    } else {
      kind += key.label[i];
    }
  }
  return kind.rfind("model.", 0) == 0 ? kind.substr(6) : kind;
}

struct MessageKind {
  std::string communicator, kind, operation;
  auto operator<=>(const MessageKind&) const = default;
};

std::map<MessageKind, CommunicationLog::Count> KindsOf(const RankPlan& rank) {
  std::map<MessageKind, CommunicationLog::Count> kinds;
  for (const auto& [key, count] : rank.messages.counts) {
    if (key.operation == "Recv" || key.operation == "Barrier") continue;
    CommunicationLog::Count& sum = kinds[{key.communicator, KindOf(key), key.operation}];
    sum.calls += count.calls;
    sum.bytes_sent += count.bytes_sent;
  }
  return kinds;
}

// Of the pipeline rank that sends most.
std::string MessagesText(const StagePlan& plan) {
  const auto sent = [](const RankPlan& rank) {
    int64_t bytes = 0;
    for (const auto& [key, count] : rank.messages.counts) bytes += count.bytes_sent;
    return bytes;
  };
  const RankPlan& rank =
      *std::max_element(plan.ranks.begin(), plan.ranks.end(),
                        [&](const RankPlan& a, const RankPlan& b) { return sent(a) < sent(b); });
  std::string text =
      absl::StrCat("  messages  sent in a step by rank ", rank.world_rank, " (pipeline rank ",
                   rank.pipeline_rank, "), ", Bytes(static_cast<double>(sent(rank))), " in all\n");
  std::vector<std::pair<MessageKind, CommunicationLog::Count>> kinds;
  for (const auto& entry : KindsOf(rank)) kinds.push_back(entry);
  std::stable_sort(kinds.begin(), kinds.end(), [](const auto& a, const auto& b) {
    return a.second.bytes_sent > b.second.bytes_sent;
  });
  for (const auto& [kind, count] : kinds) {
    absl::StrAppendFormat(&text, "    %-13s %-13s %-36s %9d calls %12s\n", kind.communicator,
                          kind.operation, kind.kind, count.calls,
                          Bytes(static_cast<double>(count.bytes_sent)));
  }
  return text;
}

// In whole columns of the shortest action that is not tiny beside the longest: what is, a norm's
// weight gradients where all others are formed with the inputs', would not be seen at any scale.
std::string GridText(const Timeline& timeline) {
  constexpr double kTiny = 0.05;
  double longest = 0;
  for (const auto& rank : timeline.ranks) {
    for (const TimedAction& timed : rank) longest = std::max(longest, timed.end - timed.start);
  }
  const auto is_tiny = [&](const TimedAction& timed) {
    return timed.end - timed.start < kTiny * longest;
  };
  double shortest = longest;
  Timeline columns = timeline;
  size_t tiny = 0;
  for (auto& rank : columns.ranks) {
    tiny += std::erase_if(rank, is_tiny);
    for (const TimedAction& timed : rank) shortest = std::min(shortest, timed.end - timed.start);
  }
  columns.makespan = std::round(timeline.makespan / shortest);
  for (auto& rank : columns.ranks) {
    for (TimedAction& timed : rank) {
      timed.start = std::round(timed.start / shortest);
      timed.end = std::max(timed.start + 1, std::round(timed.end / shortest));
    }
  }
  return absl::StrCat("  grid      one column is ", Time(shortest),
                      tiny == 0 ? "" : absl::StrCat("; ", tiny, " far shorter actions not drawn"),
                      "\n", ScheduleGrid(columns, kMostSlots));
}

std::string ScheduleText(const StagePlan& plan, const ReportOptions& options) {
  const ScheduleSpec& spec = plan.layout.schedule;
  std::string text =
      absl::StrCat("  schedule  ", std::string(Name(spec.policy)),
                   spec.forward_only ? ", forward only" : "", ", ", spec.num_ranks,
                   " pipeline ranks x ", spec.parts_per_rank, " parts, ", spec.num_microbatches,
                   " microbatches: ", absl::StrFormat("%.1f%% bubble", 100 * plan.bubble), "\n");
  if (spec.num_ranks > 1) {
    absl::StrAppend(&text, "  split     by FLOPs of a step\n");
    const std::string table =
        LayerSplitTable(plan.layout.layer_split, plan.layout.costs, plan.layout.part_rank);
    for (const absl::string_view line : absl::StrSplit(table, '\n', absl::SkipEmpty())) {
      absl::StrAppend(&text, "    ", line, "\n");
    }
  }
  if (options.schedule_grid) absl::StrAppend(&text, GridText(plan.timeline));
  return text;
}

std::string PredictionText(const StagePlan& plan) {
  const StageConfig& stage = plan.request.stage;
  return absl::StrFormat(
      "  predicted %s a step (update %s), %.4g tokens/s, %.4g a device, MFU %.1f%%; the stage's %d "
      "steps: %s\n",
      Time(plan.step_seconds), Time(plan.update_seconds), plan.tokens_per_second,
      plan.tokens_per_second / plan.request.world_size, 100 * plan.mfu, stage.steps,
      Time(plan.step_seconds * static_cast<double>(stage.steps)));
}

nlohmann::json RankJson(const StagePlan& plan, size_t index) {
  const RankPlan& rank = plan.ranks[index];
  nlohmann::json json;
  json["pipeline_rank"] = rank.pipeline_rank;
  json["world_rank"] = rank.world_rank;
  for (const PartLayers& part : rank.parts) {
    json["parts"].push_back({{"part", part.part}, {"begin", part.begin}, {"end", part.end}});
  }
  for (const auto& [use, memory] : rank.uses) {
    json["bytes"][use] = {{"between_steps", memory.bytes}, {"peak", memory.peak_bytes}};
  }
  json["peak_bytes"] = rank.total.peak_bytes;
  json["needed_bytes"] = plan.NeededBytes(index);
  json["flops"] = rank.flops;
  json["messages"] = nlohmann::json::array();
  for (const auto& [kind, count] : KindsOf(rank)) {
    json["messages"].push_back({{"communicator", kind.communicator},
                                {"kind", kind.kind},
                                {"operation", kind.operation},
                                {"calls", count.calls},
                                {"bytes_sent", count.bytes_sent}});
  }
  return json;
}

}  // namespace

std::string PlanText(const StagePlan& plan, const ReportOptions& options) {
  return absl::StrCat(HeadText(plan), MemoryText(plan), MessagesText(plan),
                      ScheduleText(plan, options), PredictionText(plan));
}

std::string PlanJson(const std::vector<StagePlan>& plans) {
  nlohmann::json json;
  for (const StagePlan& plan : plans) {
    nlohmann::json stage;
    stage["name"] = plan.request.stage.name;
    stage["world"] = plan.request.world_size;
    stage["device"] = plan.request.device.name;
    stage["device_bytes"] = plan.request.device.memory_bytes;
    stage["fits"] = plan.Fits();
    stage["grid"] = plan.layout.grid.DebugString();
    stage["schedule"] = std::string(Name(plan.layout.schedule.policy));
    stage["microbatches"] = plan.layout.schedule.num_microbatches;
    stage["layer_split"] = plan.layout.layer_split;
    stage["bubble"] = plan.bubble;
    stage["step_seconds"] = plan.step_seconds;
    stage["update_seconds"] = plan.update_seconds;
    stage["tokens_per_second"] = plan.tokens_per_second;
    stage["mfu"] = plan.mfu;
    for (size_t i = 0; i < plan.ranks.size(); ++i) stage["ranks"].push_back(RankJson(plan, i));
    json["stages"].push_back(std::move(stage));
  }
  return json.dump(2) + "\n";
}

}  // namespace baleen
