// Problems: every fault of one configuration, gathered before any is shown, then printed sorted by
// place.
#pragma once

#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/string_view.h"
#include "configs/schema/origin.h"
#include "kernels/core/status.h"

namespace baleen {

struct Problem {
  Origin origin;
  std::string message;
  std::string hint;  // "did you mean 'optimizer'?"; may be empty
};

class Problems {
 public:
  // The same message about the same place counts once: a value that three stages inherit is one
  // fault.
  void Add(const Origin& origin, std::string message, std::string hint = "");
  bool empty() const { return problems_.empty(); }
  const std::vector<Problem>& list() const { return problems_; }  // in the order they were added
  // Ok when empty; else a ConfigError whose message lists all and ends "N errors. Nothing was
  // started."
  absl::Status ToStatus() const;

 private:
  std::vector<Problem> problems_;  // the first kMostKept; a hostile file could have a million
  std::set<std::tuple<bool, int, int, std::string>> seen_;
};

// 'text' in quotes for a message: one line, at most 60 bytes, control characters as \xNN.
std::string Quoted(absl::string_view text);

}  // namespace baleen
