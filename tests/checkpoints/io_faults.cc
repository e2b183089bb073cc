#include "tests/checkpoints/io_faults.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#include <climits>
#include <cstdarg>

#include "absl/strings/str_join.h"

namespace baleen::testing {
namespace {

// One per process by nature: it stands in for the C library. Tests here have one thread.
struct State {
  bool armed = false;
  FaultPlan plan;
  int calls = 0;
  std::vector<std::string> trace;
};

State& TheState() {
  static State state;
  return state;
}

std::string PathOf(int descriptor) {
  char path[PATH_MAX];
  const std::string link = "/proc/self/fd/" + std::to_string(descriptor);
  const ssize_t n = syscall(SYS_readlink, link.c_str(), path, sizeof(path));
  return n > 0 ? std::string(path, static_cast<size_t>(n)) : "?";
}

// Standard output and pipes are left alone.
bool IsFile(int descriptor) {
  struct stat info;
  return descriptor > 2 && fstat(descriptor, &info) == 0 &&
         (S_ISREG(info.st_mode) || S_ISDIR(info.st_mode));
}

// True when this call must fail; errno is set then.
template <typename Half>
bool Fails(const Half& half) {
  State& state = TheState();
  if (!state.armed) return false;
  const int call = ++state.calls;
  const FaultPlan& plan = state.plan;
  const bool here = call == plan.nth;
  if ((plan.fault == Fault::kKill || plan.fault == Fault::kKillTorn) && here) {
    if (plan.fault == Fault::kKillTorn) half();
    _exit(kKilledExit);
  }
  if ((plan.fault == Fault::kErrorOnce && here) ||
      (plan.fault == Fault::kErrorForever && call >= plan.nth)) {
    errno = plan.error;
    return true;
  }
  return false;
}

bool Fails() {
  return Fails([] {});
}

template <typename... Parts>
void Record(const Parts&... parts) {
  if (!TheState().armed) return;
  TheState().trace.push_back(absl::StrJoin({std::string(parts)...}, " "));
}

bool Interrupts() {
  State& state = TheState();
  if (!state.armed || state.plan.fault != Fault::kInterrupted || state.calls % 2 != 0) return false;
  errno = EINTR;
  return true;
}

size_t Shortened(size_t bytes) {
  const State& state = TheState();
  const bool shorten = state.armed && state.plan.fault == Fault::kInterrupted;
  return shorten ? (bytes + 1) / 2 : bytes;
}

long OpenFile(const char* path, int flags, mode_t mode) {
  if (Fails()) return -1;
  const long descriptor = syscall(SYS_openat, AT_FDCWD, path, flags, mode);
  if (descriptor >= 0 && (flags & O_CREAT) != 0) Record("create", path);
  return descriptor;
}

}  // namespace

void ArmFaults(const FaultPlan& plan) {
  TheState() = State();
  TheState().plan = plan;
  TheState().armed = true;
}

int DisarmFaults() {
  TheState().armed = false;
  return TheState().calls;
}

const std::vector<std::string>& FaultTrace() { return TheState().trace; }

}  // namespace baleen::testing

using namespace baleen::testing;  // NOLINT: the C functions below are outside of any namespace

extern "C" {

int open(const char* path, int flags, ...) {
  va_list arguments;
  va_start(arguments, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(arguments, mode_t) : 0;
  va_end(arguments);
  return static_cast<int>(OpenFile(path, flags, mode));
}

ssize_t write(int descriptor, const void* data, size_t bytes) {
  if (!IsFile(descriptor)) return syscall(SYS_write, descriptor, data, bytes);
  if (Fails([&] { syscall(SYS_write, descriptor, data, bytes / 2); }) || Interrupts()) return -1;
  Record("write", PathOf(descriptor));
  return syscall(SYS_write, descriptor, data, Shortened(bytes));
}

ssize_t pwrite(int descriptor, const void* data, size_t bytes, off_t offset) {
  if (Fails([&] { syscall(SYS_pwrite64, descriptor, data, bytes / 2, offset); }) || Interrupts())
    return -1;
  Record("write", PathOf(descriptor));
  return syscall(SYS_pwrite64, descriptor, data, Shortened(bytes), offset);
}

ssize_t pread(int descriptor, void* data, size_t bytes, off_t offset) {
  if (Fails() || Interrupts()) return -1;
  return syscall(SYS_pread64, descriptor, data, Shortened(bytes), offset);
}

int ftruncate(int descriptor, off_t length) {
  if (Fails() || Interrupts()) return -1;
  Record("write", PathOf(descriptor));
  return static_cast<int>(syscall(SYS_ftruncate, descriptor, length));
}

int fsync(int descriptor) {
  if (Fails()) return -1;
  Record("fsync", PathOf(descriptor));
  return static_cast<int>(syscall(SYS_fsync, descriptor));
}

// A close that fails has closed all the same.
int close(int descriptor) {
  const bool counted = IsFile(descriptor);
  const bool fails = counted && Fails();
  const int result = static_cast<int>(syscall(SYS_close, descriptor));
  if (!fails) return result;
  errno = TheState().plan.error;
  return -1;
}

int rename(const char* from, const char* to) {
  if (Fails()) return -1;
  Record("rename", from, to);
  return static_cast<int>(syscall(SYS_renameat, AT_FDCWD, from, AT_FDCWD, to));
}

int unlink(const char* path) {
  if (Fails()) return -1;
  return static_cast<int>(syscall(SYS_unlinkat, AT_FDCWD, path, 0));
}

int rmdir(const char* path) {
  if (Fails()) return -1;
  return static_cast<int>(syscall(SYS_unlinkat, AT_FDCWD, path, AT_REMOVEDIR));
}

int mkdir(const char* path, mode_t mode) {
  if (Fails()) return -1;
  const int result = static_cast<int>(syscall(SYS_mkdirat, AT_FDCWD, path, mode));
  if (result == 0) Record("mkdir", path);
  return result;
}

}  // extern "C"
