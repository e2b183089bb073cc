#include "trainer/bench/ops_report.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

namespace baleen {
namespace {

double Gibibytes(int64_t bytes) { return static_cast<double>(bytes) / (int64_t{1} << 30); }

// GPUs in TFLOP/s and TB/s, the CPU in thousandths of them.
double Scale(const BenchDevice& device) { return device.cuda ? 1e-12 : 1e-9; }

std::string CeilingText(const BenchDevice& device, const OpCeilings& ceilings) {
  const double scale = Scale(device);
  const char* const letter = device.cuda ? "T" : "G";
  return absl::StrFormat("matmul %.1f %sFLOP/s, block FP8 %.1f %sFLOP/s, copy %.3f %sB/s",
                         ceilings.matmul_flops * scale, letter, ceilings.fp8_flops * scale, letter,
                         ceilings.bytes_per_second * scale, letter);
}

std::string KernelText(const OpResult& result) {
  if (!result.op.kernel.empty() || result.kernels.empty()) return result.op.kernel;
  int64_t launches = 0;
  for (const WorkTime& kernel : result.kernels) launches += kernel.launches;
  std::string text = result.kernels.front().name;
  if (launches > 1) absl::StrAppendFormat(&text, " and %d more", launches - 1);
  return text;
}

const char* UnitText(GoalUnit unit) {
  return unit == GoalUnit::kTeraflops ? "TF" : unit == GoalUnit::kPercent ? "%" : "us/row";
}

bool Met(const OpCeilings& ceilings, const OpResult& result) {
  return Ratio(result.goal->unit, result.Figure(ceilings), result.goal->goal) >= 1;
}

// "FlashMLA 604 TF (1.01 x), goal 634 TF (0.96 x): missed"
std::string GoalText(const OpCeilings& ceilings, const OpResult& result) {
  if (!result.goal) return "";
  const OpGoal& goal = *result.goal;
  const double figure = result.Figure(ceilings);
  const char* const unit = UnitText(goal.unit);
  std::string text;
  if (goal.unit == GoalUnit::kMicrosecondsRow)
    absl::StrAppendFormat(&text, "%.4f us/row; ", figure);
  if (goal.peer > 0) {
    absl::StrAppendFormat(&text, "%s %.4g %s (%.2f x), ", goal.name, goal.peer, unit,
                          Ratio(goal.unit, figure, goal.peer));
  }
  absl::StrAppendFormat(&text, "goal %.4g %s (%.2f x): %s", goal.goal, unit,
                        Ratio(goal.unit, figure, goal.goal),
                        Met(ceilings, result) ? "met" : "missed");
  return text;
}

nlohmann::json CeilingJson(const OpCeilings& ceilings) {
  return {{"matmul_flops", ceilings.matmul_flops},
          {"fp8_flops", ceilings.fp8_flops},
          {"copy_bytes_per_second", ceilings.bytes_per_second}};
}

nlohmann::json GoalJson(const OpCeilings& ceilings, const OpResult& result) {
  const OpGoal& goal = *result.goal;
  const double figure = result.Figure(ceilings);
  nlohmann::json json = {{"unit", UnitText(goal.unit)},
                         {"figure", figure},
                         {"goal", goal.goal},
                         {"over_goal", Ratio(goal.unit, figure, goal.goal)},
                         {"met", Met(ceilings, result)}};
  if (goal.peer > 0) {
    json["peer"] = {{"name", goal.name},
                    {"figure", goal.peer},
                    {"over_peer", Ratio(goal.unit, figure, goal.peer)}};
  }
  return json;
}

nlohmann::json ResultJson(const OpCeilings& ceilings, const OpResult& result) {
  const OpCase& op = result.op;
  nlohmann::json json = {{"op", op.op},
                         {"shape", op.shape},
                         {"kernel", KernelText(result)},
                         {"rows", op.rows},
                         {"needed_bytes", result.needed_bytes},
                         {"fits", result.fits}};
  if (op.heads > 0) json["heads"] = op.heads;
  if (op.keys > 0) json["keys"] = op.keys;
  if (op.ids) json["ids"] = std::string(Name(*op.ids));
  if (!result.fits) return json;
  json["seconds"] = result.median;
  json["all_seconds"] = result.seconds;
  json["flops"] = result.flops;
  json["flops_per_second"] = result.FlopsPerSecond();
  json["bytes"] = result.bytes;
  json["bytes_per_second"] = result.BytesPerSecond();
  json["of_copy"] = result.BytesPerSecond() / ceilings.bytes_per_second;
  json["microseconds_a_row"] = result.MicrosecondsRow();
  if (result.flops > 0) json["of_matmul"] = result.FlopsPerSecond() / ceilings.matmul_flops;
  if (op.bound != OpBound::kCopy) json["of_product_beside"] = result.Share(ceilings);
  if (result.goal) json["goal"] = GoalJson(ceilings, result);
  for (const WorkTime& kernel : result.kernels) {
    json["kernels"].push_back({{"name", kernel.name},
                               {"kind", kernel.kind},
                               {"seconds", kernel.seconds},
                               {"launches", kernel.launches}});
  }
  return json;
}

}  // namespace

std::string OpsHeading(const BenchDevice& device, const OpCeilings& ceilings) {
  std::string text = absl::StrCat(device.name, ": ", CeilingText(device, ceilings), "\n");
  absl::StrAppend(&text,
                  device.cuda ? "CUDA events, L2 emptied before each call; "
                              : "wall clock of the CPU definitions; ",
                  "median, and how far apart the calls are\n");
  absl::StrAppendFormat(&text, "%-28s %-38s %10s %6s %8s %6s %8s %8s %6s  %s\n", "op", "shape",
                        "ms", "+-%", device.cuda ? "TFLOP/s" : "GFLOP/s", "% mm", "MB",
                        device.cuda ? "TB/s" : "GB/s", "% copy", "kernel; peer and goal");
  return text;
}

std::string OpLine(const BenchDevice& device, const OpCeilings& ceilings, const OpResult& result) {
  std::string text = absl::StrFormat("%-28s %-38s ", result.op.op, result.op.shape);
  if (!result.fits) {
    absl::StrAppendFormat(&text, "does not fit: needs %.1f GiB\n", Gibibytes(result.needed_bytes));
    return text;
  }
  const double scale = Scale(device);
  absl::StrAppendFormat(&text, "%10.4f %6.1f ", result.median * 1e3,
                        50 * (result.high - result.low) / result.median);
  if (result.flops > 0) {
    const double share = result.op.bound == OpBound::kCopy
                             ? result.FlopsPerSecond() / ceilings.matmul_flops
                             : result.Share(ceilings);
    absl::StrAppendFormat(&text, "%8.1f %6.1f ", result.FlopsPerSecond() * scale, 100 * share);
  } else {
    absl::StrAppendFormat(&text, "%8s %6s ", "-", "-");
  }
  absl::StrAppendFormat(
      &text, "%8.1f %8.3f %6.1f  %s", result.bytes * 1e-6, result.BytesPerSecond() * scale,
      100 * result.BytesPerSecond() / ceilings.bytes_per_second, KernelText(result));
  const std::string goal = GoalText(ceilings, result);
  if (!goal.empty()) absl::StrAppend(&text, "; ", goal);
  return text + "\n";
}

std::string OpsSummary(const BenchDevice& device, const OpCeilings& before, const OpCeilings& after,
                       const std::vector<OpResult>& results, const std::string& no_trace) {
  int met = 0, missed = 0, too_large = 0;
  for (const OpResult& result : results) {
    if (!result.fits) {
      ++too_large;
    } else if (result.goal) {
      ++(Met(before, result) ? met : missed);
    }
  }
  std::string text = absl::StrFormat("%d measured; goals: %d met, %d missed",
                                     results.size() - static_cast<size_t>(too_large), met, missed);
  if (too_large > 0) absl::StrAppendFormat(&text, "; %d did not fit", too_large);
  absl::StrAppend(&text, "\nceilings once more: ", CeilingText(device, after), "\n");
  if (!no_trace.empty()) absl::StrAppend(&text, "no kernel names: ", no_trace, "\n");
  return text;
}

std::string OpsJson(const BenchDevice& device, const OpSizes& sizes, const OpCeilings& before,
                    const OpCeilings& after, const std::vector<OpResult>& results) {
  nlohmann::json json = {{"device", device.name},
                         {"dtype", std::string(DTypeName(sizes.dtype))},
                         {"timing", device.cuda ? "cuda events" : "wall clock"},
                         {"ceilings", CeilingJson(before)},
                         {"ceilings_after", CeilingJson(after)},
                         {"results", nlohmann::json::array()}};
  for (const OpResult& result : results) json["results"].push_back(ResultJson(before, result));
  return json.dump(1) + "\n";
}

}  // namespace baleen
