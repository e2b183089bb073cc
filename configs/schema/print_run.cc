// PrintRunConfig: the effective run file, every line with the origin of its value.
#include <algorithm>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "configs/schema/field.h"
#include "configs/schema/run_fields.h"
#include "configs/schema/run_file.h"

namespace baleen {
namespace {

constexpr size_t kCommentColumn = 60;

class Printer {
 public:
  explicit Printer(const LoadedRun& loaded) : loaded_(loaded) {}

  std::string Print() {
    RunConfig config = loaded_.config;
    PrintFields(RunFields(config), "", 0);
    return std::move(text_);
  }

 private:
  // Whether a leaf at or below `path` was said by the file, an override or a default. What a stage
  // inherits was not said there, and is left out.
  bool IsSaid(const std::string& path, const Field& field) const {
    if (field.is_leaf() || field.type == Field::Type::kSectionList) {
      return loaded_.origins.count(path) > 0;
    }
    return std::any_of(field.children.begin(), field.children.end(),
                       [&](const Field& child) { return IsSaid(JoinKey(path, child.key), child); });
  }

  void Line(size_t indent, absl::string_view text, const std::string& path) {
    std::string line = absl::StrCat(std::string(indent, ' '), text);
    const auto at = loaded_.origins.find(path);
    if (at != loaded_.origins.end()) {
      line.append(line.size() < kCommentColumn ? kCommentColumn - line.size() : 2, ' ');
      absl::StrAppend(&line, "# ", at->second.ToString());
    }
    absl::StrAppend(&text_, line, "\n");
  }

  void PrintFields(const std::vector<Field>& fields, const std::string& path, size_t indent) {
    for (const Field& field : fields) {
      const std::string here = JoinKey(path, field.key);
      if (!IsSaid(here, field)) continue;
      if (field.is_leaf()) {
        Line(indent, absl::StrCat(field.key, ": ", field.Text()), here);
      } else if (field.type == Field::Type::kSection) {
        Line(indent, absl::StrCat(field.key, ":"), "");
        PrintSection(field, here, indent + 2);
      } else {
        PrintList(field, here, indent);
      }
    }
  }

  void PrintSection(const Field& section, const std::string& path, size_t indent) {
    std::vector<Field> fields = section.children;
    // Of keys that exclude each other the absent one is not worth a line.
    const auto is_null = [](const Field& f) { return f.is_leaf() && f.Text() == "null"; };
    if (section.exactly_one)
      fields.erase(std::remove_if(fields.begin(), fields.end(), is_null), fields.end());
    PrintFields(fields, path, indent);
  }

  void PrintList(const Field& field, const std::string& path, size_t indent) {
    if (field.size() == 0) {
      Line(indent, absl::StrCat(field.key, ": []"), path);
      return;
    }
    Line(indent, absl::StrCat(field.key, ":"), "");
    for (size_t i = 0; i < field.size(); ++i) {
      const size_t begin = text_.size();
      PrintFields(field.element(i), absl::StrCat(path, ".", i), indent + 4);
      text_[begin + indent + 2] = '-';  // the first key of an element stands behind its dash
    }
  }

  const LoadedRun& loaded_;
  std::string text_;
};

}  // namespace

std::string PrintRunConfig(const LoadedRun& loaded) { return Printer(loaded).Print(); }

}  // namespace baleen
