#include "configs/schema/read_fields.h"

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "configs/schema/scalar.h"
#include "configs/schema/suggest.h"
#include "configs/schema/yaml_text.h"
#include "kernels/core/check.h"

namespace baleen {
namespace {

constexpr size_t kMostStringBytes = 4096;
constexpr size_t kMostHints = 50;  // as many as are shown

// The value of a leaf from a node: "" and `value`, or why not.
std::string ParseNumberItem(const YamlNode& node, const Field& field, double& value) {
  if (node.kind != YamlNode::Kind::kScalar || node.quoted) return "not a number";
  if (std::string why = ParseNumber(node.scalar, value); !why.empty()) return why;
  return field.InRange(value) ? "" : "out of range";
}

std::string ParseIntegerItem(const YamlNode& node, const Field& field, int64_t& value) {
  if (node.kind != YamlNode::Kind::kScalar || node.quoted) return "not an integer";
  if (std::string why = ParseInteger(node.scalar, value); !why.empty()) return why;
  return field.InRange(value) ? "" : "out of range";
}

std::string ParseString(const YamlNode& node, const Field& field, FieldValue& value) {
  if (node.kind != YamlNode::Kind::kScalar) return "not a string";
  const std::string& text = node.scalar;
  if (!node.quoted && (text == "true" || text == "false"))
    return "a boolean; quote it to mean the word";
  if (text.empty()) return "empty";
  if (text.size() > kMostStringBytes)
    return absl::StrCat("longer than ", kMostStringBytes, " bytes");
  // What "\n" and "\x9b" in double quotes can bring in.
  size_t at = 0;
  if (text.find_first_of("\t\n") != std::string::npos) return "it has a tab or a line end";
  if (std::string fault = FindBadCharacter(text, at); !fault.empty()) return fault;
  if (field.identifier && !IsIdentifier(text)) return "no such name";
  value = text;
  return "";
}

std::string ParseChoice(const YamlNode& node, const Field& field, FieldValue& value) {
  if (node.kind != YamlNode::Kind::kScalar) return "not a word";
  for (const std::string& choice : field.choices) {
    if (node.scalar != choice) continue;
    value = choice;
    return "";
  }
  return "not one of them";
}

std::string ParseIntegerList(const YamlNode& node, const Field& field, FieldValue& value) {
  if (node.kind != YamlNode::Kind::kList) return "not a list";
  std::vector<int64_t> list(node.items.size());
  for (size_t i = 0; i < list.size(); ++i) {
    const std::string why = ParseIntegerItem(node.items[i], field, list[i]);
    if (!why.empty()) return absl::StrCat("number ", i, " is ", Describe(node.items[i]), ", ", why);
  }
  value = std::move(list);
  return "";
}

std::string ParsePair(const YamlNode& node, const Field& field, FieldValue& value) {
  if (node.kind != YamlNode::Kind::kList) return "not a list";
  std::array<double, 2> pair{};
  if (node.items.size() != pair.size()) return absl::StrCat("it has ", node.items.size());
  for (size_t i = 0; i < pair.size(); ++i) {
    const std::string why = ParseNumberItem(node.items[i], field, pair[i]);
    if (!why.empty()) return absl::StrCat("number ", i, " is ", Describe(node.items[i]), ", ", why);
  }
  value = pair;
  return "";
}

std::string ParseLeaf(const YamlNode& node, const Field& field, FieldValue& value) {
  switch (field.type) {
    case Field::Type::kBool: {
      bool flag = false;
      if (node.kind != YamlNode::Kind::kScalar || node.quoted) return "not true or false";
      const std::string why = ParseBool(node.scalar, flag);
      value = flag;
      return why;
    }
    case Field::Type::kInteger: {
      int64_t number = 0;
      const std::string why = ParseIntegerItem(node, field, number);
      value = number;
      return why;
    }
    case Field::Type::kNumber: {
      double number = 0;
      const std::string why = ParseNumberItem(node, field, number);
      value = number;
      return why;
    }
    case Field::Type::kString:
      return ParseString(node, field, value);
    case Field::Type::kChoice:
      return ParseChoice(node, field, value);
    case Field::Type::kIntegerList:
      return ParseIntegerList(node, field, value);
    case Field::Type::kNumberPair:
      return ParsePair(node, field, value);
    case Field::Type::kSection:
    case Field::Type::kSectionList:
      break;
  }
  return "not a value";
}

// Whether the parenthesis behind "expected ..., found ..." would say the same again.
bool SaysNothingNew(absl::string_view why) {
  return why == "out of range" || why == "no such name" || absl::StartsWith(why, "not ");
}

// The default of a leaf goes through the same reading as a user's value.
void SetDefault(const Field& field) {
  YamlNode node;
  node.kind = YamlNode::Kind::kScalar;
  node.scalar = field.default_text;
  Problems problems;
  FieldValue value;
  if (absl::StartsWith(field.default_text, "[")) {
    CHECK(ParseYaml(field.key, field.default_text, node, problems)) << field.key;
  }
  const std::string why = ParseLeaf(node, field, value);
  CHECK(why.empty() && problems.empty())
      << field.key << ": default " << field.default_text << ": " << why;
  field.set(value);
}

class Reader {
 public:
  Reader(const YamlNode& root, const std::vector<Field>& schema, Problems& problems)
      : root_(root), schema_(schema), problems_(problems) {}

