// CheckSchedule: a replay of all ranks in which a send waits until its receiver stands at the
// matching receive.
//
// As receives stand in the lists and block, what an action needs must be there when its turn comes:
// only messages wait. The first action that cannot be right stops the replay; if all that are left
// wait, that is a deadlock.
#include <algorithm>
#include <optional>

#include "absl/strings/str_format.h"
#include "parallel/schedule.h"

namespace baleen {
namespace {

bool IsSend(ActionKind kind) {
  return kind == ActionKind::kSendActivation || kind == ActionKind::kSendGradient;
}

bool IsRecv(ActionKind kind) {
  return kind == ActionKind::kRecvActivation || kind == ActionKind::kRecvGradient;
}

bool CarriesActivation(ActionKind kind) {
  return kind == ActionKind::kSendActivation || kind == ActionKind::kRecvActivation;
}

// What has happened to one microbatch in one part.
struct State {
  bool forward = false, input = false, weight = false;
  bool sent_activation = false, sent_gradient = false;
  bool received_activation = false, received_gradient = false;
};

class Replay {
 public:
  explicit Replay(const Schedule& schedule)
      : schedule_(schedule),
        num_ranks_(static_cast<int>(schedule.programs.size())),
        states_(schedule.num_parts() * schedule.spec.num_microbatches),
        next_(num_ranks_, 0),
        live_to_weight_(num_ranks_, 0),
        live_to_input_(num_ranks_, 0),
        received_(num_ranks_, 0),
        report_{live_to_weight_, live_to_input_, received_} {}

  absl::StatusOr<ScheduleReport> Run() {
    for (bool moved = true; moved;) {
      moved = false;
      for (int rank = 0; rank < num_ranks_; ++rank) {
        while (Step(rank)) moved = true;
        if (!fault_.empty()) return Refuse({rank}, fault_);
      }
    }
    for (int rank = 0; rank < num_ranks_; ++rank) {
      if (!Finished(rank)) return RefuseDeadlock(rank);
    }
    return Complete();
  }

 private:
  bool Finished(int rank) const { return next_[rank] == schedule_.programs[rank].size(); }
  const Action& Current(int rank) const { return schedule_.programs[rank][next_[rank]]; }
  int last_part() const { return schedule_.num_parts() - 1; }

  State& At(int part, int microbatch) {
    return states_[static_cast<size_t>(part) * schedule_.spec.num_microbatches + microbatch];
  }

  bool Fault(std::string text) {
    fault_ = std::move(text);
    return false;
  }

  bool SameRank(int part, int other) const {
    return schedule_.part_rank[part] == schedule_.part_rank[other];
  }

  // Whether the place exists and is this rank's.
  bool Holds(int rank, int part, int microbatch) {
    if (part < 0 || part > last_part() || microbatch < 0 ||
        microbatch >= schedule_.spec.num_microbatches) {
      return Fault(absl::StrCat("there is no part ", part, " microbatch ", microbatch));
    }
    if (schedule_.part_rank[part] != rank) {
      return Fault(absl::StrCat("part ", part, " lies on rank ", schedule_.part_rank[part]));
    }
    return true;
  }

  bool Step(int rank) {
    if (Finished(rank)) return false;
    const Action& action = Current(rank);
    if (!Holds(rank, action.part, action.microbatch)) return false;
    bool done = false;
    switch (action.kind) {
      case ActionKind::kForward:
        done = Forward(rank, action.part, action.microbatch);
        break;
      case ActionKind::kBackwardInput:
        done = BackwardInput(rank, action.part, action.microbatch);
        break;
      case ActionKind::kBackwardWeight:
        done = BackwardWeight(rank, action.part, action.microbatch);
        break;
      case ActionKind::kForwardBackward:
        // Both are under way at once: the forward's activations live before the other's are let go.
        done = Holds(rank, action.backward_part, action.backward_microbatch) &&
               Forward(rank, action.part, action.microbatch) &&
               BackwardInput(rank, action.backward_part, action.backward_microbatch);
        break;
      default:
        return Message(rank, action);
    }
    if (done) ++next_[rank];
    return done;
  }

