// What a figure of baleen bench ops is held against: what the best public kernel reaches on an H100
// at the same shape, and the goal of Baleen's own. Published or measured peers are cited by name.
#pragma once

#include <optional>
#include <string>

#include "trainer/bench/op_case.h"

namespace baleen {

enum class GoalUnit : uint8_t {
  kTeraflops,        // more is better
  kMicrosecondsRow,  // of a query row; less is better
  kPercent,          // of the ceiling that bounds the op; more is better
};

struct OpGoal {
  GoalUnit unit = GoalUnit::kTeraflops;
  double peer = 0;   // 0: none published
  std::string name;  // of the peer
  double goal = 0;
};

// Of H100s and bf16; nothing where neither peer nor goal is known for the shape. `bytes`: what the
// call moves.
std::optional<OpGoal> GoalOf(const OpCase& op, const OpSizes& sizes, double bytes);

// A figure of this unit over `reference`, more being better: 1.1 is 10 % faster.
double Ratio(GoalUnit unit, double figure, double reference);

}  // namespace baleen
