#include "data/helper_process.h"

#include <spawn.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_join.h"

namespace baleen {

absl::StatusOr<std::unique_ptr<HelperProcess>> HelperProcess::Start(
    const std::vector<std::string>& argv) {
  int ends[2];
  if (::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) != 0) {
    return EnvironmentError("cannot make a socket pair: ", std::strerror(errno));
  }
  FileDescriptor ours(ends[0]);
  const FileDescriptor theirs(ends[1]);
  std::vector<char*> arguments;
  for (const std::string& argument : argv) arguments.push_back(const_cast<char*>(argument.c_str()));
  arguments.push_back(nullptr);
  posix_spawn_file_actions_t actions;
  ::posix_spawn_file_actions_init(&actions);
  ::posix_spawn_file_actions_adddup2(&actions, theirs.get(), STDIN_FILENO);
  ::posix_spawn_file_actions_adddup2(&actions, theirs.get(), STDOUT_FILENO);
  pid_t pid = 0;
  const int error =
      ::posix_spawnp(&pid, arguments[0], &actions, nullptr, arguments.data(), environ);
  ::posix_spawn_file_actions_destroy(&actions);
  if (error != 0) return EnvironmentError(argv[0], ": cannot start: ", std::strerror(error));
  return std::unique_ptr<HelperProcess>(
      new HelperProcess(absl::StrJoin(argv, " "), std::move(ours), pid));
}

HelperProcess::~HelperProcess() {
  socket_.Reset();
  while (::waitpid(pid_, nullptr, 0) < 0 && errno == EINTR) {
  }
}

absl::Status HelperProcess::Send(absl::string_view bytes) {
  while (!bytes.empty()) {
    // MSG_NOSIGNAL: a child that died must be an error here, not a SIGPIPE.
    const ssize_t n = ::send(socket_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return EnvironmentError(name_, ": ended early: ", std::strerror(errno));
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return absl::OkStatus();
}

absl::Status HelperProcess::Receive(absl::Span<char> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::recv(socket_.get(), bytes.data(), bytes.size(), 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return EnvironmentError(name_, ": cannot read its answer: ", std::strerror(errno));
    if (n == 0) return EnvironmentError(name_, ": ended without an answer; see its message above");
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::string> HelperProcess::ReceiveLine(int64_t limit_bytes) {
  std::string line;
  while (static_cast<int64_t>(line.size()) < limit_bytes) {
    char next = 0;
    RETURN_IF_ERROR(Receive(absl::MakeSpan(&next, 1)));
    if (next == '\n') return line;
    line += next;
  }
  return EnvironmentError(name_, ": its first line is longer than ", limit_bytes, " bytes");
}

}  // namespace baleen
