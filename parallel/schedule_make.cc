// MakeSchedule: which numbers a policy can have, and which function makes its lists.
#include <algorithm>

#include "parallel/schedule.h"
#include "parallel/schedule_policies.h"

namespace baleen {
namespace {

// Counts nearest to `number` that `divisor` divides.
std::string NearestMultiples(int number, int divisor) {
  const int below = number / divisor * divisor;
  return below > 0 ? absl::StrCat(below, " or ", below + divisor) : absl::StrCat(divisor);
}

absl::Status CheckParts(const ScheduleSpec& spec) {
  const absl::string_view name = Name(spec.policy);
  switch (spec.policy) {
    case SchedulePolicy::kInterleaved:
      if (spec.parts_per_rank >= 2) return absl::OkStatus();
      return ConfigError("schedule interleaved: ", spec.parts_per_rank,
                         " part a rank; expected 2 or more (nearest: 2, or schedule 1f1b)");
    case SchedulePolicy::kZbv:
    case SchedulePolicy::kDualPipeV:
      if (spec.parts_per_rank == 2) return absl::OkStatus();
      return ConfigError("schedule ", name, ": ", spec.parts_per_rank,
                         " parts a rank; expected 2 (the two arms of the V)");
    default:
      if (spec.parts_per_rank == 1) return absl::OkStatus();
      return ConfigError("schedule ", name, ": ", spec.parts_per_rank,
                         " parts a rank; expected 1 (several: schedule interleaved)");
  }
}

absl::Status CheckMicrobatches(const ScheduleSpec& spec) {
  const int ranks = spec.num_ranks;
  const int microbatches = spec.num_microbatches;
  constexpr char kWhat[] =
      " microbatches a step (global_batch_size / micro_batch_size / data-parallel ranks)";
  if (spec.forward_only) return absl::OkStatus();
  if (spec.policy == SchedulePolicy::kInterleaved && microbatches % ranks != 0) {
    return ConfigError(
        "schedule interleaved: ", microbatches, kWhat, " do not divide among ", ranks,
        " pipeline ranks; nearest that fit: ", NearestMultiples(microbatches, ranks));
  }
  if (spec.policy == SchedulePolicy::kDualPipeV && microbatches < 2 * ranks) {
    const std::string fewer_ranks =
        microbatches < 2 ? "" : absl::StrCat(", or ", microbatches / 2, " pipeline ranks");
    return ConfigError("schedule dualpipev: ", microbatches, kWhat, " are too few for ", ranks,
                       " pipeline ranks; it needs 2 a rank: nearest that fit: ", 2 * ranks,
                       " microbatches", fewer_ranks);
  }
  return absl::OkStatus();
}

Program MakeProgram(const ScheduleSpec& spec, int rank) {
  switch (spec.policy) {
    case SchedulePolicy::kGpipe:
      return spec.forward_only ? ForwardProgram(spec, rank) : GpipeProgram(spec, rank);
    case SchedulePolicy::k1F1B:
      return spec.forward_only ? ForwardProgram(spec, rank) : OneFOneBProgram(spec, rank);
    case SchedulePolicy::kZbH1:
      return spec.forward_only ? ForwardProgram(spec, rank) : ZbH1Program(spec, rank);
    case SchedulePolicy::kInterleaved:
      return spec.forward_only ? InterleavedForwardProgram(spec, rank)
                               : InterleavedProgram(spec, rank);
    case SchedulePolicy::kZbv:
      return spec.forward_only ? VForwardProgram(spec, rank) : ZbvProgram(spec, rank);
    case SchedulePolicy::kDualPipeV:
      return spec.forward_only ? VForwardProgram(spec, rank) : DualPipeVProgram(spec, rank);
  }
  return {};
}

}  // namespace

absl::StatusOr<Schedule> MakeSchedule(const ScheduleSpec& spec) {
  if (spec.num_ranks < 1 || spec.num_microbatches < 1) {
    return ConfigError("schedule ", Name(spec.policy), ": ", spec.num_microbatches,
                       " microbatches on ", spec.num_ranks,
                       " pipeline ranks; expected 1 or more of each");
  }
  RETURN_IF_ERROR(CheckParts(spec));
  RETURN_IF_ERROR(CheckMicrobatches(spec));
  Schedule schedule;
  schedule.spec = spec;
  schedule.part_rank = PartRanks(spec.policy, spec.num_ranks, spec.parts_per_rank);
  for (int rank = 0; rank < spec.num_ranks; ++rank) {
    schedule.programs.push_back(MakeProgram(spec, rank));
  }
  return schedule;
}

}  // namespace baleen
