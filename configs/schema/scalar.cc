#include "configs/schema/scalar.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace baleen {
namespace {

constexpr std::pair<absl::string_view, int64_t> kSuffixes[] = {
    {"Ki", int64_t{1} << 10}, {"Mi", int64_t{1} << 20}, {"Gi", int64_t{1} << 30}, {"K", 1000},
    {"M", 1000000},           {"B", 1000000000}};

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

// "" or why a number cannot be written like this; `digits` is the text without its sign.
std::string RefuseSpelling(absl::string_view digits) {
  if (digits.size() > 1 && digits[0] == '0') {
    const char second = absl::ascii_tolower(digits[1]);
    if (second == 'x' || second == 'o' || second == 'b') return "only decimal numbers are accepted";
    if (IsDigit(second) || second == '_') {
      return "looks octal: a number has no leading zero";
    }
  }
  if (absl::StartsWith(digits, ".")) digits.remove_prefix(1);  // YAML's .inf and .nan
  if (absl::EqualsIgnoreCase(digits, "nan")) return "NaN is not accepted";
  if (absl::EqualsIgnoreCase(digits, "inf") || absl::EqualsIgnoreCase(digits, "infinity")) {
    return "infinity is not accepted";
  }
  return "";
}

// Takes '_' out of "1_000"; false where one does not stand between two digits.
bool RemoveUnderscores(absl::string_view text, std::string& plain) {
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '_') {
      plain.push_back(text[i]);
    } else if (i == 0 || i + 1 == text.size() || !IsDigit(text[i - 1]) || !IsDigit(text[i + 1])) {
      return false;
    }
  }
  return true;
}

// digits, digits "." digits, ".5" or "5.", each with an exponent or none.
bool IsDecimal(absl::string_view text) {
  size_t at = 0;
  size_t digits = 0;
  for (; at < text.size() && IsDigit(text[at]); ++at) ++digits;
  if (at < text.size() && text[at] == '.') {
    for (++at; at < text.size() && IsDigit(text[at]); ++at) ++digits;
  }
  if (digits == 0) return false;
  if (at == text.size()) return true;
  if (text[at] != 'e' && text[at] != 'E') return false;
  if (++at < text.size() && (text[at] == '+' || text[at] == '-')) ++at;
  if (at == text.size()) return false;
  for (; at < text.size(); ++at) {
    if (!IsDigit(text[at])) return false;
  }
  return true;
}

// sign * (whole + fraction / 10^n) * multiplier, exactly; false when it is not whole or does not
// fit.
bool ExactProduct(bool negative, absl::string_view whole, absl::string_view fraction,
                  int64_t multiplier, int64_t& value) {
  constexpr size_t kMostDigits = 18;  // of the fraction: 10^18 * 2^30 fits into 128 bits
  __int128 sum = 0;
  for (const char c : whole) {
    sum = sum * 10 + (c - '0');
    if (sum > std::numeric_limits<int64_t>::max()) return false;
  }
  if (fraction.size() > kMostDigits) return false;
  __int128 numerator = 0;
  __int128 denominator = 1;
  for (const char c : fraction) {
    numerator = numerator * 10 + (c - '0');
    denominator *= 10;
  }
  numerator *= multiplier;
  if (numerator % denominator != 0) return false;
  sum = sum * multiplier + numerator / denominator;
  if (sum > std::numeric_limits<int64_t>::max()) return false;
  value = static_cast<int64_t>(negative ? -sum : sum);
  return true;
}

bool AllDigits(absl::string_view text) {
  for (const char c : text) {
    if (!IsDigit(c)) return false;
  }
  return true;
}

bool TakeSign(absl::string_view& text) {
  const bool negative = absl::StartsWith(text, "-");
  if (negative || absl::StartsWith(text, "+")) text.remove_prefix(1);
  return negative;
}

}  // namespace

std::string ParseInteger(absl::string_view text, int64_t& value) {
  const bool negative = TakeSign(text);
  if (std::string refused = RefuseSpelling(text); !refused.empty()) return refused;
  int64_t multiplier = 1;
  for (const auto& [suffix, factor] : kSuffixes) {
    if (!absl::EndsWith(text, suffix)) continue;
    text.remove_suffix(suffix.size());
    multiplier = factor;
    break;
  }
  std::string plain;
  if (!RemoveUnderscores(text, plain)) return "an underscore stands between two digits";
  const size_t point = plain.find('.');
  const absl::string_view whole = absl::string_view(plain).substr(0, point);
  const absl::string_view fraction =
      point == std::string::npos ? "" : absl::string_view(plain).substr(point + 1);
  const bool has_point = point != std::string::npos;
  if (whole.empty() || !AllDigits(whole) || !AllDigits(fraction) ||
      (has_point && (multiplier == 1 || fraction.empty()))) {
    return "not an integer";
  }
  if (!ExactProduct(negative, whole, fraction, multiplier, value)) {
    return has_point ? "has a fraction, or is more than 2^63-1" : "more than 2^63-1";
  }
  return "";
}

std::string ParseNumber(absl::string_view text, double& value) {
  const bool negative = TakeSign(text);
  if (std::string refused = RefuseSpelling(text); !refused.empty()) return refused;
  std::string plain;
  if (!RemoveUnderscores(text, plain)) return "an underscore stands between two digits";
  if (!IsDecimal(plain)) return "not a number";
  const auto [end, error] = std::from_chars(plain.data(), plain.data() + plain.size(), value);
  if (error == std::errc::result_out_of_range || !std::isfinite(value)) {
    return "too large or too small for a double";
  }
  if (error != std::errc() || end != plain.data() + plain.size()) return "not a number";
  if (negative) value = -value;
  return "";
}

std::string ParseBool(absl::string_view text, bool& value) {
  if (text != "true" && text != "false") return "not true or false";
  value = text == "true";
  return "";
}

std::string FormatNumber(double value) {
  char buffer[40];
  const auto result = std::to_chars(buffer, buffer + sizeof(buffer), value);
  std::string text(buffer, result.ptr);
  const size_t exponent = text.find('e');
  // YAML 1.1 takes 1e-08 for a string: it wants the point.
  if (text.find('.') == std::string::npos) {
    text.insert(exponent == std::string::npos ? text.size() : exponent, ".0");
  }
  return text;
}

std::string FormatString(absl::string_view value) {
  constexpr absl::string_view kWords[] = {"null", "true", "false", "yes", "no",
                                          "on",   "off",  "y",     "n"};
  bool plain =
      !value.empty() && (absl::ascii_isalpha(value[0]) || value[0] == '/' || value[0] == '_');
  for (const char c : value) {
    plain = plain && (absl::ascii_isalnum(c) ||
                      absl::string_view("_-./+").find(c) != absl::string_view::npos);
  }
  for (const absl::string_view word : kWords) plain = plain && !absl::EqualsIgnoreCase(value, word);
  if (plain) return std::string(value);
  std::string quoted = "\"";
  for (const char c : value) {
    if (c == '"' || c == '\\') quoted.push_back('\\');
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) {
      absl::StrAppendFormat(&quoted, "\\x%02x", byte);
    } else {
      quoted.push_back(c);
    }
  }
  return quoted + "\"";
}

}  // namespace baleen
