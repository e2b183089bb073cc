// The bytes of a YAML file before any YAML: encoding, control characters, line ends and tabs.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "configs/schema/origin.h"
#include "configs/schema/problems.h"

namespace baleen {

// The text with LF line ends and without byte order mark, and its lines. Not copyable: the lines
// point into the text.
struct YamlText {
  std::string name;
  std::string text;
  std::vector<absl::string_view> lines;

  YamlText(const std::string& name, absl::string_view raw);
  YamlText(const YamlText&) = delete;
  YamlText& operator=(const YamlText&) = delete;

  // Byte `column` of line `line`, both 0-based; past the end of the file it is the end of the last
  // line.
  Origin At(int line, int column, int length = 1) const;
  // Bytes of the quoted scalar that begins there with ' or ", both quotes included; 0 if it never
  // ends.
  size_t QuotedLength(int line, int column) const;
};

// What is wrong with the first character of a line that may not be in one, and its place; "" if all
// are well: UTF-8 without control characters other than the tab.
std::string FindBadCharacter(absl::string_view line, size_t& at);

// Adds a problem for each kind of thing that YAML files here may not hold, at its first place;
// false if there is one.
bool CheckYamlText(const YamlText& text, Problems& problems);

}  // namespace baleen
