// ScheduleGrid: a timeline as text. An action stands at the slot where it starts and is drawn out
// with '-' over the slots it fills; an empty slot is a wait.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "parallel/schedule.h"

namespace baleen {
namespace {

// The shortest action that takes time: one slot.
double SlotTime(const Timeline& timeline) {
  double slot = timeline.makespan;
  for (const auto& rank : timeline.ranks) {
    for (const TimedAction& timed : rank) {
      if (timed.end > timed.start) slot = std::min(slot, timed.end - timed.start);
    }
  }
  return slot;
}

size_t CellWidth(const Timeline& timeline) {
  size_t width = 1;
  for (const auto& rank : timeline.ranks) {
    for (const TimedAction& timed : rank)
      width = std::max(width, ActionString(timed.action).size());
  }
  return width + 1;
}

}  // namespace

std::string ScheduleGrid(const Timeline& timeline, int max_slots) {
  const double slot = SlotTime(timeline);
  if (slot <= 0) return "(no action takes time)\n";
  const size_t width = CellWidth(timeline);
  const int slots = static_cast<int>(std::ceil(timeline.makespan / slot - 1e-9));
  const int shown = std::min(slots, max_slots);
  std::string text = absl::StrFormat("%-9s", "time");
  for (int s = 0; s < shown; ++s) absl::StrAppend(&text, absl::StrFormat("%-*g", width, s * slot));
  absl::StrAppend(&text, shown < slots ? absl::StrCat("... to ", timeline.makespan, " ") : "",
                  "| bubble\n");
  for (int rank = 0; rank < static_cast<int>(timeline.ranks.size()); ++rank) {
    std::string line(shown * width, ' ');
    for (const TimedAction& timed : timeline.ranks[rank]) {
      const size_t begin = static_cast<size_t>(std::llround(timed.start / slot)) * width;
      const size_t end = static_cast<size_t>(std::llround(timed.end / slot)) * width;
      if (begin >= line.size() || end <= begin) continue;
      std::string cell = ActionString(timed.action);
      cell.resize(end - begin - 1, '-');
      line.replace(begin, std::min(cell.size(), line.size() - begin),
                   cell.substr(0, line.size() - begin));
    }
    absl::StrAppend(&text, absl::StrFormat("rank %-3d ", rank), line,
                    absl::StrFormat("| %.1f%%\n", 100 * timeline.Bubble(rank) / timeline.makespan));
  }
  return text;
}

}  // namespace baleen
