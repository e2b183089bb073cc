#include "kernels/core/log.h"

#include <unistd.h>

#include "absl/strings/str_format.h"

namespace baleen {

std::string EscapeControl(absl::string_view text) {
  std::string out;
  out.reserve(text.size());
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const bool plain = byte == '\n' || byte == '\t' || (byte >= 0x20 && byte != 0x7f);
    if (plain) {
      out.push_back(c);
    } else {
      absl::StrAppendFormat(&out, "\\x%02x", byte);
    }
  }
  return out;
}

void WriteLog(Severity severity, absl::string_view prefix, absl::string_view message, int fd) {
  const char* name = "";
  if (severity == Severity::kWarning) name = "warning: ";
  if (severity == Severity::kError) name = "error: ";
  // One write a line, so that lines of several ranks do not mix.
  const std::string line = absl::StrCat(prefix, name, EscapeControl(message), "\n");
  size_t written = 0;
  while (written < line.size()) {
    const ssize_t n = ::write(fd, line.data() + written, line.size() - written);
    if (n <= 0) return;  // logging must never stop a run
    written += static_cast<size_t>(n);
  }
}

}  // namespace baleen
