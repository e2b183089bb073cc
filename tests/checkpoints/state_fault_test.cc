// Every file operation of a save fails or is the last one: no earlier state is lost, nothing wrong
// is published.
//
// A child process saves step 3 over a run that holds steps 1 and 2, and prunes. The fault moves
// from the first to the last operation; the parent then looks at what is on disk, without faults.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <map>
#include <set>

#include "absl/strings/match.h"
#include "absl/strings/str_split.h"
#include "checkpoints/state_directory.h"
#include "checkpoints/state_writer.h"
#include "kernels/core/file.h"
#include "tests/checkpoints/io_faults.h"
#include "tests/checkpoints/state_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::ArmFaults;
using testing::CheckState;
using testing::DisarmFaults;
using testing::Fault;
using testing::FaultPlan;
using testing::IsOk;
using testing::Layout;
using testing::SaveState;
using testing::TemporaryDirectory;
using testing::TestTensor;

// How the child ends.
constexpr int kSaved = 0;
constexpr int kReported =
    1;  // the save failed and said so; a second one in the same process succeeded
constexpr int kSecondFailed =
    2;  // the save failed, and so did the second although nothing failed any more
constexpr int kNotReached = 3;  // there are fewer operations than `nth`

// Few and small: the number of operations is that of a real save of two ranks, the time is not.
std::vector<TestTensor> Tensors() {
  return {
      {"adam_m/w", {6, 4}, DType::kF32}, {"w", {6, 4}, DType::kF32}, {"position", {}, DType::kI64}};
}

Layout TwoRanks() {
  const Box left = {{0, 0}, {6, 2}}, right = {{0, 2}, {6, 2}}, whole = {{0, 0}, {6, 4}};
  return {{{0, left, 0, 12}, {1, whole, 0, 11}, {2, {}, 0, 1}},
          {{0, right, 0, 12}, {1, whole, 11, 13}}};
}

// Saves step 3, prunes; after a failure saves step 4 with no more faults.
int SaveUnderFault(const std::string& dir, const FaultPlan& plan) {
  const Layout layout = TwoRanks();
  ArmFaults(plan);
  const absl::StatusOr<std::string> saved = SaveState(dir, 3, Tensors(), layout);
  absl::Status pruned;
  if (saved.ok()) pruned = PruneStates(dir, 2).status();
  const bool reached = DisarmFaults() >= plan.nth;
  if (!reached) return kNotReached;
  if (saved.ok()) return kSaved;
  return SaveState(dir, 4, Tensors(), layout).ok() ? kReported : kSecondFailed;
}

int RunChild(const std::string& dir, const FaultPlan& plan) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    const int code = SaveUnderFault(dir, plan);
    ::_exit(code);
  }
  int status = 0;
  CHECK_EQ(::waitpid(pid, &status, 0), pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status);
}

class StateFault : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const int step : {1, 2})
      ASSERT_THAT(SaveState(base_.path(), step, Tensors(), TwoRanks()), IsOk());
  }

  // What a restart finds: a state that is whole and holds the values of its own step.
  int64_t NewestStep(const std::string& dir) {
    absl::StatusOr<UsableState> usable = FindNewestUsable(dir, DamagePolicy::kReport);
    EXPECT_THAT(usable, IsOk());
    if (!usable.ok() || !usable->reader) return -1;
    EXPECT_TRUE(usable->set_aside.empty()) << usable->set_aside[0];
    const int64_t step = usable->reader->metadata().step;
    EXPECT_THAT(CheckState(*usable->reader, step, Tensors(), TwoRanks()), IsOk());
    return step;
  }

  // Calls `check(exit code, directory)` for a fault at each operation; returns how many operations
  // there were.
  template <typename Check>
  int AtEveryOperation(Fault fault, int error, const Check& check) {
    for (int nth = 1; nth < 2000; ++nth) {
      SCOPED_TRACE(absl::StrCat("operation ", nth));
      const TemporaryDirectory dir;
      std::filesystem::copy(base_.path(), dir.path(), std::filesystem::copy_options::recursive);
      const int code = RunChild(dir.path(), {fault, nth, error});
      if (code == kNotReached) return nth - 1;
      check(code, dir.path());
      if (HasFailure()) return -1;
    }
    ADD_FAILURE() << "no end of operations";
    return -1;
  }

  TemporaryDirectory base_;
};

