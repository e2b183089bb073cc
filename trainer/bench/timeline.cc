#include "trainer/bench/timeline.h"

#include <algorithm>
#include <map>
#include <utility>

#include "kernels/core/check.h"
#include "nlohmann/json.hpp"
#include "trainer/bench/kernel_kind.h"

namespace baleen {
namespace {

using Interval = std::pair<double, double>;  // [begin, end), seconds

// Sorted, and none touches another.
std::vector<Interval> Union(std::vector<Interval> intervals) {
  std::sort(intervals.begin(), intervals.end());
  std::vector<Interval> merged;
  for (const Interval& interval : intervals) {
    if (!merged.empty() && interval.first <= merged.back().second) {
      merged.back().second = std::max(merged.back().second, interval.second);
    } else {
      merged.push_back(interval);
    }
  }
  return merged;
}

// How much of both unions is in both.
double Common(const std::vector<Interval>& a, const std::vector<Interval>& b) {
  double common = 0;
  for (size_t i = 0, j = 0; i < a.size() && j < b.size();) {
    common += std::max(0.0, std::min(a[i].second, b[j].second) - std::max(a[i].first, b[j].first));
    a[i].second < b[j].second ? ++i : ++j;
  }
  return common;
}

std::string KindOf(const DeviceRecord& record) {
  if (record.work == DeviceWork::kKernel) return KernelKind(record.name);
  return record.work == DeviceWork::kCopy ? "copy " + record.name : "memset";
}

struct Mark {
  int number = 0;
  double begin = 0;
};
std::vector<Mark> MarksOf(const std::vector<DeviceRecord>& records) {
  std::vector<Mark> marks;
  for (const DeviceRecord& record : records) {
    if (record.work == DeviceWork::kMark) marks.push_back({record.mark, record.begin});
  }
  return marks;
}

std::vector<WorkTime> LongestFirst(const std::map<std::string, WorkTime>& times) {
  std::vector<WorkTime> sorted;
  for (const auto& [name, time] : times) sorted.push_back(time);
  std::sort(sorted.begin(), sorted.end(),
            [](const WorkTime& a, const WorkTime& b) { return a.seconds > b.seconds; });
  return sorted;
}

}  // namespace

DeviceTimeline MakeTimeline(const std::vector<DeviceRecord>& records,
                            const std::vector<std::string>& phases) {
  DeviceTimeline timeline;
  for (const std::string& phase : phases) timeline.phases.push_back({.name = phase});
  const std::vector<Mark> marks = MarksOf(records);
  if (marks.size() < 2) return timeline;
  const double begin = marks.front().begin, end = marks.back().begin;
  std::vector<Interval> work, messages;
  std::map<std::string, WorkTime> kinds, kernels;
  for (const DeviceRecord& record : records) {
    const Interval inside{std::max(record.begin, begin), std::min(record.end, end)};
    if (record.work == DeviceWork::kMark || inside.first >= inside.second) continue;
    const std::string kind = KindOf(record);
    (kind == "messages" ? messages : work).push_back(inside);
    const double seconds = inside.second - inside.first;
    const bool kernel = record.work == DeviceWork::kKernel;
    for (auto& [into, name] :
         {std::pair(&kinds, kind), std::pair(&kernels, kernel ? record.name : kind)}) {
      WorkTime& time = (*into)[name];
      time.name = into == &kernels && kernel ? ShortKernelName(name) : name;
      time.kind = kind;
      time.seconds += seconds;
      if (record.end <= end) ++time.launches;
    }
  }
  timeline.kinds = LongestFirst(kinds);
  timeline.kernels = LongestFirst(kernels);
  const std::vector<Interval> message_union = Union(messages), work_union = Union(work);
  work.insert(work.end(), messages.begin(), messages.end());
  const std::vector<Interval> busy = Union(std::move(work));
  timeline.seconds = end - begin;
  timeline.idle_seconds = timeline.seconds - Common(busy, {{begin, end}});
  for (const Interval& message : message_union) {
    timeline.message_seconds += message.second - message.first;
  }
  timeline.hidden_seconds = Common(message_union, work_union);
  for (size_t n = 0; n + 1 < marks.size(); ++n) {
    const auto number = static_cast<size_t>(marks[n].number);
    if (number >= phases.size()) continue;
    PhaseTime& phase = timeline.phases[number];
    const double seconds = marks[n + 1].begin - marks[n].begin;
    phase.seconds += seconds;
    phase.idle_seconds += seconds - Common(busy, {{marks[n].begin, marks[n + 1].begin}});
  }
  return timeline;
}

std::string ChromeTrace(const std::vector<DeviceRecord>& records,
                        const std::vector<std::string>& phases) {
  nlohmann::json events = nlohmann::json::array();
  const auto name_row = [&](int row, const std::string& name) {
    events.push_back({{"ph", "M"},
                      {"pid", 0},
                      {"tid", row},
                      {"name", "thread_name"},
                      {"args", {{"name", name}}}});
  };
  const auto add = [&](int row, const std::string& name, const std::string& kind, double begin,
                       double end) {
    events.push_back({{"ph", "X"},
                      {"pid", 0},
                      {"tid", row},
                      {"name", name},
                      {"cat", kind},
                      {"ts", begin * 1e6},
                      {"dur", (end - begin) * 1e6}});
  };
  constexpr int kPhaseRow = 0;
  name_row(kPhaseRow, "phases");
  const std::vector<Mark> marks = MarksOf(records);
  for (size_t n = 0; n + 1 < marks.size(); ++n) {
    const auto number = static_cast<size_t>(marks[n].number);
    if (number < phases.size())
      add(kPhaseRow, phases[number], "phase", marks[n].begin, marks[n + 1].begin);
  }
  std::map<int, int> rows;  // of streams
  for (const DeviceRecord& record : records) {
    if (record.work == DeviceWork::kMark) continue;
    const auto [row, fresh] = rows.emplace(record.stream, static_cast<int>(rows.size()) + 1);
    if (fresh) name_row(row->second, absl::StrCat("stream ", record.stream));
    const bool kernel = record.work == DeviceWork::kKernel;
    add(row->second, kernel ? ShortKernelName(record.name) : KindOf(record), KindOf(record),
        record.begin, record.end);
  }
  return nlohmann::json{{"traceEvents", events}, {"displayTimeUnit", "ms"}}.dump();
}

}  // namespace baleen