  bool Forward(int rank, int part, int microbatch) {
    State& state = At(part, microbatch);
    if (state.forward) return Fault("this forward was done before");
    if (part > 0) {
      const bool local = SameRank(part - 1, part);
      if (local ? !At(part - 1, microbatch).forward : !state.received_activation) {
        return Fault(local ? absl::StrCat("forward before that of part ", part - 1)
                           : "forward before its activation was received");
      }
      if (!local) --received_[rank];
    }
    state.forward = true;
    Raise(live_to_weight_[rank], report_.peak_to_weight[rank]);
    Raise(live_to_input_[rank], report_.peak_to_input[rank]);
    if (schedule_.spec.forward_only) {
      --live_to_weight_[rank];
      --live_to_input_[rank];
    }
    return true;
  }

  bool BackwardInput(int rank, int part, int microbatch) {
    State& state = At(part, microbatch);
    if (schedule_.spec.forward_only) return Fault("a backward in a forward-only schedule");
    if (state.input) return Fault("this input gradient was done before");
    if (!state.forward) return Fault("input gradient before its forward");
    if (part < last_part()) {
      const bool local = SameRank(part + 1, part);
      if (local ? !At(part + 1, microbatch).input : !state.received_gradient) {
        return Fault(local ? absl::StrCat("input gradient before that of part ", part + 1)
                           : "input gradient before its output's gradient was received");
      }
      if (!local) --received_[rank];
    }
    state.input = true;
    --live_to_input_[rank];
    return true;
  }

  bool BackwardWeight(int rank, int part, int microbatch) {
    State& state = At(part, microbatch);
    if (schedule_.spec.forward_only) return Fault("a backward in a forward-only schedule");
    if (state.weight) return Fault("this weight gradient was done before");
    if (!state.input) return Fault("weight gradient before its input gradient");
    state.weight = true;
    --live_to_weight_[rank];
    return true;
  }

  // The part at the other end of a message, or -1.
  int OtherPart(const Action& action) const {
    const bool onward = CarriesActivation(action.kind) == IsSend(action.kind);
    const int part = action.part + (onward ? 1 : -1);
    return part > last_part() ? -1 : part;
  }

  bool Message(int rank, const Action& action) {
    State& state = At(action.part, action.microbatch);
    const int other = OtherPart(action);
    if (other < 0) return Fault("a message from or to beyond the ends of the model");
    if (action.peer != schedule_.part_rank[other] || action.peer == rank) {
      return Fault(
          absl::StrCat("wrong peer: part ", other, " lies on rank ", schedule_.part_rank[other]));
    }
    const bool activation = CarriesActivation(action.kind);
    if (IsRecv(action.kind)) {
      if (activation ? state.received_activation : state.received_gradient) {
        return Fault("this was received before");
      }
      return false;  // the sender moves both
    }
    if (activation ? state.sent_activation : state.sent_gradient)
      return Fault("this was sent before");
    if (activation ? !state.forward : !state.input) return Fault("sent before it was computed");
    return Meet(rank, action, other);
  }

  bool Meet(int rank, const Action& send, int other) {
    if (Finished(send.peer)) return false;
    const Action& receive = Current(send.peer);
    if (!IsRecv(receive.kind) || receive.peer != rank) return false;
    const bool activation = CarriesActivation(send.kind);
    if (CarriesActivation(receive.kind) != activation || receive.part != other ||
        receive.microbatch != send.microbatch) {
      return Fault(absl::StrCat("messages do not match: rank ", send.peer, " stands at ",
                                ActionString(receive)));
    }
    State& from = At(send.part, send.microbatch);
    State& to = At(other, send.microbatch);
    (activation ? from.sent_activation : from.sent_gradient) = true;
    (activation ? to.received_activation : to.received_gradient) = true;
    Raise(received_[send.peer], report_.peak_received[send.peer]);
    ++next_[rank];
    ++next_[send.peer];
    return true;
  }

