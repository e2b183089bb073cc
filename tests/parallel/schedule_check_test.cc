// The schedule checker: schedules with an error put into them are refused with the stuck cell
// marked.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>
#include <set>

#include "parallel/schedule.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using ::testing::HasSubstr;
using testing::IsOk;
using Random = std::mt19937;

int Uniform(Random& random, int low, int high) {
  return std::uniform_int_distribution<int>(low, high)(random);
}

bool IsMessage(const Action& action) { return action.peer >= 0; }

bool IsSend(const Action& action) {
  return action.kind == ActionKind::kSendActivation || action.kind == ActionKind::kSendGradient;
}

// A lowered schedule of random policy and size, valid as it is.
Schedule RandomSchedule(Random& random) {
  ScheduleSpec spec;
  spec.policy = static_cast<SchedulePolicy>(Uniform(random, 0, 5));
  spec.num_ranks = Uniform(random, 2, 6);
  const bool v = spec.policy == SchedulePolicy::kZbv || spec.policy == SchedulePolicy::kDualPipeV;
  const bool looped = spec.policy == SchedulePolicy::kInterleaved;
  spec.parts_per_rank = v ? 2 : looped ? Uniform(random, 2, 3) : 1;
  spec.num_microbatches = spec.num_ranks * Uniform(random, v ? 2 : 1, 4);
  spec.forward_only = Uniform(random, 0, 7) == 0;
  const absl::StatusOr<Schedule> schedule = MakeSchedule(spec);
  EXPECT_THAT(schedule.status(), IsOk());
  const absl::StatusOr<Schedule> lowered = LowerSchedule(*schedule);
  EXPECT_THAT(lowered.status(), IsOk());
  EXPECT_THAT(CheckSchedule(*lowered).status(), IsOk());
  return *lowered;
}

// The (part, microbatch) pairs an action works on.
std::set<std::pair<int, int>> Touched(const Action& action) {
  std::set<std::pair<int, int>> touched = {{action.part, action.microbatch}};
  if (action.kind == ActionKind::kForwardBackward)
    touched.insert({action.backward_part, action.backward_microbatch});
  return touched;
}

// Two actions on one microbatch of one part have a fixed order, but for the gradient's send and the
// weight gradient.
bool OrderMatters(const Action& a, const Action& b) {
  const std::set<ActionKind> kinds = {a.kind, b.kind};
  if (kinds == std::set<ActionKind>{ActionKind::kSendGradient, ActionKind::kBackwardWeight})
    return false;
  for (const auto& place : Touched(a)) {
    if (Touched(b).contains(place)) return true;
  }
  return false;
}

// What was done to the schedule, and what the refusal must say about where (empty: only that a cell
// is marked).
struct Damage {
  std::string what;
  std::string where;
};

std::string CellAt(int rank, int at, const Action& action) {
  return absl::StrCat("rank ", rank, ", action ", at, " [[", ActionString(action), "]]");
}

Damage Drop(Random& random, Schedule& schedule) {
  Program& program = schedule.programs[Uniform(random, 0, schedule.spec.num_ranks - 1)];
  const int at = Uniform(random, 0, static_cast<int>(program.size()) - 1);
  const std::string what = absl::StrCat("dropped ", ActionString(program[at]));
  program.erase(program.begin() + at);
  return {what, ""};
}

Damage Swap(Random& random, Schedule& schedule) {
  while (true) {
    Program& program = schedule.programs[Uniform(random, 0, schedule.spec.num_ranks - 1)];
    const int i = Uniform(random, 0, static_cast<int>(program.size()) - 1);
    const int j = Uniform(random, 0, static_cast<int>(program.size()) - 1);
    if (i == j || !OrderMatters(program[i], program[j])) continue;
    std::swap(program[i], program[j]);
    return {absl::StrCat("swapped ", ActionString(program[i]), " and ", ActionString(program[j])),
            ""};
  }
}

