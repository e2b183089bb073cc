#include "configs/schema/overrides.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"

namespace baleen {
namespace {

constexpr size_t kMostOverrideBytes = 1 << 16;

// Everything that an override says stands at the same place: the override as a whole.
void SetOrigin(const Origin& origin, YamlNode& node) {
  node.origin = origin;
  for (YamlNode& item : node.items) SetOrigin(origin, item);
  for (YamlEntry& entry : node.entries) {
    entry.key_origin = origin;
    SetOrigin(origin, entry.value);
  }
}

bool IsKeyPath(const std::vector<std::string>& path) {
  if (path.size() > kMostYamlDepth / 2) return false;
  return std::all_of(path.begin(), path.end(), [](const std::string& key) {
    return !key.empty() && std::all_of(key.begin(), key.end(), [](char c) {
      return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
    });
  });
}

class Override {
 public:
  Override(const Origin& origin, Problems& problems) : origin_(origin), problems_(problems) {}

  // Puts `value` at `path` below `node`, whose own path is the first `depth` keys.
  void Put(const std::vector<std::string>& path, size_t depth, YamlNode value, YamlNode& node) {
    if (depth == path.size()) {
      node = std::move(value);
      return;
    }
    const std::string& key = path[depth];
    if (node.kind == YamlNode::Kind::kNull) node.kind = YamlNode::Kind::kMap;
    if (node.kind == YamlNode::Kind::kMap) {
      YamlNode* child = node.Find(key);
      if (child == nullptr) {
        node.entries.push_back({key, origin_, YamlNode{}});
        child = &node.entries.back().value;
        child->origin = origin_;
      }
      Put(path, depth + 1, std::move(value), *child);
    } else if (node.kind == YamlNode::Kind::kList) {
      PutInList(path, depth, std::move(value), node);
    } else if (node.kind != YamlNode::Kind::kRefused) {
      problems_.Add(origin_,
                    absl::StrCat(Name(path, depth), " is neither a section nor a list; it is ",
                                 Describe(node), " (", node.origin.ToString(), ")"));
    }
  }

 private:
  static std::string Name(const std::vector<std::string>& path, size_t depth) {
    return absl::StrJoin(path.begin(), path.begin() + depth, ".");
  }

  void PutInList(const std::vector<std::string>& path, size_t depth, YamlNode value,
                 YamlNode& node) {
    int64_t index = -1;
    const bool is_number = absl::SimpleAtoi(path[depth], &index);
    const int64_t size = static_cast<int64_t>(node.items.size());
    if (!is_number || index < 0 || index > size) {
      problems_.Add(origin_, absl::StrCat(Name(path, depth), " is a list of ", size,
                                          ": expected a number from 0 to ", size,
                                          " after it, found ", Quoted(path[depth])));
      return;
    }
    if (index == size) node.items.emplace_back().origin = origin_;
    Put(path, depth + 1, std::move(value), node.items[index]);
  }

  const Origin& origin_;
  Problems& problems_;
};

void ApplyOverride(const std::string& text, int number, YamlNode& root, Problems& problems) {
  Origin origin;
  origin.kind = Origin::Kind::kCommandLine;
  origin.line = number;
  SetExcerpt(text, 0, origin);
  const size_t equals = text.find('=');
  if (equals == std::string::npos || text.size() > kMostOverrideBytes) {
    problems.Add(origin, "expected key.path=value, as in optimizer.lr=1e-4 or stages.0.steps=10");
    return;
  }
  absl::string_view key = absl::string_view(text).substr(0, equals);
  absl::ConsumePrefix(&key, "--");
  std::string name(key);
  std::replace(name.begin(), name.end(), '-', '_');
  const std::vector<std::string> path = absl::StrSplit(name, '.');
  if (!IsKeyPath(path)) {
    problems.Add(origin, absl::StrCat(Quoted(key), " is no path of keys, as optimizer.lr is"));
    return;
  }
  Problems own;
  YamlNode value;
  ParseYaml("command line", absl::string_view(text).substr(equals + 1), value, own);
  for (const Problem& problem : own.list()) problems.Add(origin, problem.message);
  if (!own.empty()) value.kind = YamlNode::Kind::kRefused;
  SetOrigin(origin, value);
  Override(origin, problems).Put(path, 0, std::move(value), root);
}

}  // namespace

void ApplyOverrides(const std::vector<std::string>& overrides, YamlNode& root, Problems& problems) {
  int number = 0;
  for (const std::string& text : overrides) ApplyOverride(text, ++number, root, problems);
}

}  // namespace baleen
