#include "configs/schema/yaml_text.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"

namespace baleen {
namespace {

// Bytes of the well-formed UTF-8 character at `at` (Unicode table 3-7: no surrogates, no overlong
// forms), or 0.
int Utf8Length(absl::string_view text, size_t at) {
  const auto byte = [&](size_t i) {
    return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0;
  };
  const auto in = [](int value, int low, int high) { return value >= low && value <= high; };
  const int first = byte(0);
  if (first < 0x80) return 1;
  if (in(first, 0xC2, 0xDF)) return in(byte(1), 0x80, 0xBF) ? 2 : 0;
  if (in(first, 0xE0, 0xEF)) {
    const int low = first == 0xE0 ? 0xA0 : 0x80;
    const int high = first == 0xED ? 0x9F : 0xBF;
    return in(byte(1), low, high) && in(byte(2), 0x80, 0xBF) ? 3 : 0;
  }
  if (in(first, 0xF0, 0xF4)) {
    const int low = first == 0xF0 ? 0x90 : 0x80;
    const int high = first == 0xF4 ? 0x8F : 0xBF;
    return in(byte(1), low, high) && in(byte(2), 0x80, 0xBF) && in(byte(3), 0x80, 0xBF) ? 4 : 0;
  }
  return 0;
}

// What is wrong with the character at `at`, or "".
std::string BadCharacter(absl::string_view line, size_t at, int length) {
  const auto byte = static_cast<unsigned char>(line[at]);
  if (length == 0) return absl::StrFormat("byte 0x%02x is not UTF-8; save the file as UTF-8", byte);
  if (byte == '\r') return "a carriage return inside a line; end lines with LF or CRLF";
  const bool c1 = length == 2 && byte == 0xC2 && static_cast<unsigned char>(line[at + 1]) < 0xA0;
  if ((byte < 0x20 && byte != '\t') || byte == 0x7f || c1) {
    return absl::StrFormat("control character 0x%02x", c1 ? line[at + 1] & 0xff : byte);
  }
  if (length == 3 && line.substr(at, 3) == "\xEF\xBB\xBF") {
    return "a byte order mark (U+FEFF) inside the file";
  }
  return "";
}

bool CheckCharacters(const YamlText& text, Problems& problems) {
  for (size_t i = 0; i < text.lines.size(); ++i) {
    size_t at = 0;
    const std::string fault = FindBadCharacter(text.lines[i], at);
    if (fault.empty()) continue;
    problems.Add(text.At(static_cast<int>(i), static_cast<int>(at)), fault);
    return false;
  }
  return true;
}

bool CheckTabs(const YamlText& text, Problems& problems) {
  for (size_t i = 0; i < text.lines.size(); ++i) {
    const absl::string_view line = text.lines[i];
    const size_t content = line.find_first_not_of(" \t");
    const size_t tab = line.find('\t');
    if (content == absl::string_view::npos || line[content] == '#' || tab > content) continue;
    problems.Add(text.At(static_cast<int>(i), static_cast<int>(tab)),
                 "a tab in the indentation; YAML wants spaces");
    return false;
  }
  return true;
}

bool CheckDirectives(const YamlText& text, Problems& problems) {
  for (size_t i = 0; i < text.lines.size(); ++i) {
    if (!absl::StartsWith(text.lines[i], "%")) continue;
    problems.Add(text.At(static_cast<int>(i), 0),
                 "a line that begins with % is a YAML directive; directives are not accepted");
    return false;
  }
  return true;
}

std::string WithPlainLineEnds(absl::string_view raw) {
  if (absl::StartsWith(raw, "\xEF\xBB\xBF")) raw.remove_prefix(3);
  std::string text;
  text.reserve(raw.size());
  for (size_t i = 0; i < raw.size(); ++i) {
    if (raw[i] == '\r' && i + 1 < raw.size() && raw[i + 1] == '\n') continue;
    text.push_back(raw[i]);
  }
  return text;
}

}  // namespace

YamlText::YamlText(const std::string& name, absl::string_view raw)
    : name(name), text(WithPlainLineEnds(raw)), lines(absl::StrSplit(text, '\n')) {}

Origin YamlText::At(int line, int column, int length) const {
  Origin origin;
  origin.kind = Origin::Kind::kFile;
  origin.file = name;
  int at = std::clamp(line, 0, static_cast<int>(lines.size()) - 1);
  // Text that ends too early is best shown at its last line that says something.
  if (at + 1 == static_cast<int>(lines.size())) {
    while (at > 0 && lines[at].empty()) --at;
    if (at != line) column = static_cast<int>(lines[at].size());
  }
  origin.line = at + 1;
  origin.length = length;
  SetExcerpt(lines[at], column, origin);
  return origin;
}

std::string FindBadCharacter(absl::string_view line, size_t& at) {
  for (at = 0; at < line.size();) {
    const int length = Utf8Length(line, at);
    if (std::string fault = BadCharacter(line, at, length); !fault.empty()) return fault;
    at += length;
  }
  return "";
}

size_t YamlText::QuotedLength(int line, int column) const {
  const absl::string_view rest =
      absl::string_view(text).substr(lines[line].data() - text.data() + column);
  const char quote = rest[0];
  for (size_t i = 1; i < rest.size(); ++i) {
    if (quote == '"' && rest[i] == '\\') {
      ++i;
    } else if (rest[i] == quote) {
      const bool doubled = quote == '\'' && i + 1 < rest.size() && rest[i + 1] == '\'';
      if (!doubled) return i + 1;
      ++i;
    }
  }
  return 0;
}

bool CheckYamlText(const YamlText& text, Problems& problems) {
  if (absl::StartsWith(text.text, "\xFF\xFE") || absl::StartsWith(text.text, "\xFE\xFF")) {
    problems.Add(text.At(0, 0), "the file is UTF-16; save it as UTF-8");
    return false;
  }
  const bool characters = CheckCharacters(text, problems);
  const bool tabs = CheckTabs(text, problems);
  const bool directives = CheckDirectives(text, problems);
  return characters && tabs && directives;
}

}  // namespace baleen
