#include "trainer/bench/bench_report.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "nlohmann/json.hpp"

namespace baleen {
namespace {

// H100 and H200, bf16 without sparsity: what published MFU figures are of.
constexpr double kPeakFlops = 989e12;
constexpr size_t kKernelsShown = 16;

double Gibibytes(int64_t bytes) { return static_cast<double>(bytes) / (int64_t{1} << 30); }

double TokensPerSecond(const BenchResult& result) {
  return result.seconds > 0 ? static_cast<double>(result.tokens) / result.seconds : 0;
}

// Model FLOP/s of one device.
double Flops(const BenchResult& result) {
  return TokensPerSecond(result) * result.flops_per_token / result.world_size;
}

std::string Heading(const BenchResult& result) {
  std::string text = absl::StrFormat("%s of stage '%s', %d tokens a sequence, %d rank%s",
                                     result.what, result.stage, result.seq_length,
                                     result.world_size, result.world_size == 1 ? "" : "s");
  if (result.ids != BenchIds::kIndexer) absl::StrAppend(&text, ", ids ", Name(result.ids));
  return text;
}

std::string SpeedText(const BenchDevice& device, const BenchResult& result) {
  std::string text = absl::StrFormat(
      "  %.4f s (median of %d, %.4f to %.4f), %.0f tokens/s, %.3f GFLOP a token", result.seconds,
      result.measured.step_seconds.size(),
      *std::min_element(result.measured.step_seconds.begin(), result.measured.step_seconds.end()),
      *std::max_element(result.measured.step_seconds.begin(), result.measured.step_seconds.end()),
      TokensPerSecond(result), result.flops_per_token / 1e9);
  if (device.cuda) {
    absl::StrAppendFormat(&text,
                          "\n  %.1f model TFLOP/s a GPU: MFU %.1f %% of 989, %.1f %% of the "
                          "matmul's %.0f",
                          Flops(result) / 1e12, 100 * Flops(result) / kPeakFlops,
                          100 * Flops(result) / device.matmul_flops, device.matmul_flops / 1e12);
  }
  absl::StrAppend(&text, "\n  attention ", result.kernel, "\n");
  if (result.skipped) text += "  WARNING: gradients were not finite: the update was skipped\n";
  if (result.planned_seconds > 0) {
    absl::StrAppendFormat(&text,
                          "  plan: %.4f s (measured %.2f x), peak %.2f GiB (measured %.2f x)\n",
                          result.planned_seconds, result.seconds / result.planned_seconds,
                          Gibibytes(result.planned_bytes),
                          static_cast<double>(result.measured.total.peak_bytes) /
                              static_cast<double>(result.planned_bytes));
  }
  return text;
}

std::string MemoryText(const Measured& measured) {
  std::string text = absl::StrFormat("  peak %.2f GiB:", Gibibytes(measured.total.peak_bytes));
  for (const auto& [use, memory] : measured.uses) {
    if (memory.peak_bytes >= (int64_t{1} << 20))
      absl::StrAppendFormat(&text, " %s %.2f,", use, Gibibytes(memory.peak_bytes));
  }
  text.back() = '\n';
  return text;
}

std::string PhaseText(const Measured& measured) {
  double sum = 0;
  for (const PhaseTime& phase : measured.phases) sum += phase.seconds;
  std::string text = "  phase                 ms      %  idle ms  host ms\n";
  for (const PhaseTime& phase : measured.phases) {
    if (phase.seconds == 0) continue;
    absl::StrAppendFormat(&text, "    %-16s %8.3f  %5.1f %8.3f %8.3f\n", phase.name,
                          phase.seconds * 1e3, 100 * phase.seconds / sum, phase.idle_seconds * 1e3,
                          phase.host_seconds * 1e3);
  }
  return text;
}

std::string TimelineText(const DeviceTimeline& timeline) {
  std::string text =
      absl::StrFormat("  traced %.4f s, idle %.4f s (%.1f %%)\n", timeline.seconds,
                      timeline.idle_seconds, 100 * timeline.idle_seconds / timeline.seconds);
  if (timeline.message_seconds > 0) {
    absl::StrAppendFormat(&text, "  messages %.4f s, %.1f %% of it behind other work\n",
                          timeline.message_seconds,
                          100 * timeline.hidden_seconds / timeline.message_seconds);
  }
  text += "  kind                            ms      %  launches\n";
  for (const WorkTime& kind : timeline.kinds) {
    absl::StrAppendFormat(&text, "    %-26s %8.3f  %5.1f  %8d\n", kind.name, kind.seconds * 1e3,
                          100 * kind.seconds / timeline.seconds, kind.launches);
  }
  text += "  the longest kernels                           ms  launches  kind\n";
  for (size_t n = 0; n < std::min(kKernelsShown, timeline.kernels.size()); ++n) {
    const WorkTime& kernel = timeline.kernels[n];
    absl::StrAppendFormat(&text, "    %-40.40s %8.3f  %8d  %s\n", kernel.name, kernel.seconds * 1e3,
                          kernel.launches, kernel.kind);
  }
  return text;
}

nlohmann::json Times(const std::vector<WorkTime>& times) {
  nlohmann::json json = nlohmann::json::array();
  for (const WorkTime& time : times) {
    json.push_back({{"name", time.name},
                    {"kind", time.kind},
                    {"seconds", time.seconds},
                    {"launches", time.launches}});
  }
  return json;
}

nlohmann::json ResultJson(const BenchDevice& device, const BenchResult& result) {
  const Measured& measured = result.measured;
  nlohmann::json json = {{"what", result.what},
                         {"stage", result.stage},
                         {"ids", std::string(Name(result.ids))},
                         {"kernel", result.kernel},
                         {"seq_length", result.seq_length},
                         {"tokens", result.tokens},
                         {"ranks", result.world_size},
                         {"seconds", result.seconds},
                         {"step_seconds", measured.step_seconds},
                         {"tokens_per_second", TokensPerSecond(result)},
                         {"flops_per_token", result.flops_per_token},
                         {"lm_loss", result.lm_loss},
                         {"indexer_kl", result.indexer_kl},
                         {"skipped", result.skipped},
                         {"peak_bytes", measured.total.peak_bytes}};
  if (device.cuda) {
    json["mfu"] = Flops(result) / kPeakFlops;
    json["of_matmul"] = Flops(result) / device.matmul_flops;
  }
  if (result.planned_seconds > 0) {
    json["plan"] = {{"seconds", result.planned_seconds}, {"peak_bytes", result.planned_bytes}};
  }
  for (const auto& [use, memory] : measured.uses)
    json["peak_bytes_by_use"][use] = memory.peak_bytes;
  for (const PhaseTime& phase : measured.phases) {
    json["phases"].push_back({{"name", phase.name},
                              {"seconds", phase.seconds},
                              {"idle_seconds", phase.idle_seconds},
                              {"host_seconds", phase.host_seconds}});
  }
  if (!measured.no_trace.empty()) json["no_trace"] = measured.no_trace;
  if (!measured.timeline) return json;
  json["traced_seconds"] = measured.timeline->seconds;
  json["idle_seconds"] = measured.timeline->idle_seconds;
  json["message_seconds"] = measured.timeline->message_seconds;
  json["hidden_message_seconds"] = measured.timeline->hidden_seconds;
  json["kinds"] = Times(measured.timeline->kinds);
  json["kernels"] = Times(measured.timeline->kernels);
  return json;
}

}  // namespace

std::string BenchText(const BenchDevice& device, const BenchResult& result) {
  std::string text = absl::StrCat(Heading(result), "\n", SpeedText(device, result),
                                  MemoryText(result.measured), PhaseText(result.measured));
  if (!result.measured.no_trace.empty())
    absl::StrAppend(&text, "  no kernel times: ", result.measured.no_trace, "\n");
  if (result.measured.timeline) absl::StrAppend(&text, TimelineText(*result.measured.timeline));
  return text;
}

std::string BenchJson(const BenchDevice& device, const std::vector<BenchResult>& results) {
  nlohmann::json json = {{"device", device.name}, {"matmul_flops", device.matmul_flops}};
  json["results"] = nlohmann::json::array();
  for (const BenchResult& result : results) json["results"].push_back(ResultJson(device, result));
  return json.dump(1) + "\n";
}

}  // namespace baleen
