// Errors from the outside world: absl::Status, one constructor per exit code, and the propagation
// macros.
//
// Every command ends with one exit code (docs/exit_codes.md). The status code decides it, so a
// library deep down only has to say what kind of fault it met; ExitCode() in trainer/ does the
// mapping.
#pragma once

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace baleen {

// Usage or configuration is wrong (exit 2): a flag, a key of the run file, a layout that cannot be.
template <typename... Args>
absl::Status ConfigError(const Args&... args) {
  return absl::InvalidArgumentError(absl::StrCat(args...));
}

// The machine or the job cannot do it (exit 3): missing library, MPI or NCCL failure, full disk,
// locked directory.
template <typename... Args>
absl::Status EnvironmentError(const Args&... args) {
  return absl::FailedPreconditionError(absl::StrCat(args...));
}

// A file that was read is missing, damaged or does not match (exit 4): checkpoint, tokens, training
// state.
template <typename... Args>
absl::Status DataError(const Args&... args) {
  return absl::DataLossError(absl::StrCat(args...));
}

// The numbers went wrong (exit 5): NaN where none may be, too many steps that were not finite.
template <typename... Args>
absl::Status NumericsError(const Args&... args) {
  return absl::OutOfRangeError(absl::StrCat(args...));
}

// Puts what was being done in front of an error that came from below; an ok status stays ok.
absl::Status Annotate(const absl::Status& status, absl::string_view doing);

}  // namespace baleen

#define BALEEN_CONCAT_INNER(a, b) a##b
#define BALEEN_CONCAT(a, b) BALEEN_CONCAT_INNER(a, b)

#define RETURN_IF_ERROR(expression)                \
  do {                                             \
    ::absl::Status baleen_status = (expression);   \
    if (!baleen_status.ok()) return baleen_status; \
  } while (false)

#define ASSIGN_OR_RETURN(lhs, expression) \
  ASSIGN_OR_RETURN_IMPL(BALEEN_CONCAT(baleen_or_, __LINE__), lhs, expression)

#define ASSIGN_OR_RETURN_IMPL(result, lhs, expression) \
  auto result = (expression);                          \
  if (!result.ok()) return result.status();            \
  lhs = std::move(result).value()
