#include "trainer/arguments.h"

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_join.h"

namespace baleen {

absl::StatusOr<ParsedArguments> ParsedArguments::Parse(const std::string& command,
                                                       const Arguments& arguments,
                                                       const std::vector<FlagSpec>& flags) {
  ParsedArguments parsed;
  parsed.command_ = command;
  const auto known = [&] {
    return absl::StrJoin(flags, " ", [](std::string* out, const FlagSpec& f) {
      absl::StrAppend(out, "--", f.name);
    });
  };
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (!absl::StartsWith(argument, "--")) {
      parsed.positional_.push_back(argument);
      continue;
    }
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(2, equals == std::string::npos ? equals : equals - 2);
    const FlagSpec* spec = nullptr;
    for (const FlagSpec& flag : flags) {
      if (flag.name == name) spec = &flag;
    }
    if (spec == nullptr) {
      return ConfigError("baleen ", command, ": no flag --", name, "; there are: ", known());
    }
    std::string value;
    if (equals != std::string::npos) {
      if (!spec->takes_value)
        return ConfigError("baleen ", command, ": --", name, " takes no value");
      value = argument.substr(equals + 1);
    } else if (spec->takes_value) {
      if (i + 1 == arguments.size() || absl::StartsWith(arguments[i + 1], "--"))
        return ConfigError("baleen ", command, ": --", name, " needs a value");
      value = arguments[++i];
    }
    if (!parsed.values_.emplace(name, value).second) {
      return ConfigError("baleen ", command, ": --", name, " is given twice");
    }
  }
  return parsed;
}

std::string ParsedArguments::Value(const std::string& flag, const std::string& otherwise) const {
  const auto found = values_.find(flag);
  return found == values_.end() ? otherwise : found->second;
}

absl::StatusOr<int64_t> ParsedArguments::Integer(const std::string& flag, int64_t otherwise,
                                                 int64_t at_least) const {
  const auto found = values_.find(flag);
  if (found == values_.end()) return otherwise;
  int64_t value = 0;
  if (!absl::SimpleAtoi(found->second, &value) || value < at_least) {
    return ConfigError("baleen ", command_, ": --", flag, " = '", found->second,
                       "': expected a whole number of ", at_least, " or more");
  }
  return value;
}

absl::Status ParsedArguments::CheckPositional(int least, int most, const std::string& usage) const {
  const int count = static_cast<int>(positional_.size());
  if (count >= least && (most < 0 || count <= most)) return absl::OkStatus();
  return ConfigError("baleen ", command_, ": found ", count, " argument(s); usage: ", usage);
}

}  // namespace baleen
