#include "configs/schema/yaml_document.h"

#include <algorithm>
#include <sstream>
#include <unordered_map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "configs/schema/yaml_text.h"
#include "yaml-cpp/eventhandler.h"
#include "yaml-cpp/yaml.h"

namespace baleen {
namespace {

// A legitimate run file has hundreds of values. The bound keeps the tree of a hostile file in a few
// MiB.
constexpr int kMostYamlNodes = 50000;

// Turns yaml-cpp's events into the tree. Containers that are open stand on a stack of their own
// values and are moved into their parents when they end. Marks are 0-based.
class TreeBuilder : public YAML::EventHandler {
 public:
  TreeBuilder(const YamlText& text, Problems& problems) : text_(text), problems_(problems) {}

  YamlNode TakeRoot() { return std::move(root_); }
  // Too deep or too many: the rest of the events is passed over, and an exception that follows says
  // nothing new.
  bool gave_up() const { return gave_up_; }
  // Where the innermost list or map that has not ended begins; nullptr if there is none.
  const Origin* OpenContainer() const {
    return open_.empty() ? nullptr : &open_.back().node.origin;
  }

  void OnDocumentStart(const YAML::Mark& mark) override {
    if (documents_++ == 1) {
      problems_.Add(At(mark), "a second document begins here; a configuration is one document");
    }
  }
  void OnDocumentEnd() override {}

  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    YamlNode node;
    node.origin = At(mark);
    // An empty value has no place of its own (yaml-cpp gives that of the next token): its key
    // stands for it.
    const absl::string_view here = From(mark);
    const char first = here.empty() ? ' ' : here[0];
    const bool written =
        first == '~' || first == 'n' || first == 'N' || first == '&' || first == '!';
    if (written && first != '&' && first != '!') node.origin.length = first == '~' ? 1 : 4;
    if (!written && WantsValue()) node.origin = open_.back().key_origin;
    Place(std::move(node), mark, "?", anchor);
  }

  void OnAlias(const YAML::Mark& mark, YAML::anchor_t) override {
    problems_.Add(At(mark), "an alias (*name); aliases are not accepted, write the value out");
    YamlNode node;
    node.kind = YamlNode::Kind::kRefused;
    node.origin = At(mark);
    Place(std::move(node), mark, "?", 0);
  }

  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    YamlNode node;
    node.kind = YamlNode::Kind::kScalar;
    node.scalar = value;
    node.quoted = tag == "!";
    const absl::string_view here = From(mark);
    size_t length = 1;
    if (absl::StartsWith(here, value)) length = value.size();
    if (absl::StartsWith(here, "'") || absl::StartsWith(here, "\"")) {
      length = text_.QuotedLength(mark.line, mark.column);
      // yaml-cpp takes the end of the file for the closing quote.
      if (length == 0) problems_.Add(At(mark), "a quote that does not end");
    }
    node.origin = At(mark, static_cast<int>(std::min(length, here.size())));
    Place(std::move(node), mark, tag, anchor);
  }

  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    Open(YamlNode::Kind::kList, mark, tag, anchor);
  }
  void OnSequenceEnd() override { Close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    Open(YamlNode::Kind::kMap, mark, tag, anchor);
  }
  void OnMapEnd() override { Close(); }

 private:
  struct OpenNode {
    YamlNode node;
    bool has_key = false;  // of a map: the key is read, its value comes next
    std::string key;
    Origin key_origin;
    bool key_refused = false;
    std::unordered_map<std::string, int> seen;  // key -> line, 1-based
  };

  Origin At(const YAML::Mark& mark, int length = 1) const {
    return text_.At(mark.line, mark.column, length);
  }
  absl::string_view From(const YAML::Mark& mark) const {
    if (mark.line < 0 || mark.line >= static_cast<int>(text_.lines.size())) return "";
    const absl::string_view line = text_.lines[mark.line];
    return mark.column < 0 || mark.column > static_cast<int>(line.size())
               ? absl::string_view()
               : line.substr(mark.column);
  }
  bool WantsValue() const {
    return !open_.empty() && open_.back().node.kind == YamlNode::Kind::kMap && open_.back().has_key;
  }

  // Anchors and tags are reported; what they decorate is still read, so that its own faults are
  // found too.
  void CheckProperties(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    const absl::string_view here = From(mark);
    if (anchor != 0 || (!here.empty() && here[0] == '&')) {
      problems_.Add(At(mark), "an anchor (&name); anchors are not accepted, write the value out");
    }
    // "!" is yaml-cpp's word for a quoted scalar too.
    if ((tag != "?" && tag != "!" && !tag.empty()) || absl::StartsWith(here, "!")) {
      problems_.Add(At(mark), absl::StrCat("a tag (", Quoted(tag), "); tags are not accepted"));
    }
  }

  bool Counted(const Origin& origin) {
    if (gave_up_ || documents_ > 1) return false;
    if (++nodes_ > kMostYamlNodes) {
      problems_.Add(origin, absl::StrCat("more than ", kMostYamlNodes, " values"));
      gave_up_ = true;
    }
    return !gave_up_;
  }

  void Open(YamlNode::Kind kind, const YAML::Mark& mark, const std::string& tag,
            YAML::anchor_t anchor) {
    YamlNode node;
    node.kind = kind;
    node.origin = At(mark);
    if (!Counted(node.origin)) return;
    if (static_cast<int>(open_.size()) == kMostYamlDepth) {
      problems_.Add(node.origin, absl::StrCat("nested more than ", kMostYamlDepth, " deep"));
      gave_up_ = true;
      return;
    }
    CheckProperties(mark, tag, anchor);
    open_.emplace_back().node = std::move(node);
  }

  void Close() {
    if (gave_up_ || documents_ > 1) return;
    YamlNode node = std::move(open_.back().node);
    open_.pop_back();
    Attach(std::move(node));
  }

  void Place(YamlNode node, const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor) {
    if (!Counted(node.origin)) return;
    CheckProperties(mark, tag, anchor);
    Attach(std::move(node));
  }

  // A finished value goes to the document, the list, or (as key or value) the map around it.
  void Attach(YamlNode node) {
    if (open_.empty()) {
      root_ = std::move(node);
    } else if (open_.back().node.kind == YamlNode::Kind::kList) {
      open_.back().node.items.push_back(std::move(node));
    } else if (!open_.back().has_key) {
      TakeKey(node);
    } else {
      OpenNode& map = open_.back();
      map.has_key = false;
      if (map.key_refused) return;
      map.node.entries.push_back({std::move(map.key), std::move(map.key_origin), std::move(node)});
    }
  }

  void TakeKey(const YamlNode& node) {
    OpenNode& map = open_.back();
    map.has_key = true;
    map.key_refused = true;
    map.key_origin = node.origin;
    if (node.kind == YamlNode::Kind::kRefused) return;
    if (node.kind != YamlNode::Kind::kScalar) {
      problems_.Add(node.origin, absl::StrCat("a key must be a word, found ", Describe(node)));
      return;
    }
    if (node.scalar == "<<" && !node.quoted) {
      problems_.Add(node.origin,
                    "a merge key (<<); merge keys are not accepted, write the keys out");
      return;
    }
    const auto [at, first] = map.seen.emplace(node.scalar, node.origin.line);
    if (!first) {
      problems_.Add(node.origin,
                    absl::StrCat("key ", Quoted(node.scalar), " is repeated; it was given in line ",
                                 at->second, " already"));
      return;
    }
    map.key_refused = false;
    map.key = node.scalar;
  }

  const YamlText& text_;
  Problems& problems_;
  YamlNode root_;
  std::vector<OpenNode> open_;
  int nodes_ = 0;
  int documents_ = 0;
  bool gave_up_ = false;
};

