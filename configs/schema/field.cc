#include "configs/schema/field.h"

#include <cmath>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "configs/schema/scalar.h"
#include "kernels/core/check.h"

namespace baleen {
namespace {

// A bound in a message: 65536, not 65536.0; 1.0e-08 as it is.
std::string FormatBound(double value) {
  if (value == std::floor(value) && std::abs(value) < 9.2e18) {
    return absl::StrCat(static_cast<int64_t>(value));
  }
  return FormatNumber(value);
}

bool IsIndex(absl::string_view text) {
  if (text.empty()) return false;
  for (const char c : text) {
    if (!absl::ascii_isdigit(c)) return false;
  }
  return true;
}

}  // namespace

std::string Field::Expected() const {
  std::string text;
  switch (type) {
    case Type::kBool:
      return "true or false";
    case Type::kInteger:
      text = "an integer";
      break;
    case Type::kNumber:
      text = "a number";
      break;
    case Type::kString:
      return identifier ? "a name of letters, digits, '-', '_' and '.' (at most 64)" : "a string";
    case Type::kChoice:
      return choices.size() == 1 ? choices[0]
                                 : absl::StrCat("one of ", absl::StrJoin(choices, " | "));
    case Type::kIntegerList:
      text = "a list of integers";
      break;
    case Type::kNumberPair:
      text = "a list of two numbers";
      break;
    case Type::kSection:
      return "a section";
    case Type::kSectionList:
      return absl::StrCat("a list of ", min_items, " to ", max_items, " sections");
  }
  if (low) absl::StrAppend(&text, low->open ? " above " : " from ", FormatBound(low->value));
  if (high) {
    const bool follows_low = low && !low->open;
    absl::StrAppend(&text,
                    high->open ? (low ? " and below " : " below ")
                               : (follows_low ? " to " : (low ? " and at most " : " up to ")),
                    FormatBound(high->value));
  } else if (low && !low->open) {
    text.append(" up");
  }
  return text;
}

bool Field::InRange(long double value) const {
  if (low && (low->open ? value <= low->value : value < low->value)) return false;
  if (high && (high->open ? value >= high->value : value > high->value)) return false;
  return true;
}

Field& Field::Default(absl::string_view yaml) {
  presence = Presence::kDefault;
  default_text = std::string(yaml);
  return *this;
}

std::string Field::Text() const {
  // A word of a closed set needs no quotes, even if it is 1f1b.
  if (type == Type::kChoice) return std::get<std::string>(get());
  return FormatValue(get());
}

Field& Field::DefaultIsCurrent() { return Default(Text()); }

Field& Field::Optional() {
  presence = Presence::kOptional;
  return *this;
}

Field& Field::RequiredInStage() {
  presence = Presence::kRequiredInStage;
  return *this;
}

Field& Field::Between(double lowest, double highest) {
  low = Bound{lowest, false};
  high = Bound{highest, false};
  return *this;
}

Field& Field::AtLeast(double lowest) {
  low = Bound{lowest, false};
  return *this;
}

Field& Field::Above(double bound) {
  low = Bound{bound, true};
  return *this;
}

Field& Field::Below(double bound) {
  high = Bound{bound, true};
  return *this;
}

Field& Field::Identifier() {
  identifier = true;
  return *this;
}

Field& Field::ExactlyOne() {
  exactly_one = true;
  return *this;
}

Field& Field::Items(size_t fewest, size_t most) {
  min_items = fewest;
  max_items = most;
  return *this;
}

Field& Field::Unit(absl::string_view text) {
  unit = std::string(text);
  return *this;
}

Field& Field::Doc(absl::string_view text) {
  doc = std::string(text);
  return *this;
}

bool IsIdentifier(absl::string_view text) {
  if (text.empty() || text.size() > 64 || !absl::ascii_isalnum(text[0])) return false;
  for (const char c : text) {
    if (!absl::ascii_isalnum(c) && c != '-' && c != '_' && c != '.') return false;
  }
  return true;
}

Field& Fields::AddLeaf(absl::string_view key, Field::Type type,
                       std::function<void(const FieldValue&)> set,
                       std::function<FieldValue()> get) {
  Field& field = fields_.emplace_back();
  field.key = std::string(key);
  field.type = type;
  field.set = std::move(set);
  field.get = std::move(get);
  return field;
}

Field& Fields::AddContainer(absl::string_view key, Field::Type type) {
  Field& field = fields_.emplace_back();
  field.key = std::string(key);
  field.type = type;
  return field;
}

Field& Fields::Add(absl::string_view key, bool* target) {
  return AddLeaf(
      key, Field::Type::kBool, [target](const FieldValue& v) { *target = std::get<bool>(v); },
      [target] { return FieldValue(*target); });
}

Field& Fields::Add(absl::string_view key, int64_t* target) {
  return AddLeaf(
      key, Field::Type::kInteger, [target](const FieldValue& v) { *target = std::get<int64_t>(v); },
      [target] { return FieldValue(*target); });
}

Field& Fields::Add(absl::string_view key, double* target) {
  return AddLeaf(
      key, Field::Type::kNumber, [target](const FieldValue& v) { *target = std::get<double>(v); },
      [target] { return FieldValue(*target); });
}

Field& Fields::Add(absl::string_view key, std::string* target) {
  return AddLeaf(
      key, Field::Type::kString,
      [target](const FieldValue& v) { *target = std::get<std::string>(v); },
      [target] { return FieldValue(*target); });
}

Field& Fields::Add(absl::string_view key, std::optional<int64_t>* target) {
  return AddLeaf(
             key, Field::Type::kInteger,
             [target](const FieldValue& v) {
               const auto* value = std::get_if<int64_t>(&v);
               *target = value ? std::make_optional(*value) : std::nullopt;
             },
             [target] { return *target ? FieldValue(**target) : FieldValue(); })
      .Optional();
}

Field& Fields::Add(absl::string_view key, std::optional<std::string>* target) {
  return AddLeaf(
             key, Field::Type::kString,
             [target](const FieldValue& v) {
               const auto* value = std::get_if<std::string>(&v);
               *target = value ? std::make_optional(*value) : std::nullopt;
             },
             [target] { return *target ? FieldValue(**target) : FieldValue(); })
      .Optional();
}

Field& Fields::Add(absl::string_view key, std::vector<int64_t>* target) {
  return AddLeaf(
      key, Field::Type::kIntegerList,
      [target](const FieldValue& v) { *target = std::get<std::vector<int64_t>>(v); },
      [target] { return FieldValue(*target); });
}

Field& Fields::Add(absl::string_view key, std::array<double, 2>* target) {
  return AddLeaf(
      key, Field::Type::kNumberPair,
      [target](const FieldValue& v) { *target = std::get<std::array<double, 2>>(v); },
      [target] { return FieldValue(*target); });
}

Field& Fields::AddText(absl::string_view key, std::function<void(const std::string&)> set,
                       std::function<std::string()> get) {
  return AddLeaf(
      key, Field::Type::kString, [set](const FieldValue& v) { set(std::get<std::string>(v)); },
      [get] { return FieldValue(get()); });
}

Field& Fields::AddChoice(absl::string_view key, std::vector<std::string> words,
                         std::function<void(size_t)> set, std::function<size_t()> get) {
  Field& field = AddLeaf(
      key, Field::Type::kChoice,
      [words, set](const FieldValue& v) {
        const std::string& word = std::get<std::string>(v);
        for (size_t i = 0; i < words.size(); ++i) {
          if (words[i] == word) return set(i);
        }
        CHECK(false) << word << " is no choice";  // the reader has looked
      },
      [words, get] { return FieldValue(words.at(get())); });
  field.choices = std::move(words);
  return field;
}

std::string FormatValue(const FieldValue& value) {
  struct Formatter {
    std::string operator()(std::monostate) const { return "null"; }
    std::string operator()(bool v) const { return v ? "true" : "false"; }
    std::string operator()(int64_t v) const { return absl::StrCat(v); }
    std::string operator()(double v) const { return FormatNumber(v); }
    std::string operator()(const std::string& v) const { return FormatString(v); }
    std::string operator()(const std::vector<int64_t>& v) const {
      return absl::StrCat("[", absl::StrJoin(v, ", "), "]");
    }
    std::string operator()(const std::array<double, 2>& v) const {
      return absl::StrCat("[", FormatNumber(v[0]), ", ", FormatNumber(v[1]), "]");
    }
  };
  return std::visit(Formatter(), value);
}

std::string DisplayPath(absl::string_view path) {
  std::string text;
  for (const absl::string_view part : absl::StrSplit(path, '.', absl::SkipEmpty())) {
    if (IsIndex(part)) {
      absl::StrAppend(&text, "[", part, "]");
    } else {
      absl::StrAppend(&text, text.empty() ? "" : ".", part);
    }
  }
  return text;
}

std::string WithoutStage(absl::string_view path) {
  const std::vector<absl::string_view> parts = absl::StrSplit(path, '.');
  if (parts.size() < 2 || parts[0] != "stages" || !IsIndex(parts[1])) return std::string(path);
  return absl::StrJoin(parts.begin() + 2, parts.end(), ".");
}

std::string JoinKey(absl::string_view path, absl::string_view key) {
  return path.empty() ? std::string(key) : absl::StrCat(path, ".", key);
}

}  // namespace baleen
