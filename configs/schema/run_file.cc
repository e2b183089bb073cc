#include "configs/schema/run_file.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "configs/schema/overrides.h"
#include "configs/schema/problems.h"
#include "configs/schema/read_fields.h"
#include "configs/schema/run_fields.h"
#include "configs/schema/run_rules.h"
#include "configs/schema/yaml_document.h"
#include "kernels/core/file.h"

namespace baleen {
namespace {

Origin WholeFile(const std::string& path) {
  Origin origin;
  origin.kind = Origin::Kind::kFile;
  origin.file = path;
  return origin;
}

// The value of a leaf as it is in effect, "" if there is no such leaf.
std::string ValueText(absl::string_view key, absl::string_view path,
                      const std::vector<Field>& fields) {
  for (const Field& field : fields) {
    const std::string here = JoinKey(path, field.key);
    if (here == key) return field.is_leaf() ? field.Text() : "";
    if (field.type != Field::Type::kSection) continue;
    const std::string text = ValueText(key, here, field.children);
    if (!text.empty()) return text;
  }
  return "";
}

// Where somebody said something about `path`; nullptr where it is a default, or nothing.
const Origin* SaidAt(const LoadedRun& loaded, const std::string& path) {
  const auto at = loaded.origins.find(path);
  const bool said = at != loaded.origins.end() && at->second.kind != Origin::Kind::kDefault;
  return said ? &at->second : nullptr;
}

void AddAt(const LoadedRun& loaded, absl::string_view key, absl::string_view message,
           Problems& problems) {
  const std::string plain = WithoutStage(key);
  const Origin* at = SaidAt(loaded, std::string(key));
  if (at == nullptr) at = SaidAt(loaded, plain);
  if (at != nullptr) {
    problems.Add(*at, std::string(message));
    return;
  }
  // A key that nobody gave lies in a section that somebody gave, or in none.
  for (std::string path = plain; at == nullptr && path.find('.') != std::string::npos;) {
    path.resize(path.rfind('.'));
    at = SaidAt(loaded, path);
  }
  RunConfig config = loaded.config;
  const std::string value = ValueText(plain, "", RunFields(config));
  problems.Add(
      at != nullptr ? *at : WholeFile(loaded.path), std::string(message),
      absl::StrCat(
          "note: ", plain, " is not given",
          value.empty() || value == "null" ? "" : absl::StrCat("; its default is ", value)));
}

}  // namespace

absl::StatusOr<LoadedRun> ParseRunConfig(const std::string& name, absl::string_view text,
                                         const std::vector<std::string>& overrides) {
  Problems problems;
  YamlNode root;
  // A file that breaks off half-way would be said to miss half of its keys.
  if (!ParseYaml(name, text, root, problems)) return problems.ToStatus();
  if (root.kind == YamlNode::Kind::kMap) ApplyOverrides(overrides, root, problems);
  LoadedRun loaded;
  loaded.path = name;
  std::vector<Field> fields = RunFields(loaded.config);
  ReadResult read = ReadFields(root, fields, problems);
  loaded.origins = std::move(read.origins);
  for (const BrokenRule& rule : CheckRules(loaded.config)) {
    const bool trusted = std::none_of(rule.keys.begin(), rule.keys.end(),
                                      [&](const std::string& key) { return IsBad(read.bad, key); });
    if (trusted) AddAt(loaded, rule.keys[0], rule.message, problems);
  }
  if (!problems.empty()) return problems.ToStatus();
  return loaded;
}

absl::StatusOr<LoadedRun> LoadRunConfig(const std::string& path,
                                        const std::vector<std::string>& overrides) {
  const absl::StatusOr<std::string> text = ReadFile(path, kMostYamlBytes);
  if (!text.ok()) return ConfigError("run file: ", text.status().message());
  return ParseRunConfig(path, *text, overrides);
}

absl::Status ValidateRunConfig(const LoadedRun& loaded) {
  std::vector<KeyError> errors;
  for (const BrokenRule& rule : CheckRules(loaded.config)) {
    errors.push_back({rule.keys[0], rule.message});
  }
  return ConfigErrorsAt(loaded, errors);
}

absl::Status ConfigErrorAt(const LoadedRun& loaded, absl::string_view key,
                           absl::string_view message) {
  return ConfigErrorsAt(loaded, {{std::string(key), std::string(message)}});
}

absl::Status ConfigErrorsAt(const LoadedRun& loaded, const std::vector<KeyError>& errors) {
  Problems problems;
  for (const KeyError& error : errors) AddAt(loaded, error.key, error.message, problems);
  return problems.ToStatus();
}

StageConfig DefaultStageConfig() {
  StageConfig stage;
  std::vector<Field> fields = StageFields(stage);
  SetDefaults(fields);
  return stage;
}

}  // namespace baleen
