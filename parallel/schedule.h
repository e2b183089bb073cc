// A pipeline schedule is data: make -> lower -> check, then one engine runs each rank's list.
//
//   MakeSchedule      what each rank computes, in order (a policy: 1f1b, zbv, ...)
//   LowerSchedule     adds the messages, in one order that sender and receiver share
//   CheckSchedule     replays all ranks with blocking sends before step 1: deadlock, order,
//   matching, live microbatches SimulateSchedule  start and end times at given costs: bubble,
//   makespan; ScheduleGrid prints it
//
// The model is cut into parts 0 .. num_parts - 1 in the order of its layers; a rank holds one part
// or several. Algorithms and what each costs: docs/schedules.md.
#pragma once

#include <functional>
#include <string>
#include <vector>

#include "kernels/core/status.h"

namespace baleen {

enum class ActionKind : char {
  kForward = 'F',
  kBackwardInput = 'B',   // gradient with respect to the part's input
  kBackwardWeight = 'W',  // gradients of the part's weights; the activations may go after it
  kForwardBackward =
      'X',  // forward of one microbatch and input gradient of another, phases interleaved
  kSendActivation = 's',
  kRecvActivation = 'r',
  kSendGradient = 'S',
  kRecvGradient = 'R',
};

// `part` is always one of the acting rank's own: a message is named by the part that sends it on
// the sending rank and by the part that takes it on the receiving one.
struct Action {
  ActionKind kind = ActionKind::kForward;
  int part = 0;
  int microbatch = 0;
  int backward_part = -1;  // kForwardBackward only: whose input gradient
  int backward_microbatch = -1;
  int peer = -1;  // messages only: the other pipeline rank
  bool operator==(const Action&) const = default;
};

using Program = std::vector<Action>;

// The words of `parallelism.schedule`: gpipe, 1f1b, interleaved, zb_h1, zbv, dualpipev.
enum class SchedulePolicy { kGpipe, k1F1B, kInterleaved, kZbH1, kZbv, kDualPipeV };

absl::string_view Name(SchedulePolicy policy);
absl::StatusOr<SchedulePolicy> ParseSchedulePolicy(absl::string_view name);

struct ScheduleSpec {
  SchedulePolicy policy = SchedulePolicy::k1F1B;
  int num_ranks = 1;
  int parts_per_rank = 1;  // 1; interleaved: 2 or more; zbv and dualpipev: 2
  int num_microbatches = 1;
  bool forward_only = false;  // the warm-up: forwards only, parts on the same ranks as in training
};

struct Schedule {
  ScheduleSpec spec;
  std::vector<int> part_rank;     // [num_parts]: which rank holds a part
  std::vector<Program> programs;  // [num_ranks]
  int num_parts() const { return static_cast<int>(part_rank.size()); }
};

// Which rank holds each part: standard p -> p, looped p -> p mod P (interleaved), V-shaped p -> p
// or 2P - 1 - p (zbv, dualpipev: the first and the last part lie on rank 0).
std::vector<int> PartRanks(SchedulePolicy policy, int num_ranks, int parts_per_rank);

// The compute actions of every rank. ConfigError where the policy cannot have these numbers: which
// one, and the nearest that fit.
absl::StatusOr<Schedule> MakeSchedule(const ScheduleSpec& spec);

// Puts the messages between the compute actions. All ranks' actions and messages get one common
// order (by time at equal costs, neighbouring pairs in two rounds) and each rank's list follows it,
// so that no wait can form a ring even if every send blocks until it is received. An engine with
// asynchronous messages starts a Recv where it stands and waits for it before the action that needs
// it.
absl::StatusOr<Schedule> LowerSchedule(const Schedule& schedule);

// Live microbatches, counted in parts: an interleaved rank that holds one microbatch in two of its
// parts counts two.
struct ScheduleReport {
  std::vector<int> peak_to_weight;  // [num_ranks]: between F and W; 1 in a forward-only schedule
  std::vector<int> peak_to_input;   // [num_ranks]: between F and B
  std::vector<int> peak_received;   // [num_ranks]: tensors received and not yet used
};

// Replays a lowered schedule with blocking sends. What is wrong comes as an InternalError (a
// schedule is made by code) with the grid of actions around the stuck cell.
absl::StatusOr<ScheduleReport> CheckSchedule(const Schedule& schedule);

// Time of one action on one part, in any unit. A message takes `message` after its action and holds
// no rank up but the one that needs it.
struct ScheduleCosts {
  double forward = 1;
  double backward_input = 1;
  double backward_weight = 1;
  double forward_backward = 2;
  double message = 0;
};

struct TimedAction {
  Action action;
  double start = 0;
  double end = 0;
};

struct Timeline {
  std::vector<std::vector<TimedAction>> ranks;  // compute actions
  double makespan = 0;
  double Busy(int rank) const;
  double Bubble(int rank) const { return makespan - Busy(rank); }
  // Idle time between the rank's first and last action: the bubble where ranks need not start and
  // end a step together, as the Zero Bubble paper counts it.
  double InnerBubble(int rank) const;
};

// Messages in the lists are passed over, so that a schedule may be simulated before or after it is
// lowered.
absl::StatusOr<Timeline> SimulateSchedule(const Schedule& schedule, const ScheduleCosts& costs);
// The same with a duration for each compute action: parts of unequal length.
absl::StatusOr<Timeline> SimulateSchedule(const Schedule& schedule,
                                          const std::function<double(const Action&)>& duration,
                                          double message);

// Rows = ranks, columns = time slots of the shortest action; each row ends with its bubble. More
// than `max_slots` slots are cut and said to be.
std::string ScheduleGrid(const Timeline& timeline, int max_slots);

// "0F3": part, kind, microbatch; "0F3+5B1" interleaved; "0F3>1" activation sent to rank 1; "1F3<0"
// received from 0.
std::string ActionString(const Action& action);
std::string ProgramString(const Program& program);  // joined by spaces

}  // namespace baleen
