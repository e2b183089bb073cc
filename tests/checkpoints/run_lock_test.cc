// The run lock: one owner, named in the error; stale only when provably so.
#include "checkpoints/run_lock.h"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <memory>

#include "absl/strings/str_cat.h"
#include "tests/checkpoints/state_support.h"
#include "tests/support/status_matchers.h"

namespace baleen {
namespace {

using testing::HasStatus;
using testing::IsOk;
using testing::ReadText;
using testing::TemporaryDirectory;
using testing::WriteText;

constexpr auto kEnvironment = absl::StatusCode::kFailedPrecondition;

// Runs `body` in a child; its exit status.
template <typename Body>
pid_t Fork(const Body& body) {
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::alarm(20);  // a lock that lets two in must not hang the test
    ::_exit(body());
  }
  return pid;
}

int Wait(pid_t pid) {
  int status = 0;
  CHECK_EQ(::waitpid(pid, &status, 0), pid);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

TEST(RunLock, IsGivenOnceAndNamesItsOwner) {
  const TemporaryDirectory dir;
  {
    ASSERT_OK_AND_ASSIGN(const RunLock lock, RunLock::Acquire(dir.path() + "/new/run", "slurm-42"));
    const absl::StatusOr<RunLock> second = RunLock::Acquire(dir.path() + "/new/run", "");
    for (const std::string& part : {std::string("run.lock"), absl::StrCat("process ", ::getpid()),
                                    std::string("job slurm-42"), std::string("since 20")}) {
      EXPECT_THAT(second, HasStatus(kEnvironment, part));
    }
    const auto mode = std::filesystem::status(lock.path()).permissions();
    EXPECT_EQ(static_cast<int>(mode) & 0777, 0600);
  }
  EXPECT_FALSE(FileExists(dir.path() + "/new/run/run.lock"));
  EXPECT_THAT(RunLock::Acquire(dir.path() + "/new/run", ""), IsOk());
}

TEST(RunLock, OfAKilledProcessIsTakenOver) {
  const TemporaryDirectory dir;
  const pid_t owner = Fork([&] {
    const absl::StatusOr<RunLock> lock = RunLock::Acquire(dir.path(), "");
    ::raise(SIGKILL);
    return 0;
  });
  EXPECT_EQ(Wait(owner), 128 + SIGKILL);
  EXPECT_TRUE(FileExists(dir.path() + "/run.lock"));
  ASSERT_OK_AND_ASSIGN(const RunLock lock, RunLock::Acquire(dir.path(), "second"));
  EXPECT_NE(ReadText(lock.path()).find(absl::StrCat("pid ", ::getpid(), "\n")), std::string::npos);
  EXPECT_NE(ReadText(lock.path()).find("job second\n"), std::string::npos);
}

// In a container whose first process reaps nobody, the dead owner keeps its process id for ever.
TEST(RunLock, OfAKilledProcessThatNobodyReapedIsTakenOver) {
  const TemporaryDirectory dir;
  const pid_t owner = Fork([&] {
    const absl::StatusOr<RunLock> lock = RunLock::Acquire(dir.path(), "");
    ::raise(SIGKILL);
    return 0;
  });
  siginfo_t info;
  ASSERT_EQ(::waitid(P_PID, static_cast<id_t>(owner), &info, WEXITED | WNOWAIT), 0);
  EXPECT_THAT(RunLock::Acquire(dir.path(), ""), IsOk());
  Wait(owner);
}

TEST(RunLock, OfAnotherHostOrOfALivingProcessIsNotBroken) {
  const TemporaryDirectory dir;
  const std::string path = dir.path() + "/run.lock";
  WriteText(path, "host elsewhere\npid 1\nprocess_start 5\njob 9\nstarted 2020-01-01T00:00:00Z\n");
  EXPECT_THAT(RunLock::Acquire(dir.path(), ""),
              HasStatus(kEnvironment, "host elsewhere, process 1, job 9"));
  char host[256] = {};
  ASSERT_EQ(::gethostname(host, sizeof(host) - 1), 0);
  // Alive (this very process) but without flock, as on a file system that has none.
  WriteText(path, absl::StrCat("host ", host, "\npid ", ::getpid(), "\njob none\n"));
  EXPECT_THAT(RunLock::Acquire(dir.path(), ""), HasStatus(kEnvironment, "belongs to another run"));
  // The id is in use again, by a process that started at another time.
  WriteText(path,
            absl::StrCat("host ", host, "\npid ", ::getpid(), "\nprocess_start 1\njob none\n"));
  EXPECT_THAT(RunLock::Acquire(dir.path(), ""), IsOk());
  WriteText(path, "\x1b[2J torn");
  const absl::StatusOr<RunLock> torn = RunLock::Acquire(dir.path(), "");
  EXPECT_THAT(torn, HasStatus(kEnvironment, "found no host and process in it"));
  EXPECT_THAT(torn, HasStatus(kEnvironment, "remove this file"));
}

TEST(RunLock, OfAnEarlierStartOfTheSameJobIsTakenOver) {
  const TemporaryDirectory dir;
  const std::string path = dir.path() + "/run.lock";
  const std::string lost = "host lost\npid 1\nprocess_start 5\njob 42 restart 1\nstarted then\n";
  for (const char* other : {"", "42", "42 restart 1", "43 restart 2"}) {
    WriteText(path, lost);
    EXPECT_THAT(RunLock::Acquire(dir.path(), other), HasStatus(kEnvironment, "host lost")) << other;
  }
  EXPECT_THAT(RunLock::Acquire(dir.path(), "42 restart 2"), IsOk());
}

TEST(RunLock, AHundredRacesHaveOneOwnerEach) {
  for (int race = 0; race < 100; ++race) {
    const TemporaryDirectory dir;
    // Half of the races start from the lock of a dead process.
    if (race % 2 == 1) {
      Wait(Fork([&] {
        const absl::StatusOr<RunLock> lock = RunLock::Acquire(dir.path(), "");
        ::_exit(0);
        return 0;
      }));
    }
    int gate[2], hold[2];
    ASSERT_EQ(::pipe(gate), 0);
    ASSERT_EQ(::pipe(hold), 0);
    std::vector<pid_t> runners;
    for (int i = 0; i < 4; ++i) {
      runners.push_back(Fork([&] {
        ::close(gate[1]);
        ::close(hold[1]);
        char byte;
        if (::read(gate[0], &byte, 1) != 0) return 9;  // until the parent opens the gate
        const absl::StatusOr<RunLock> lock = RunLock::Acquire(dir.path(), "");
        if (!lock.ok()) return absl::IsFailedPrecondition(lock.status()) ? 1 : 9;
        // The winner keeps the lock until the losers are gone.
        return ::read(hold[0], &byte, 1) == 0 ? 0 : 9;
      }));
    }
    ::close(gate[1]);
    int losers = 0, winners = 0;
    for (int i = 0; i < 3; ++i) {
      int status = 0;
      ASSERT_GT(::waitpid(-1, &status, 0), 0);
      losers += WIFEXITED(status) && WEXITSTATUS(status) == 1;
    }
    ::close(hold[1]);
    int status = 0;
    ASSERT_GT(::waitpid(-1, &status, 0), 0);
    winners += WIFEXITED(status) && WEXITSTATUS(status) == 0;
    ::close(gate[0]);
    ::close(hold[0]);
    ASSERT_EQ(winners, 1) << race;
    ASSERT_EQ(losers, 3) << race;
  }
}

}  // namespace
}  // namespace baleen