Damage WrongPeer(Random& random, Schedule& schedule) {
  while (true) {
    const int rank = Uniform(random, 0, schedule.spec.num_ranks - 1);
    const int at = Uniform(random, 0, static_cast<int>(schedule.programs[rank].size()) - 1);
    Action& action = schedule.programs[rank][at];
    if (!IsMessage(action)) continue;
    const int step = Uniform(random, 1, schedule.spec.num_ranks - 1);
    action.peer = (action.peer + step) % schedule.spec.num_ranks;
    return {absl::StrCat("wrong peer ", ActionString(action)),
            IsSend(action) ? CellAt(rank, at, action) : ""};
  }
}

Damage Duplicate(Random& random, Schedule& schedule) {
  const int rank = Uniform(random, 0, schedule.spec.num_ranks - 1);
  Program& program = schedule.programs[rank];
  const int at = Uniform(random, 0, static_cast<int>(program.size()) - 1);
  const int to = Uniform(random, 0, 1) == 0
                     ? at + 1
                     : Uniform(random, at + 1, static_cast<int>(program.size()));
  const Action action = program[at];
  program.insert(program.begin() + to, action);
  const bool next_to = to == at + 1 && !IsMessage(action);
  return {absl::StrCat("duplicated ", ActionString(action)),
          next_to ? CellAt(rank, to, action) : ""};
}

TEST(ScheduleCheck, RefusesEveryInjectedErrorWithTheStuckCellMarked) {
  Random random(20251122);
  constexpr int kCasesOfEach = 100;
  int located = 0;
  for (auto damage : {Drop, Swap, WrongPeer, Duplicate}) {
    for (int i = 0; i < kCasesOfEach; ++i) {
      Schedule schedule = RandomSchedule(random);
      const Damage done = damage(random, schedule);
      SCOPED_TRACE(absl::StrCat(Name(schedule.spec.policy), " P ", schedule.spec.num_ranks, " M ",
                                schedule.spec.num_microbatches, ": ", done.what));
      const absl::Status status = CheckSchedule(schedule).status();
      ASSERT_EQ(status.code(), absl::StatusCode::kInternal);
      EXPECT_THAT(std::string(status.message()), HasSubstr("[["));
      EXPECT_THAT(std::string(status.message()), HasSubstr(done.where));
      located += done.where.empty() ? 0 : 1;
    }
  }
  EXPECT_GT(located, 50);
}

// Two pipeline ranks of one part each, two microbatches.
Schedule TwoRanks(Program first, Program second) {
  return {{SchedulePolicy::k1F1B, 2, 1, 2, false}, {0, 1}, {std::move(first), std::move(second)}};
}

constexpr ActionKind kF = ActionKind::kForward;
constexpr ActionKind kB = ActionKind::kBackwardInput;
constexpr ActionKind kW = ActionKind::kBackwardWeight;

Action SendActivation(int part, int microbatch, int peer) {
  return {ActionKind::kSendActivation, part, microbatch, -1, -1, peer};
}
Action RecvActivation(int part, int microbatch, int peer) {
  return {ActionKind::kRecvActivation, part, microbatch, -1, -1, peer};
}
Action SendGradient(int part, int microbatch, int peer) {
  return {ActionKind::kSendGradient, part, microbatch, -1, -1, peer};
}
Action RecvGradient(int part, int microbatch, int peer) {
  return {ActionKind::kRecvGradient, part, microbatch, -1, -1, peer};
}

