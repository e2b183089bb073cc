// A child process that answers requests over one socket on its standard input and output.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/core/file.h"
#include "kernels/core/status.h"

namespace baleen {

class HelperProcess {
 public:
  // EnvironmentError when argv[0] cannot be started.
  static absl::StatusOr<std::unique_ptr<HelperProcess>> Start(const std::vector<std::string>& argv);
  HelperProcess(const HelperProcess&) = delete;
  HelperProcess& operator=(const HelperProcess&) = delete;
  ~HelperProcess();  // closes the socket, which ends the child, and waits for it

  // EnvironmentError when the child is gone; its own words are on standard error.
  absl::Status Send(absl::string_view bytes);
  absl::Status Receive(absl::Span<char> bytes);
  // Up to the next newline, which is not part of the result.
  absl::StatusOr<std::string> ReceiveLine(int64_t limit_bytes);

 private:
  HelperProcess(std::string name, FileDescriptor socket, pid_t pid)
      : name_(std::move(name)), socket_(std::move(socket)), pid_(pid) {}
  std::string name_;
  FileDescriptor socket_;
  pid_t pid_;
};

}  // namespace baleen
