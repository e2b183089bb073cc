#include "checkpoints/run_lock.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <map>

#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "kernels/core/log.h"

namespace baleen {
namespace {

constexpr char kLockName[] = "run.lock";
constexpr int kMostAttempts = 100;  // each lost attempt means that another process got further

std::string HostName() {
  char name[256] = {};
  return ::gethostname(name, sizeof(name) - 1) == 0 ? name : "unknown";
}

// What the kernel says of a process, from its state on: [0] the state, [19] when it was started, in
// ticks since boot. Empty when there is no such process or /proc does not show it.
std::vector<std::string> ProcessFields(int64_t pid) {
  FileDescriptor file(::open(absl::StrCat("/proc/", pid, "/stat").c_str(), O_RDONLY | O_CLOEXEC));
  char text[4096] = {};
  if (!file || ::read(file.get(), text, sizeof(text) - 1) <= 0) return {};
  // The command's name, in brackets, may hold anything; the state is the first field after it.
  const char* after = std::strrchr(text, ')');
  if (after == nullptr) return {};
  std::vector<std::string> fields = absl::StrSplit(after + 1, ' ', absl::SkipEmpty());
  return fields.size() > 19 ? fields : std::vector<std::string>();
}

std::string StartTicks(int64_t pid) {
  const std::vector<std::string> fields = ProcessFields(pid);
  return fields.empty() ? "" : fields[19];
}

std::string OwnerText(const std::string& job) {
  char when[64] = {};
  const std::time_t now = std::time(nullptr);
  struct tm utc;
  ::gmtime_r(&now, &utc);
  std::strftime(when, sizeof(when), "%Y-%m-%dT%H:%M:%SZ", &utc);
  return absl::StrCat("host ", HostName(), "\npid ", ::getpid(), "\nprocess_start ",
                      StartTicks(::getpid()), "\njob ", job.empty() ? "none" : job, "\nstarted ",
                      when, "\n");
}

std::map<std::string, std::string> ParseOwner(absl::string_view text) {
  std::map<std::string, std::string> fields;
  for (absl::string_view line : absl::StrSplit(text, '\n', absl::SkipEmpty())) {
    const std::pair<std::string, std::string> field = absl::StrSplit(line, absl::MaxSplits(' ', 1));
    fields.insert(field);
  }
  return fields;
}

std::string ReadAll(int descriptor) {
  char text[4096];
  const ssize_t n = ::pread(descriptor, text, sizeof(text), 0);
  return n > 0 ? std::string(text, static_cast<size_t>(n)) : "";
}

// The owner ran on this host and its process is gone: no such id, a dead process that its parent
// has not reaped (containers whose first process reaps nobody), or the id was given again.
bool IsGone(std::map<std::string, std::string>& owner) {
  int64_t pid = 0;
  if (owner["host"] != HostName() || !absl::SimpleAtoi(owner["pid"], &pid) || pid <= 0)
    return false;
  if (::kill(static_cast<pid_t>(pid), 0) != 0 && errno == ESRCH) return true;
  const std::vector<std::string> fields = ProcessFields(pid);
  if (fields.empty()) return false;
  if (fields[0] == "Z" || fields[0] == "X") return true;
  return !owner["process_start"].empty() && fields[19] != owner["process_start"];
}

// "42 restart 1": a Slurm job and how often it was requeued. It starts again only when it has ended
// on every node, so an owner that was an earlier start of the same job is gone, on whatever host.
bool IsEarlierStart(absl::string_view owner_job, absl::string_view job) {
  const auto id_and_start = [](absl::string_view text) {
    const std::pair<std::string, std::string> parts =
        absl::StrSplit(text, absl::MaxSplits(" restart ", 1));
    int64_t start = 0;
    if (!absl::SimpleAtoi(parts.second, &start)) start = 0;
    return std::pair(parts.first, start);
  };
  const auto owner = id_and_start(owner_job), mine = id_and_start(job);
  return !mine.first.empty() && owner.first == mine.first && owner.second < mine.second;
}

absl::Status Occupied(const std::string& path, std::map<std::string, std::string>& owner) {
  if (owner["host"].empty() || owner["pid"].empty()) {
    return EnvironmentError(path, ": found no host and process in it, expected the lock of a run. ",
                            "If no run works in this directory, remove this file.");
  }
  return EnvironmentError(path, ": the run directory belongs to another run: host ",
                          EscapeControl(owner["host"]), ", process ", EscapeControl(owner["pid"]),
                          ", job ", EscapeControl(owner["job"]), ", since ",
                          EscapeControl(owner["started"]),
                          ". Wait for it or stop it; if it is certainly gone, remove this file.");
}

absl::Status LockError(const std::string& path, absl::string_view doing) {
  return EnvironmentError(path, ": cannot ", doing, ": ", std::strerror(errno));
}

bool IsTheFileNamed(int descriptor, const std::string& path) {
  struct stat opened, named;
  return ::fstat(descriptor, &opened) == 0 && ::stat(path.c_str(), &named) == 0 &&
         opened.st_ino == named.st_ino && opened.st_dev == named.st_dev;
}

// A complete lock file under a name of its own, flock held.
absl::StatusOr<FileDescriptor> Prepare(const std::string& path, const std::string& job) {
  ::unlink(path.c_str());  // of an earlier process with this id
  FileDescriptor file(
      ::open(path.c_str(), O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!file) return LockError(path, "create");
  const std::string text = OwnerText(job);
  if (::write(file.get(), text.data(), text.size()) != static_cast<ssize_t>(text.size()) ||
      ::fsync(file.get()) != 0) {
    return LockError(path, "write");
  }
  // Some file systems have no flock; there, host and process decide alone.
  if (::flock(file.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
    return LockError(path, "lock");
  return file;
}

enum class Attempt { kOwned, kAgain };

// Links or renames the prepared file into place; kAgain when the lock changed hands meanwhile.
absl::StatusOr<Attempt> TryPlace(const std::string& prepared, const std::string& path,
                                 const std::string& job) {
  if (::link(prepared.c_str(), path.c_str()) == 0) return Attempt::kOwned;
  if (errno != EEXIST) return LockError(path, "create");
  FileDescriptor old(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  if (!old) {
    if (errno == ENOENT) return Attempt::kAgain;
    return LockError(path, "open");
  }
  const bool held = ::flock(old.get(), LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK;
  std::map<std::string, std::string> owner = ParseOwner(ReadAll(old.get()));
  if (held) {
    // Whoever takes a stale lock over holds the old file too, for an instant: then the name is of
    // another file soon.
    if (!IsTheFileNamed(old.get(), path)) return Attempt::kAgain;
    if (IsGone(owner)) return Attempt::kAgain;
    return Occupied(path, owner);
  }
  // With the old file's flock in hand nobody else can replace it; if somebody just did, look again.
  if (!IsTheFileNamed(old.get(), path)) return Attempt::kAgain;
  if (!IsGone(owner) && !IsEarlierStart(owner["job"], job)) return Occupied(path, owner);
  if (::rename(prepared.c_str(), path.c_str()) != 0) return LockError(path, "replace");
  return Attempt::kOwned;
}

}  // namespace

absl::StatusOr<RunLock> RunLock::Acquire(const std::string& run_dir, const std::string& job) {
  RETURN_IF_ERROR(MakeDirectories(run_dir));
  const std::string path = JoinPath(run_dir, kLockName);
  const std::string prepared = absl::StrCat(path, ".", HostName(), ".", ::getpid());
  ASSIGN_OR_RETURN(FileDescriptor file, Prepare(prepared, job));
  absl::Status status =
      EnvironmentError(path, ": the lock changed hands ", kMostAttempts, " times; try again");
  for (int attempt = 0; attempt < kMostAttempts; ++attempt) {
    const absl::StatusOr<Attempt> result = TryPlace(prepared, path, job);
    if (result.ok() && *result == Attempt::kOwned) {
      ::unlink(prepared.c_str());
      return RunLock(path, std::move(file));
    }
    if (!result.ok()) {
      status = result.status();
      break;
    }
    ::usleep(5000);
  }
  ::unlink(prepared.c_str());
  return status;
}

RunLock::~RunLock() {
  if (file_ && IsTheFileNamed(file_.get(), path_)) ::unlink(path_.c_str());
}

}  // namespace baleen
