// The fields of a model file: the keys of config.json that describe an architecture.
#pragma once

#include <vector>

#include "configs/schema/field.h"
#include "configs/schema/model_config.h"

namespace baleen {

// Bound to `config`, which must outlive them; the defaults are those of the struct.
std::vector<Field> ModelFields(ModelConfig& config);

}  // namespace baleen