TEST(ScheduleCheck, TwoRanksThatBothSendFirstAreADeadlock) {
  const Schedule schedule = TwoRanks({{kF, 0, 0},
                                      SendActivation(0, 0, 1),
                                      {kF, 0, 1},
                                      SendActivation(0, 1, 1),
                                      RecvGradient(0, 0, 1),
                                      {kB, 0, 0},
                                      {kW, 0, 0},
                                      RecvGradient(0, 1, 1),
                                      {kB, 0, 1},
                                      {kW, 0, 1}},
                                     {RecvActivation(1, 0, 0),
                                      {kF, 1, 0},
                                      {kB, 1, 0},
                                      SendGradient(1, 0, 0),
                                      {kW, 1, 0},
                                      RecvActivation(1, 1, 0),
                                      {kF, 1, 1},
                                      {kB, 1, 1},
                                      SendGradient(1, 1, 0),
                                      {kW, 1, 1}});
  const absl::Status status = CheckSchedule(schedule).status();
  EXPECT_EQ(std::string(status.message()),
            "checking schedule 1f1b (2 ranks, 2 microbatches): rank 0, action 3 [[0F1>1]]: "
            "deadlock: rank 0 (0F1>1) "
            "waits for rank 1 (1B0>0) waits for rank 0\n"
            "  where each rank stands [ ], stuck [[ ]]:\n"
            "  rank 0             0F0       0F0>1     0F1       [[0F1>1]] 0B0<1     0B0       0W0  "
            "     0B1<1\n"
            "  rank 1             1F0<0     1F0       1B0       [[1B0>0]] 1W0       1F1<0     1F1  "
            "     1B1\n");
}

TEST(ScheduleCheck, NamesWhatIsWrong) {
  const Program second = {
      RecvActivation(1, 0, 0), {kF, 1, 0}, {kB, 1, 0}, SendGradient(1, 0, 0), {kW, 1, 0}};
  struct Case {
    Program first;
    Program second;
    const char* message;
  };
  for (Case c : std::vector<Case>{
           {{{kB, 0, 0}}, second, "input gradient before its forward"},
           {{{kF, 0, 0}, {kW, 0, 0}}, second, "weight gradient before its input gradient"},
           {{{kF, 0, 0}, {kF, 0, 0}}, second, "this forward was done before"},
           {{{kF, 0, 0}, {kB, 0, 0}},
            second,
            "input gradient before its output's gradient was received"},
           {{{kF, 0, 0}}, {{kF, 1, 0}}, "forward before its activation was received"},
           {{SendActivation(0, 0, 1)}, second, "sent before it was computed"},
           {{{kF, 0, 0}, SendActivation(0, 0, 0)}, second, "wrong peer: part 1 lies on rank 1"},
           {{{kF, 1, 0}}, second, "part 1 lies on rank 1"},
           {{{kF, 0, 2}}, second, "there is no part 0 microbatch 2"},
           {{{kF, 0, 1}, SendActivation(0, 1, 1)},
            second,
            "messages do not match: rank 1 stands at 1F0<0"},
           {{SendGradient(0, 0, 1)}, second, "beyond the ends of the model"},
           {{{kF, 0, 0}}, second, "waits for rank 0, whose list has ended"},
           {{{kF, 0, 0}, SendActivation(0, 0, 1), RecvGradient(0, 0, 1), {kB, 0, 0}},
            second,
            "rank 0, action 4 [[end]]: the list ends without 0W0"}}) {
    EXPECT_THAT(CheckSchedule(TwoRanks(c.first, c.second)),
                HasStatus(absl::StatusCode::kInternal, c.message));
  }
}

TEST(ScheduleCheck, ABackwardHasNoPlaceInAForwardOnlySchedule) {
  const Schedule schedule = {
      {SchedulePolicy::k1F1B, 1, 1, 1, true}, {0}, {{{kF, 0, 0}, {kB, 0, 0}}}};
  EXPECT_THAT(CheckSchedule(schedule),
              HasStatus(absl::StatusCode::kInternal, "[[0B0]]: a backward in a forward-only"));
}

TEST(ScheduleCheck, CountsAReceivedTensorUntilItIsUsed) {
  ASSERT_OK_AND_ASSIGN(const Schedule made, MakeSchedule({SchedulePolicy::kGpipe, 2, 1, 4}));
  ASSERT_OK_AND_ASSIGN(const Schedule lowered, LowerSchedule(made));
  ASSERT_OK_AND_ASSIGN(const ScheduleReport report, CheckSchedule(lowered));
  EXPECT_THAT(report.peak_received, ::testing::ElementsAre(1, 1));
}

}  // namespace
}  // namespace baleen
