// IsOk, HasStatus(code, parts...): assertions on absl::Status for tests.
#pragma once

#include <gmock/gmock.h>

#include <string>

#include "kernels/core/status.h"

namespace baleen::testing {

inline const absl::Status& AsStatus(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& AsStatus(const absl::StatusOr<T>& status_or) {
  return status_or.status();
}

MATCHER(IsOk, "is OK") {
  *result_listener << AsStatus(arg).ToString();
  return AsStatus(arg).ok();
}

// The status has this code and its message holds `part`.
MATCHER_P2(HasStatus, code, part, "") {
  *result_listener << AsStatus(arg).ToString();
  return AsStatus(arg).code() == code &&
         std::string(AsStatus(arg).message()).find(part) != std::string::npos;
}

}  // namespace baleen::testing

#define ASSERT_OK_AND_ASSIGN(lhs, expression) \
  ASSERT_OK_AND_ASSIGN_IMPL(BALEEN_CONCAT(test_or_, __LINE__), lhs, expression)
#define ASSERT_OK_AND_ASSIGN_IMPL(result, lhs, expression) \
  auto result = (expression);                              \
  ASSERT_TRUE(result.ok()) << result.status().ToString();  \
  lhs = std::move(result).value()
