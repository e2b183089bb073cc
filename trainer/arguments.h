// Command lines of the subcommands: positional arguments and --flags, each flag given at most once.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "kernels/core/status.h"
#include "trainer/commands.h"

namespace baleen {

struct FlagSpec {
  std::string name;  // without the dashes
  bool takes_value = true;
};

class ParsedArguments {
 public:
  // "--flag value" or "--flag=value". ConfigError names the command, the flag and what there is.
  static absl::StatusOr<ParsedArguments> Parse(const std::string& command,
                                               const Arguments& arguments,
                                               const std::vector<FlagSpec>& flags);

  const std::vector<std::string>& positional() const { return positional_; }
  bool Has(const std::string& flag) const { return values_.count(flag) > 0; }
  std::string Value(const std::string& flag, const std::string& otherwise) const;
  absl::StatusOr<int64_t> Integer(const std::string& flag, int64_t otherwise,
                                  int64_t at_least) const;
  // ConfigError unless there are between `least` and `most` positional arguments (most < 0: any
  // number).
  absl::Status CheckPositional(int least, int most, const std::string& usage) const;

 private:
  std::string command_;
  std::vector<std::string> positional_;
  std::map<std::string, std::string> values_;
};

}  // namespace baleen
