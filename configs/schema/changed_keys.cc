// ChangedKeys: two run files compared by what is in effect for the run and in each stage.
#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "configs/schema/field.h"
#include "configs/schema/run_fields.h"
#include "configs/schema/run_file.h"

namespace baleen {
namespace {

using Values = std::map<std::string, std::string>;  // key path -> value as YAML

void Collect(const std::vector<Field>& fields, const std::string& path, Values& values) {
  for (const Field& field : fields) {
    const std::string here = JoinKey(path, field.key);
    if (field.is_leaf()) {
      values[here] = field.Text();
    } else if (field.type == Field::Type::kSection) {
      Collect(field.children, here, values);
    } else {
      for (size_t i = 0; i < field.size(); ++i) {
        Collect(field.element(i), absl::StrCat(here, ".", i), values);
      }
    }
  }
}

// "KEY before -> after" without the key, of each key that differs.
Values Differences(const Values& before, const Values& after) {
  Values result;
  for (const auto& [key, value] : after) {
    const auto old = before.find(key);
    const std::string was = old == before.end() ? "(absent)" : old->second;
    if (was != value) result[key] = absl::StrCat(was, " -> ", value);
  }
  for (const auto& [key, value] : before) {
    if (after.count(key) == 0) result[key] = absl::StrCat(value, " -> (absent)");
  }
  return result;
}

// What belongs to the run itself: a stage's values are in effect for it, whoever said them.
Values RunValues(RunConfig config) {
  std::vector<Field> fields = RunFields(config);
  fields.erase(std::remove_if(fields.begin(), fields.end(),
                              [](const Field& f) { return f.key != "run" && f.key != "model"; }),
               fields.end());
  Values values;
  Collect(fields, "", values);
  return values;
}

Values StageValues(StageConfig stage) {
  Values values;
  Collect(StageFields(stage), "", values);
  return values;
}

}  // namespace

std::vector<std::string> ChangedKeys(const RunConfig& before, const RunConfig& after) {
  std::vector<std::string> lines;
  for (const auto& [key, change] : Differences(RunValues(before), RunValues(after))) {
    lines.push_back(absl::StrCat(key, " ", change));
  }
  const size_t stages = std::min(before.stages.size(), after.stages.size());
  std::vector<Values> changes;
  for (size_t i = 0; i < stages; ++i) {
    changes.push_back(Differences(StageValues(before.stages[i]), StageValues(after.stages[i])));
  }
  for (size_t i = 0; i < stages; ++i) {
    for (const auto& [key, change] : changes[i]) {
      const bool everywhere =
          stages > 1 && std::all_of(changes.begin(), changes.end(), [&](const Values& other) {
            const auto at = other.find(key);
            return at != other.end() && at->second == change;
          });
      if (everywhere && i > 0) continue;
      lines.push_back(
          absl::StrCat(everywhere ? key : absl::StrCat("stages.", i, ".", key), " ", change));
    }
  }
  return lines;
}

}  // namespace baleen
