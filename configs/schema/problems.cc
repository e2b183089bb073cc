#include "configs/schema/problems.h"

#include <algorithm>

#include "absl/strings/str_format.h"

namespace baleen {
namespace {

constexpr size_t kMostKept = 1000;
constexpr size_t kMostShown = 50;  // a file of 100,000 wrong keys must not scroll the terminal away
constexpr int kMostUnderlined = 60;
constexpr size_t kWindow = 120;  // bytes of a line that are shown

bool IsContinuationByte(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

// Largest place <= `at` where a UTF-8 character begins.
size_t CharacterStart(absl::string_view text, size_t at) {
  at = std::min(at, text.size());
  while (at > 0 && at < text.size() && IsContinuationByte(text[at])) --at;
  return at;
}

// One line that cannot steer a terminal: control characters (C0, DEL, and C1 in UTF-8) as \xNN, a
// tab as a space.
std::string OneLine(absl::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const bool c1 =
        byte == 0xC2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xA0;
    if (byte == '\t') {
      out.push_back(' ');
    } else if (byte == '\n') {
      out.append("\\n");
    } else if (byte < 0x20 || byte == 0x7f || c1) {
      absl::StrAppendFormat(&out, "\\x%02x", byte);
    } else {
      out.push_back(text[i]);
    }
  }
  return out;
}

// Characters that a terminal shows for these bytes of UTF-8.
size_t Width(absl::string_view text) {
  return text.size() - std::count_if(text.begin(), text.end(), IsContinuationByte);
}

// The line around the place, and below it carets and the hint.
std::string Excerpt(const Problem& problem) {
  const Origin& at = problem.origin;
  const absl::string_view line = at.excerpt;
  const size_t offset = std::min<size_t>(std::max(at.excerpt_offset, 0), line.size());
  const int length = std::clamp(at.length, 1, kMostUnderlined);
  const size_t before = Width(OneLine(line.substr(0, offset)));
  const size_t carets = std::max<size_t>(1, Width(OneLine(line.substr(offset, length))));
  const std::string number = absl::StrFormat("%5d", at.line);
  std::string text = absl::StrCat(number, " | ", OneLine(line), "\n");
  absl::StrAppend(&text, std::string(number.size(), ' '), " | ", std::string(before, ' '),
                  std::string(carets, '^'));
  if (!problem.hint.empty()) absl::StrAppend(&text, "  ", OneLine(problem.hint));
  return text;
}

std::string Render(const Problem& problem) {
  const Origin& at = problem.origin;
  const std::string error = absl::StrCat(": error: ", OneLine(problem.message));
  if (at.kind == Origin::Kind::kFile && at.line > 0) {
    return absl::StrCat(OneLine(at.file), ":", at.line, ":", at.column, error, "\n",
                        Excerpt(problem));
  }
  std::string text = at.kind == Origin::Kind::kCommandLine
                         ? absl::StrCat("command line: ", OneLine(at.excerpt), error)
                         : absl::StrCat(OneLine(at.file), error);
  if (!problem.hint.empty()) absl::StrAppend(&text, "\n      | ", OneLine(problem.hint));
  return text;
}

// The file from its top to its end, then the command line word by word.
std::tuple<bool, int, int> Order(const Origin& at) {
  return {at.kind == Origin::Kind::kCommandLine, at.line, at.column};
}

}  // namespace

std::string Origin::ToString() const {
  switch (kind) {
    case Kind::kFile:
      return line > 0 ? absl::StrCat(OneLine(file), ":", line) : OneLine(file);
    case Kind::kCommandLine:
      return "command line";
    case Kind::kDefault:
      return "default";
  }
  return "";
}

void SetExcerpt(absl::string_view line, int column, Origin& origin) {
  const size_t at = std::min<size_t>(std::max(column, 0), line.size());
  origin.column = static_cast<int>(at) + 1;
  const size_t begin =
      line.size() > kWindow && at > kWindow / 3 ? CharacterStart(line, at - kWindow / 3) : 0;
  const size_t end = CharacterStart(line, begin + kWindow);
  const absl::string_view left = begin > 0 ? "..." : "";
  origin.excerpt =
      absl::StrCat(left, line.substr(begin, end - begin), end < line.size() ? "..." : "");
  origin.excerpt_offset = static_cast<int>(left.size() + at - begin);
}

void Problems::Add(const Origin& origin, std::string message, std::string hint) {
  if (!seen_.insert(std::tuple_cat(Order(origin), std::make_tuple(message))).second) return;
  if (problems_.size() < kMostKept) {
    problems_.push_back({origin, std::move(message), std::move(hint)});
  }
}

absl::Status Problems::ToStatus() const {
  if (problems_.empty()) return absl::OkStatus();
  std::vector<Problem> sorted = problems_;
  std::stable_sort(sorted.begin(), sorted.end(), [](const Problem& a, const Problem& b) {
    return Order(a.origin) < Order(b.origin);
  });
  std::string text;
  for (size_t i = 0; i < std::min(sorted.size(), kMostShown); ++i) {
    absl::StrAppend(&text, Render(sorted[i]), "\n");
  }
  if (sorted.size() > kMostShown) {
    absl::StrAppend(&text, "... and ", seen_.size() - kMostShown, " more\n");
  }
  return ConfigError(text, seen_.size(), seen_.size() == 1 ? " error" : " errors",
                     ". Nothing was started.");
}

std::string Quoted(absl::string_view text) {
  constexpr size_t kMost = 60;
  const size_t end = CharacterStart(text, kMost);
  return absl::StrCat("'", OneLine(text.substr(0, end)), end < text.size() ? "..." : "", "'");
}

}  // namespace baleen
