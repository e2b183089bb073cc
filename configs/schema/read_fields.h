// Reading a tree of YAML into the members that fields are bound to, with every fault noted and
// every origin kept.
#pragma once

#include <map>
#include <set>
#include <string>
#include <vector>

#include "configs/schema/field.h"
#include "configs/schema/problems.h"
#include "configs/schema/yaml_document.h"

namespace baleen {

struct ReadResult {
  // Key path -> where the value comes from. Keys that a stage inherits are absent.
  std::map<std::string, Origin> origins;
  // Key paths whose value is not to be trusted: refused, missing, or inside something refused.
  std::set<std::string> bad;
};

// Fills what `fields` are bound to from `root` and from the defaults.
ReadResult ReadFields(const YamlNode& root, std::vector<Field>& fields, Problems& problems);

// The default of every key that has one; required keys stay as they are.
void SetDefaults(std::vector<Field>& fields);

// Whether `key` or what it lies in (a stage: also what it inherits from) is in `bad`.
bool IsBad(const std::set<std::string>& bad, absl::string_view key);

}  // namespace baleen