  ReadResult Read(std::vector<Field>& fields) {
    if (root_.kind == YamlNode::Kind::kMap) {
      ReadSection(root_, root_.origin, "", fields, Absent::kDefault);
    } else {
      result_.bad.insert("");
      if (root_.kind != YamlNode::Kind::kRefused) {
        problems_.Add(root_.origin, absl::StrCat("expected sections, found ", Describe(root_)));
      }
    }
    return std::move(result_);
  }

 private:
  // What a key means that is not given: its default, or (in a stage) what the top level says.
  enum class Absent { kDefault, kInherited };

  std::string Where(const std::string& path) const {
    return path.empty() ? "at the top level" : absl::StrCat("in ", DisplayPath(path));
  }

  void Complain(const Origin& origin, const std::string& path, std::string message,
                std::string hint = "") {
    problems_.Add(origin, std::move(message), std::move(hint));
    result_.bad.insert(path);
  }

  // `node` may be null, for a section that is not given at all; `origin` is then what lies around
  // it.
  void ReadSection(const YamlNode& node, const Origin& origin, const std::string& path,
                   std::vector<Field>& fields, Absent absent) {
    for (const YamlEntry& entry : node.entries) {
      const bool known = std::any_of(fields.begin(), fields.end(),
                                     [&](const Field& f) { return f.key == entry.key; });
      if (known) continue;
      std::string meant;  // looked for while it will be shown
      if (problems_.list().size() < kMostHints) meant = MeantKey(entry.key, path, fields, schema_);
      problems_.Add(entry.key_origin,
                    absl::StrCat("unknown key ", Quoted(entry.key), " ", Where(path)),
                    SuggestKey(meant, path));
      if (!meant.empty()) meant_.insert(meant);
    }
    for (Field& field : fields) {
      ReadField(node, origin, JoinKey(path, field.key), field, absent);
    }
  }

  void ReadField(const YamlNode& section, const Origin& origin, const std::string& path,
                 Field& field, Absent absent) {
    const YamlNode* node = nullptr;
    const Origin* key_origin = nullptr;
    for (const YamlEntry& entry : section.entries) {
      if (entry.key != field.key) continue;
      node = &entry.value;
      key_origin = &entry.key_origin;
    }
    if (node == nullptr) {
      ReadAbsent(origin, path, field, absent);
    } else if (node->kind == YamlNode::Kind::kRefused) {
      result_.bad.insert(path);
    } else if (field.type == Field::Type::kSection) {
      ReadGivenSection(*node, *key_origin, path, field, absent);
    } else if (field.type == Field::Type::kSectionList) {
      ReadList(*node, path, field);
    } else {
      ReadLeaf(*node, path, field);
    }
  }

  void ReadAbsent(const Origin& origin, const std::string& path, Field& field, Absent absent) {
    const bool inherited = absent == Absent::kInherited;
    switch (field.presence) {
      case Field::Presence::kRequired:
        Missing(origin, path, field, "");
        return;
      case Field::Presence::kRequiredInStage:
        if (!inherited) {
          unset_.insert(path);
        } else if (unset_.count(WithoutStage(path)) > 0) {
          Missing(origin, path, field,
                  absl::StrCat("give it here or, for all stages, as ", WithoutStage(path)));
        }
        return;
      case Field::Presence::kOptional:
        if (!inherited && field.is_leaf()) NoteDefault(path);
        return;
      case Field::Presence::kDefault:
        break;
    }
    if (field.type == Field::Type::kSection) {
      const YamlNode nothing;
      ReadSection(nothing, origin, path, field.children, absent);
      if (field.exactly_one) CheckExactlyOne(origin, path, field);
    } else if (!inherited) {
      if (field.is_leaf()) SetDefault(field);
      NoteDefault(path);
    }
  }

  void Missing(const Origin& origin, const std::string& path, const Field& field,
               std::string hint) {
    result_.bad.insert(path);
    // It is there under a name that is reported already.
    if (IsBad(meant_, path) || IsBad(meant_, AnyStage(path))) return;
    const size_t dot = path.rfind('.');
    const std::string section = dot == std::string::npos ? "" : path.substr(0, dot);
    problems_.Add(origin,
                  absl::StrCat("missing key '", field.key, "' ", Where(section), ": expected ",
                               field.Expected()),
                  std::move(hint));
  }

  void NoteDefault(const std::string& path) {
    Origin origin;
    origin.file = root_.origin.file;
    result_.origins[path] = origin;
  }