TEST_F(StateFault, AKillAtAnyOperationLeavesTheEarlierOrTheNewState) {
  for (const Fault fault : {Fault::kKill, Fault::kKillTorn}) {
    int old_states = 0, new_states = 0;
    const int operations = AtEveryOperation(fault, 0, [&](int code, const std::string& dir) {
      EXPECT_EQ(code, testing::kKilledExit);
      const int64_t step = NewestStep(dir);
      EXPECT_TRUE(step == 2 || step == 3) << step;
      ++(step == 2 ? old_states : new_states);
      // A later run goes on and cleans up.
      EXPECT_THAT(SaveState(dir, 5, Tensors(), TwoRanks()), IsOk());
      EXPECT_THAT(PruneStates(dir, 2), IsOk());
      EXPECT_EQ(NewestStep(dir), 5);
      EXPECT_THAT(ListNames(dir).value(),
                  ::testing::Not(::testing::Contains(::testing::HasSubstr(".tmp"))));
    });
    EXPECT_GT(operations, 40);
    EXPECT_GT(old_states, 20);
    EXPECT_GT(new_states, 5);
  }
}

TEST_F(StateFault, AnErrorOnceIsReportedAndTheNextSaveInTheSameProcessSucceeds) {
  for (const int error : {ENOSPC, EIO}) {
    int reported = 0;
    const int operations =
        AtEveryOperation(Fault::kErrorOnce, error, [&](int code, const std::string& dir) {
          EXPECT_TRUE(code == kSaved || code == kReported) << code;
          reported += code == kReported;
          // What was reported as saved is saved; what was not left no trace, or is whole.
          EXPECT_EQ(NewestStep(dir), code == kSaved ? 3 : 4);
          if (code == kSaved) return;
          const std::vector<std::string> names = ListNames(dir).value();
          EXPECT_THAT(names,
                      ::testing::IsSupersetOf({"step-00000001", "step-00000002", "step-00000004"}));
          EXPECT_THAT(names, ::testing::Not(::testing::Contains(::testing::HasSubstr(".tmp"))));
        });
    EXPECT_GT(operations, 40);
    EXPECT_GT(reported, 20);
  }
}

TEST_F(StateFault, AnErrorForEverIsReportedAndLosesNothing) {
  for (const int error : {ENOSPC, EIO}) {
    int reported = 0;
    const int operations =
        AtEveryOperation(Fault::kErrorForever, error, [&](int code, const std::string& dir) {
          // The files of the failed save could not even be removed; the next save does not mind.
          EXPECT_TRUE(code == kSaved || code == kReported) << code;
          reported += code == kReported;
          EXPECT_EQ(NewestStep(dir), code == kSaved ? 3 : 4);
          EXPECT_TRUE(DirectoryExists(JoinPath(dir, "step-00000002")));
        });
    EXPECT_GT(operations, 40);
    EXPECT_GT(reported, 20);
  }
}

TEST_F(StateFault, ShortWritesAndInterruptionsChangeNothing) {
  const int code = RunChild(base_.path(), {Fault::kInterrupted, 1, 0});
  EXPECT_EQ(code, kSaved);
  EXPECT_EQ(NewestStep(base_.path()), 3);
}

// Power loss: what was not synced is lost. So whatever is renamed into sight was synced before,
// names included.
TEST_F(StateFault, NothingIsRenamedIntoSightBeforeItIsSynced) {
  ArmFaults({});
  const absl::StatusOr<std::string> saved = SaveState(base_.path(), 3, Tensors(), TwoRanks());
  DisarmFaults();
  ASSERT_THAT(saved, IsOk());
  std::set<std::string> dirty;  // files with unsynced bytes, directories with unsynced names
  int publications = 0;
  const auto parent = [](const std::string& path) { return path.substr(0, path.rfind('/')); };
  const std::vector<std::string>& trace = testing::FaultTrace();
  for (size_t i = 0; i < trace.size(); ++i) {
    const std::string& line = trace[i];
    const std::vector<std::string> words = absl::StrSplit(line, ' ');
    if (words[0] == "write") dirty.insert(words[1]);
    if (words[0] == "create" || words[0] == "mkdir") dirty.insert(parent(words[1]));
    if (words[0] == "fsync") dirty.erase(words[1]);
    if (words[0] != "rename") continue;
    for (const std::string& path : dirty) {
      EXPECT_FALSE(absl::StartsWith(path, words[1])) << path << " is not synced before " << line;
    }
    dirty.insert(parent(words[2]));
    if (!absl::EndsWith(words[2], "step-00000003")) continue;
    ++publications;
    ASSERT_LT(i + 1, trace.size());
    EXPECT_EQ(trace[i + 1], "fsync " + base_.path()) << "before the save is reported as done";
  }
  EXPECT_EQ(publications, 1);
  EXPECT_TRUE(dirty.empty()) << *dirty.begin() << " is never synced";
}

}  // namespace
}  // namespace baleen
