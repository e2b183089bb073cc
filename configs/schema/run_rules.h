// Rules between values of one run file: what no single key can tell.
#pragma once

#include <string>
#include <vector>

#include "configs/schema/run_config.h"

namespace baleen {

struct BrokenRule {
  std::vector<std::string> keys;  // key paths that take part; the first is the one to point at
  std::string message;
};

std::vector<BrokenRule> CheckRules(const RunConfig& config);

}  // namespace baleen
