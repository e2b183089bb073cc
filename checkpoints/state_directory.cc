#include "checkpoints/state_directory.h"

#include <dirent.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "kernels/core/file.h"
#include "kernels/core/owned.h"

namespace baleen {

std::string StateDirectoryName(int64_t step) { return absl::StrFormat("step-%08d", step); }

StateName ParseStateName(absl::string_view name) {
  constexpr absl::string_view kPrefix = "step-";
  if (!absl::StartsWith(name, kPrefix)) return {};
  const absl::string_view rest = name.substr(kPrefix.size());
  const size_t end = std::min(rest.find_first_not_of("0123456789"), rest.size());
  StateName parsed;
  // The canonical spelling only: "step-7" is not ours.
  if (!absl::SimpleAtoi(rest.substr(0, end), &parsed.step) ||
      StateDirectoryName(parsed.step) != name.substr(0, kPrefix.size() + end)) {
    return {};
  }
  const absl::string_view suffix = rest.substr(end);
  if (suffix.empty()) parsed.entry = StateEntry::kState;
  if (absl::StartsWith(suffix, ".tmp.")) parsed.entry = StateEntry::kTemporary;
  if (suffix == ".corrupt" || absl::StartsWith(suffix, ".corrupt."))
    parsed.entry = StateEntry::kCorrupt;
  return parsed;
}

absl::StatusOr<std::vector<std::string>> ListNames(const std::string& dir) {
  Owned<DIR*, [](DIR* d) { ::closedir(d); }> stream(::opendir(dir.c_str()));
  if (!stream) {
    const std::string reason = std::strerror(errno);
    if (errno == ENOENT || errno == ENOTDIR) return DataError(dir, ": cannot list: ", reason);
    return EnvironmentError(dir, ": cannot list: ", reason);
  }
  std::vector<std::string> names;
  while (true) {
    errno = 0;
    const struct dirent* entry = ::readdir(stream.get());
    if (entry == nullptr && errno != 0) {
      return EnvironmentError(dir, ": cannot list: ", std::strerror(errno));
    }
    if (entry == nullptr) break;
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
  }
  std::sort(names.begin(), names.end());
  return names;
}

absl::Status RemoveDirectory(const std::string& path) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, ListNames(path));
  absl::Status status;
  for (const std::string& name : names) {
    const std::string file = JoinPath(path, name);
    if (::unlink(file.c_str()) != 0 && errno != ENOENT && status.ok()) {
      status = EnvironmentError(file, ": cannot remove: ", std::strerror(errno));
    }
  }
  if (::rmdir(path.c_str()) != 0 && errno != ENOENT && status.ok()) {
    status = EnvironmentError(path, ": cannot remove: ", std::strerror(errno));
  }
  return status;
}

absl::StatusOr<std::string> SetAsideState(const std::string& step_dir) {
  std::string aside = absl::StrCat(step_dir, ".corrupt");
  struct stat info;
  for (int n = 1; ::lstat(aside.c_str(), &info) == 0; ++n) {
    aside = absl::StrCat(step_dir, ".corrupt.", n);
  }
  if (::rename(step_dir.c_str(), aside.c_str()) != 0) {
    return EnvironmentError(step_dir, ": cannot rename to ", aside, ": ", std::strerror(errno));
  }
  return aside;
}

}  // namespace baleen
