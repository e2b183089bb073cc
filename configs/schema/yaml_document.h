// YamlDocument: the strict part of YAML that configurations may use, as a tree of plain values with
// their places.
//
// Over yaml-cpp's event parser (0.7 and 0.8), so that an alias never becomes a shared node.
// Refused, each with its place: more than 1 MiB, invalid UTF-8, control characters, tabs as
// indentation, a second document, directives, anchors, aliases, tags, merge keys, keys that are not
// words, repeated keys (both lines named), depth over 32. A UTF-8 byte order mark and CRLF line
// ends are accepted.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "configs/schema/origin.h"
#include "configs/schema/problems.h"

namespace baleen {

struct YamlEntry;

struct YamlNode {
  enum class Kind {
    kNull,     // nothing, ~ or null
    kScalar,   // see `scalar` and `quoted`
    kList,     // see `items`
    kMap,      // see `entries`
    kRefused,  // something reported already: whoever reads the tree passes over it in silence
  };
  Kind kind = Kind::kNull;
  Origin origin;
  std::string scalar;
  bool quoted = false;  // 'x', "x" or a block: never a number or a boolean
  std::vector<YamlNode> items;
  std::vector<YamlEntry> entries;  // in the order of the file; no key twice

  // The value of `key`, or nullptr.
  YamlNode* Find(absl::string_view key);
  const YamlNode* Find(absl::string_view key) const;
};

struct YamlEntry {
  std::string key;
  Origin key_origin;
  YamlNode value;
};

inline constexpr size_t kMostYamlBytes = size_t{1} << 20;
inline constexpr int kMostYamlDepth = 32;

// The tree of `text`; what is refused is added to `problems` and left out of the tree (kRefused).
// Returns false when the text could not be read to its end, so that missing keys mean nothing. An
// empty document is a kNull root. `name` is the file of the origins.
bool ParseYaml(const std::string& name, absl::string_view text, YamlNode& root, Problems& problems);

// A word for messages: "a map", "a list", "nothing", "the quoted string 'x'", "'x'".
std::string Describe(const YamlNode& node);

}  // namespace baleen
