// LowerSchedule: one common order of all ranks' actions and messages, of which each rank's list is
// its own part.
//
// In that order a message is a single event between its action and the action that needs it, so
// send and receive are neighbours: the first event not yet done can always be done, whatever its
// sends block on. Events are ordered by their time at equal costs; a message stands at the end of
// its action, so that nothing is sent later than it could be.
#include <algorithm>
#include <tuple>

#include "parallel/schedule.h"

namespace baleen {
namespace {

struct Event {
  double time;
  int order;  // at equal times: messages of even pairs, of odd pairs, then computation
  int pair;   // the lower of the two ranks
  int rank;   // who acts or sends
  Action action;
  Action received;  // what the peer does, for a message
};

auto Key(const Event& event) {
  return std::make_tuple(event.time, event.order, event.pair, event.rank, event.action.kind,
                         event.action.part, event.action.microbatch);
}

// The message that carries the result of `part` on to the part `to`, if that lies on another rank.
void AddMessage(const Schedule& schedule, int part, int to, int microbatch, double time,
                std::vector<Event>& events) {
  if (to < 0 || to >= schedule.num_parts()) return;
  const int sender = schedule.part_rank[part];
  const int receiver = schedule.part_rank[to];
  if (sender == receiver) return;
  const bool forward = to > part;
  Action send{forward ? ActionKind::kSendActivation : ActionKind::kSendGradient, part, microbatch};
  Action receive{forward ? ActionKind::kRecvActivation : ActionKind::kRecvGradient, to, microbatch};
  send.peer = receiver;
  receive.peer = sender;
  const int pair = std::min(sender, receiver);
  events.push_back({time, pair % 2, pair, sender, send, receive});
}

void AddEvents(const Schedule& schedule, int rank, const TimedAction& timed,
               std::vector<Event>& events) {
  constexpr int kCompute = 2;
  const Action& action = timed.action;
  events.push_back({timed.start, kCompute, rank, rank, action, {}});
  if (action.kind == ActionKind::kForward || action.kind == ActionKind::kForwardBackward) {
    AddMessage(schedule, action.part, action.part + 1, action.microbatch, timed.end, events);
  }
  if (action.kind == ActionKind::kBackwardInput) {
    AddMessage(schedule, action.part, action.part - 1, action.microbatch, timed.end, events);
  }
  if (action.kind == ActionKind::kForwardBackward) {
    AddMessage(schedule, action.backward_part, action.backward_part - 1, action.backward_microbatch,
               timed.end, events);
  }
}

}  // namespace

absl::StatusOr<Schedule> LowerSchedule(const Schedule& schedule) {
  // Every action takes time here, so that a rank's actions keep their order.
  ASSIGN_OR_RETURN(const Timeline timeline, SimulateSchedule(schedule, ScheduleCosts()));
  std::vector<Event> events;
  for (int rank = 0; rank < static_cast<int>(timeline.ranks.size()); ++rank) {
    for (const TimedAction& timed : timeline.ranks[rank]) AddEvents(schedule, rank, timed, events);
  }
  std::sort(events.begin(), events.end(),
            [](const Event& a, const Event& b) { return Key(a) < Key(b); });
  Schedule lowered = schedule;
  for (Program& program : lowered.programs) program.clear();
  for (const Event& event : events) {
    lowered.programs[event.rank].push_back(event.action);
    if (event.action.peer >= 0) lowered.programs[event.action.peer].push_back(event.received);
  }
  return lowered;
}

}  // namespace baleen
