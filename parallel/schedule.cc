// Names, texts and the places of parts.
#include "parallel/schedule.h"

#include "absl/strings/str_join.h"
#include "kernels/core/check.h"

namespace baleen {
namespace {

constexpr const char* kNames[] = {"gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipev"};

}  // namespace

absl::string_view Name(SchedulePolicy policy) { return kNames[static_cast<int>(policy)]; }

absl::StatusOr<SchedulePolicy> ParseSchedulePolicy(absl::string_view name) {
  for (int i = 0; i < static_cast<int>(std::size(kNames)); ++i) {
    if (name == kNames[i]) return static_cast<SchedulePolicy>(i);
  }
  return ConfigError("parallelism.schedule = ", name, ": expected one of ",
                     absl::StrJoin(kNames, " | "));
}

std::vector<int> PartRanks(SchedulePolicy policy, int num_ranks, int parts_per_rank) {
  const bool v_shaped = policy == SchedulePolicy::kZbv || policy == SchedulePolicy::kDualPipeV;
  CHECK(!v_shaped || parts_per_rank == 2) << parts_per_rank << " parts on a rank of a V";
  std::vector<int> part_rank(num_ranks * parts_per_rank);
  for (int part = 0; part < static_cast<int>(part_rank.size()); ++part) {
    const bool way_back = v_shaped && part >= num_ranks;
    part_rank[part] = way_back ? 2 * num_ranks - 1 - part : part % num_ranks;
  }
  return part_rank;
}

std::string ActionString(const Action& action) {
  const std::string at = absl::StrCat(action.microbatch);
  switch (action.kind) {
    case ActionKind::kForward:
      return absl::StrCat(action.part, "F", at);
    case ActionKind::kBackwardInput:
      return absl::StrCat(action.part, "B", at);
    case ActionKind::kBackwardWeight:
      return absl::StrCat(action.part, "W", at);
    case ActionKind::kForwardBackward:
      return absl::StrCat(action.part, "F", at, "+", action.backward_part, "B",
                          action.backward_microbatch);
    case ActionKind::kSendActivation:
      return absl::StrCat(action.part, "F", at, ">", action.peer);
    case ActionKind::kRecvActivation:
      return absl::StrCat(action.part, "F", at, "<", action.peer);
    case ActionKind::kSendGradient:
      return absl::StrCat(action.part, "B", at, ">", action.peer);
    case ActionKind::kRecvGradient:
      return absl::StrCat(action.part, "B", at, "<", action.peer);
  }
  return "?";
}

std::string ProgramString(const Program& program) {
  return absl::StrJoin(program, " ", [](std::string* out, const Action& action) {
    absl::StrAppend(out, ActionString(action));
  });
}

}  // namespace baleen