  void ReadGivenSection(const YamlNode& node, const Origin& key_origin, const std::string& path,
                        Field& field, Absent absent) {
    if (node.kind == YamlNode::Kind::kNull && field.presence == Field::Presence::kOptional) return;
    if (node.kind != YamlNode::Kind::kMap) {
      std::vector<std::string> keys;
      for (const Field& child : field.children) keys.push_back(child.key);
      Complain(node.origin, path,
               absl::StrCat(DisplayPath(path), ": expected a section {", absl::StrJoin(keys, ", "),
                            "}, found ", Describe(node)));
      return;
    }
    result_.origins[path] = key_origin;
    if (field.open) {
      std::vector<Field> children = field.open();
      ReadSection(node, key_origin, path, children, absent);
    } else {
      ReadSection(node, key_origin, path, field.children, absent);
    }
    if (field.exactly_one) CheckExactlyOne(key_origin, path, field);
  }

  void CheckExactlyOne(const Origin& origin, const std::string& path, const Field& field) {
    std::vector<std::string> keys, given;
    for (const Field& child : field.children) {
      keys.push_back(absl::StrCat("'", child.key, "'"));
      const std::string child_path = JoinKey(path, child.key);
      if (result_.bad.count(child_path) > 0) return;
      if (!std::holds_alternative<std::monostate>(child.get())) given.push_back(keys.back());
    }
    if (given.size() == 1) return;
    Complain(origin, path,
             absl::StrCat(path, ": expected exactly one of ", absl::StrJoin(keys, " and "),
                          ", found ", given.empty() ? "none" : "both"),
             given.empty() ? "" : absl::StrCat("an override takes one back: ", path, ".KEY="));
  }

  void ReadList(const YamlNode& node, const std::string& path, Field& field) {
    const size_t size = node.items.size();
    if (node.kind != YamlNode::Kind::kList || size < field.min_items || size > field.max_items) {
      const std::string found =
          node.kind == YamlNode::Kind::kList ? absl::StrCat("a list of ", size) : Describe(node);
      Complain(node.origin, path,
               absl::StrCat(DisplayPath(path), ": expected ", field.Expected(), ", found ", found));
      return;
    }
    result_.origins[path] = node.origin;
    // A list that a stage gives replaces the inherited one.
    field.clear();
    for (size_t i = 0; i < size; ++i) {
      const YamlNode& item = node.items[i];
      const std::string item_path = absl::StrCat(path, ".", i);
      std::vector<Field> children = field.append();
      if (item.kind != YamlNode::Kind::kMap) {
        if (item.kind != YamlNode::Kind::kRefused) {
          Complain(
              item.origin, item_path,
              absl::StrCat(DisplayPath(item_path), ": expected a section, found ", Describe(item)));
        }
        result_.bad.insert(item_path);
        continue;
      }
      result_.origins[item_path] = item.origin;
      ReadSection(item, item.origin, item_path, children,
                  path == "stages" ? Absent::kInherited : Absent::kDefault);
    }
  }

  void ReadLeaf(const YamlNode& node, const std::string& path, const Field& field) {
    FieldValue value;
    const bool absent =
        node.kind == YamlNode::Kind::kNull && field.presence == Field::Presence::kOptional;
    const std::string why = absent ? "" : ParseLeaf(node, field, value);
    if (why.empty()) {
      field.set(value);
      result_.origins[path] = node.origin;
      return;
    }
    const bool word = field.type == Field::Type::kChoice && node.kind == YamlNode::Kind::kScalar;
    Complain(node.origin, path,
             absl::StrCat(DisplayPath(path), ": expected ", field.Expected(), ", found ",
                          Describe(node), SaysNothingNew(why) ? "" : absl::StrCat(" (", why, ")")),
             word ? SuggestChoice(node.scalar, field.choices) : "");
  }

  const YamlNode& root_;
  const std::vector<Field>& schema_;
  Problems& problems_;
  ReadResult result_;
  std::set<std::string> meant_;  // keys that unknown keys were taken for
  std::set<std::string> unset_;  // kRequiredInStage keys that the top level does not give
};

}  // namespace

ReadResult ReadFields(const YamlNode& root, std::vector<Field>& fields, Problems& problems) {
  return Reader(root, fields, problems).Read(fields);
}

void SetDefaults(std::vector<Field>& fields) {
  for (Field& field : fields) {
    if (field.type == Field::Type::kSection && field.presence == Field::Presence::kDefault) {
      SetDefaults(field.children);
    } else if (field.is_leaf() && field.presence == Field::Presence::kDefault) {
      SetDefault(field);
    }
  }
}

bool IsBad(const std::set<std::string>& bad, absl::string_view key) {
  for (std::string path : {std::string(key), WithoutStage(key)}) {
    while (true) {
      if (bad.count(path) > 0) return true;
      const size_t dot = path.rfind('.');
      if (dot == std::string::npos) break;
      path.resize(dot);
    }
  }
  return bad.count("") > 0;
}

}  // namespace baleen