  static void Raise(int& count, int& peak) { peak = std::max(peak, ++count); }

  // Nothing is left in any list: every microbatch must have passed every part.
  absl::StatusOr<ScheduleReport> Complete() {
    for (int part = 0; part <= last_part(); ++part) {
      for (int microbatch = 0; microbatch < schedule_.spec.num_microbatches; ++microbatch) {
        const State& state = At(part, microbatch);
        const bool backward = !schedule_.spec.forward_only;
        const char* missing = !state.forward              ? "F"
                              : backward && !state.input  ? "B"
                              : backward && !state.weight ? "W"
                                                          : nullptr;
        if (missing == nullptr) continue;
        return Refuse({schedule_.part_rank[part]},
                      absl::StrCat("the list ends without ", part, missing, microbatch));
      }
    }
    return report_;
  }

  // Follows who waits for whom until a rank comes again (a ring) or one that has ended.
  absl::Status RefuseDeadlock(int rank) {
    std::vector<int> waiting;
    std::string text = "deadlock: ";
    while (!Finished(rank) && std::find(waiting.begin(), waiting.end(), rank) == waiting.end()) {
      waiting.push_back(rank);
      absl::StrAppend(&text, "rank ", rank, " (", ActionString(Current(rank)), ") waits for ");
      rank = Current(rank).peer;
    }
    absl::StrAppend(&text, "rank ", rank, Finished(rank) ? ", whose list has ended" : "");
    return Refuse(waiting, text);
  }

  std::string Cell(int rank, int64_t at, bool stuck) const {
    const auto& program = schedule_.programs[rank];
    const int64_t size = static_cast<int64_t>(program.size());
    if (at < 0 || at > size) return "";
    const std::string text = at == size ? "end" : ActionString(program[at]);
    if (at != static_cast<int64_t>(next_[rank])) return text;
    return stuck ? absl::StrCat("[[", text, "]]") : absl::StrCat("[", text, "]");
  }

  // Each rank's list around where it stands, one under the other.
  absl::Status Refuse(const std::vector<int>& stuck, absl::string_view what) const {
    constexpr int kAround = 4;
    std::vector<std::vector<std::string>> rows(num_ranks_);
    size_t width = 0;
    for (int rank = 0; rank < num_ranks_; ++rank) {
      const bool marked = std::find(stuck.begin(), stuck.end(), rank) != stuck.end();
      for (int64_t column = -kAround; column <= kAround; ++column) {
        rows[rank].push_back(Cell(rank, static_cast<int64_t>(next_[rank]) + column, marked));
        width = std::max(width, rows[rank].back().size());
      }
    }
    std::string text =
        absl::StrCat("checking schedule ", Name(schedule_.spec.policy), " (", num_ranks_,
                     " ranks, ", schedule_.spec.num_microbatches, " microbatches): rank ", stuck[0],
                     ", action ", next_[stuck[0]], " ", Cell(stuck[0], next_[stuck[0]], true), ": ",
                     what, "\n  where each rank stands [ ], stuck [[ ]]:\n");
    for (int rank = 0; rank < num_ranks_; ++rank) {
      absl::StrAppend(&text, absl::StrFormat("  rank %-3d", rank));
      for (const std::string& cell : rows[rank]) {
        absl::StrAppend(&text, absl::StrFormat(" %-*s", static_cast<int>(width), cell));
      }
      text.erase(text.find_last_not_of(' ') + 1);
      text += "\n";
    }
    return absl::InternalError(text);
  }

  const Schedule& schedule_;
  const int num_ranks_;
  std::vector<State> states_;  // [part, microbatch]
  std::vector<size_t> next_;   // where each rank stands
  std::vector<int> live_to_weight_, live_to_input_, received_;
  ScheduleReport report_;
  std::string fault_;
};

}  // namespace

absl::StatusOr<ScheduleReport> CheckSchedule(const Schedule& schedule) {
  return Replay(schedule).Run();
}

}  // namespace baleen