// Runs yaml-cpp; its exceptions end here. Returns false when the text was not read to its end.
bool RunParser(const YamlText& text, TreeBuilder& builder, Problems& problems) {
  std::istringstream stream(text.text);
  try {
    YAML::Parser parser(stream);
    // A second document is one fault; a third is not another.
    for (int documents = 0; documents < 2 && parser.HandleNextDocument(builder); ++documents) {
    }
    return true;
  } catch (const YAML::Exception& error) {
    if (builder.gave_up()) return false;
    const Origin at = text.At(error.mark.line, error.mark.column);
    std::string hint;
    if (error.msg == "the referenced anchor is not defined") {
      problems.Add(at, "an alias (*name); aliases are not accepted, write the value out");
      return false;
    }
    if (builder.OpenContainer() != nullptr) {
      hint = absl::StrCat("inside what begins in line ", builder.OpenContainer()->line);
    }
    problems.Add(at, absl::StrCat("not YAML: ", error.msg), hint);
  } catch (const std::exception& error) {
    problems.Add(text.At(0, 0), absl::StrCat("not YAML: ", error.what()));
  }
  return false;
}

}  // namespace

YamlNode* YamlNode::Find(absl::string_view key) {
  for (YamlEntry& entry : entries) {
    if (entry.key == key) return &entry.value;
  }
  return nullptr;
}

const YamlNode* YamlNode::Find(absl::string_view key) const {
  return const_cast<YamlNode*>(this)->Find(key);
}

bool ParseYaml(const std::string& name, absl::string_view raw, YamlNode& root, Problems& problems) {
  if (raw.size() > kMostYamlBytes) {
    Origin whole;
    whole.kind = Origin::Kind::kFile;
    whole.file = name;
    problems.Add(whole, absl::StrCat("expected at most ", kMostYamlBytes, " bytes (1 MiB), found ",
                                     raw.size()));
    return false;
  }
  const YamlText text(name, raw);
  root.origin = text.At(0, 0);
  if (!CheckYamlText(text, problems)) return false;
  TreeBuilder builder(text, problems);
  const bool complete = RunParser(text, builder, problems) && !builder.gave_up();
  if (complete) root = builder.TakeRoot();
  if (root.origin.line == 0) root.origin = text.At(0, 0);
  return complete;
}

std::string Describe(const YamlNode& node) {
  switch (node.kind) {
    case YamlNode::Kind::kNull:
      return "nothing";
    case YamlNode::Kind::kScalar:
      return absl::StrCat(node.quoted ? "the quoted string " : "", Quoted(node.scalar));
    case YamlNode::Kind::kList:
      return "a list";
    case YamlNode::Kind::kMap:
      return "a section";
    case YamlNode::Kind::kRefused:
      break;
  }
  return "something refused";
}

}  // namespace baleen
