// Log lines on stderr: "[rank 2 sparse 120] warning: ...". Rank 0 speaks; the others only warn and
// err.
#pragma once

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace baleen {

enum class Severity { kInfo, kWarning, kError };

// Writes one line to `fd` (2 unless told). Control characters of file names and contents are
// escaped.
void WriteLog(Severity severity, absl::string_view prefix, absl::string_view message, int fd = 2);

// Replaces control characters by \xNN: what comes from a file must not steer the terminal.
std::string EscapeControl(absl::string_view text);

// The log of one rank; a plain value that is handed down like Context.
class Log {
 public:
  explicit Log(int world_rank = 0) : world_rank_(world_rank) {}
  template <typename... Args>
  void Info(const Args&... args) const {
    if (world_rank_ == 0) WriteLog(Severity::kInfo, "", absl::StrCat(args...));
  }
  template <typename... Args>
  void Warning(const Args&... args) const {
    WriteLog(Severity::kWarning, Prefix(), absl::StrCat(args...));
  }
  template <typename... Args>
  void Error(const Args&... args) const {
    WriteLog(Severity::kError, Prefix(), absl::StrCat(args...));
  }

 private:
  std::string Prefix() const { return absl::StrCat("[rank ", world_rank_, "] "); }
  int world_rank_;
};

}  // namespace baleen
