// A validator for the part of JSON Schema that describes the run file, so that the tests need no
// other language.
#pragma once

#include <regex>
#include <set>
#include <string>

#include "absl/strings/str_cat.h"
#include "nlohmann/json.hpp"

namespace baleen::testing {

class JsonSchema {
 public:
  explicit JsonSchema(nlohmann::json schema) : root_(std::move(schema)) {}

  // "" or the first fault, with its path. An unknown keyword of the schema is a fault too.
  std::string Check(const nlohmann::json& value) const { return Check(root_, value, "$"); }

 private:
  using Json = nlohmann::json;

  static bool HasType(const Json& value, const std::string& type) {
    if (type == "object") return value.is_object();
    if (type == "array") return value.is_array();
    if (type == "string") return value.is_string();
    if (type == "boolean") return value.is_boolean();
    if (type == "null") return value.is_null();
    if (type == "integer") return value.is_number_integer();
    return type == "number" && value.is_number();
  }

  std::string Check(const Json& schema, const Json& value, const std::string& path) const {
    for (const auto& [word, rule] : schema.items()) {
      const std::string fault = CheckWord(schema, word, rule, value, path);
      if (!fault.empty()) return fault;
    }
    return "";
  }

  std::string CheckWord(const Json& schema, const std::string& word, const Json& rule,
                        const Json& value, const std::string& path) const {
    static const std::set<std::string> kIgnored = {"$schema", "title", "description", "default"};
    if (kIgnored.count(word) > 0) return "";
    bool holds = true;
    if (word == "$ref") {
      return Check(root_.at(Json::json_pointer(rule.get<std::string>().substr(1))), value, path);
    } else if (word == "type") {
      holds = false;
      for (const Json& type : rule.is_array() ? rule : Json::array({rule}))
        holds |= HasType(value, type);
    } else if (word == "enum") {
      holds = std::find(rule.begin(), rule.end(), value) != rule.end();
    } else if (word == "pattern" || word == "minLength") {
      if (!value.is_string()) return "";
      const auto text = value.get<std::string>();
      holds = word == "pattern" ? std::regex_search(text, std::regex(rule.get<std::string>()))
                                : text.size() >= rule.get<size_t>();
    } else if (word == "minimum" || word == "exclusiveMinimum" || word == "maximum" ||
               word == "exclusiveMaximum") {
      if (!value.is_number()) return "";
      const double number = value, bound = rule;
      holds = word == "minimum"            ? number >= bound
              : word == "maximum"          ? number <= bound
              : word == "exclusiveMinimum" ? number > bound
                                           : number < bound;
    } else if (word == "required") {
      for (const Json& key : rule)
        holds &= !value.is_object() || value.contains(key.get<std::string>());
    } else if (word == "oneOf") {
      int count = 0;
      for (const Json& choice : rule) count += Check(choice, value, path).empty() ? 1 : 0;
      holds = count == 1;
    } else if (word == "minItems" || word == "maxItems") {
      if (!value.is_array()) return "";
      holds = word == "minItems" ? value.size() >= rule.get<size_t>()
                                 : value.size() <= rule.get<size_t>();
    } else {
      return CheckChildren(schema, word, rule, value, path);
    }
    return holds ? "" : absl::StrCat(path, ": ", word, " ", rule.dump(), " refuses ", value.dump());
  }

  std::string CheckChildren(const Json& schema, const std::string& word, const Json& rule,
                            const Json& value, const std::string& path) const {
    if (word == "items") {
      for (size_t i = 0; value.is_array() && i < value.size(); ++i) {
        const std::string fault = Check(rule, value[i], absl::StrCat(path, "[", i, "]"));
        if (!fault.empty()) return fault;
      }
      return "";
    }
    if (word == "properties" || word == "additionalProperties") {
      if (!value.is_object()) return "";
      for (const auto& [key, child] : value.items()) {
        const Json& known = schema.at("properties");
        if (!known.contains(key)) return absl::StrCat(path, ": additional property ", key);
        const std::string fault = Check(known.at(key), child, absl::StrCat(path, ".", key));
        if (!fault.empty()) return fault;
      }
      return "";
    }
    return absl::StrCat(path, ": the schema has an unknown word ", word);
  }

  Json root_;
};

}  // namespace baleen::testing
