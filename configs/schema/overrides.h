// Overrides of the command line: "a.b=value" put into the tree of the run file before it is read.
#pragma once

#include <string>
#include <vector>

#include "configs/schema/problems.h"
#include "configs/schema/yaml_document.h"

namespace baleen {

// In order; a later one wins. The value is YAML ("[0.9, 0.99]", "{tensor: 2}") and replaces what
// was there, an empty one (null) takes an optional key back. '-' in a key is '_'; a leading "--" is
// dropped; numbers index lists, one past the end appends. A section that the file does not have is
// made.
void ApplyOverrides(const std::vector<std::string>& overrides, YamlNode& root, Problems& problems);

}  // namespace baleen
