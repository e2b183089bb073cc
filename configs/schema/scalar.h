// The scalars of a configuration: how numbers, booleans and strings are written, and written back.
//
//   integer  42, -1, 1_000, 32Ki, 2.1B    Ki Mi Gi = 1024^n; K M B = 1000, 10^6, 10^9; the value
//   must be whole number   0.1, 1e-3, 7.3e-6, 1_000.0 boolean  true, false and nothing else ("no"
//   is a word)
// Never accepted: hexadecimal, octal or octal-looking (010), NaN, infinity, anything that
// overflows.
#pragma once

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"

namespace baleen {

// Each returns "" and sets `value`, or says why the text is none ("looks octal: ...").
std::string ParseInteger(absl::string_view text, int64_t& value);
std::string ParseNumber(absl::string_view text, double& value);
std::string ParseBool(absl::string_view text, bool& value);

// The pattern of integers with a suffix, for JSON Schema.
inline constexpr char kIntegerPattern[] = "^-?[0-9][0-9_]*(\\.[0-9]+)?(Ki|Mi|Gi|K|M|B)?$";

// Shortest text that reads back to the same double, and is a number to YAML 1.1 readers too
// ("1.0e-08").
std::string FormatNumber(double value);
// The string as a YAML scalar, quoted where a plain one would read as something else.
std::string FormatString(absl::string_view value);

}  // namespace baleen
