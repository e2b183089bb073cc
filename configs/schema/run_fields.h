// The fields of the run file: every key, default, range, unit and doc line of RunConfig.
#pragma once

#include <vector>

#include "configs/schema/field.h"
#include "configs/schema/run_config.h"

namespace baleen {

// Bound to `config`, which must outlive them. "stages" comes last and inherits what the sections
// hold when an element is appended, so read the fields in order.
std::vector<Field> RunFields(RunConfig& config);
std::vector<Field> StageFields(StageConfig& stage);

}  // namespace baleen
