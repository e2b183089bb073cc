// Origin: the place where a value of a configuration was said, kept so that a message can point at
// it later.
#pragma once

#include <string>

#include "absl/strings/string_view.h"

namespace baleen {

struct Origin {
  enum class Kind { kDefault, kFile, kCommandLine };
  Kind kind = Kind::kDefault;
  std::string file;  // path of the file as the user gave it; empty for kCommandLine
  int line =
      0;  // 1-based, 0: the file as a whole; for kCommandLine the number of the override, from 1
  int column = 0;  // 1-based, in bytes
  int length = 1;  // bytes to underline
  // The line, or of a long line the part around the column; `excerpt_offset` is the column's place
  // in it. For kCommandLine the override as it was given.
  std::string excerpt;
  int excerpt_offset = 0;

  // "configs/run/tiny.yaml:12", "command line" or "default".
  std::string ToString() const;
};

// Of `line`, at most 120 bytes around byte `column` (0-based), cut between characters; sets
// excerpt, excerpt_offset and column of `origin`.
void SetExcerpt(absl::string_view line, int column, Origin& origin);

}  // namespace baleen
