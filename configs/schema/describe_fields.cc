#include "configs/schema/describe_fields.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_replace.h"
#include "configs/schema/scalar.h"
#include "kernels/core/check.h"
#include "nlohmann/json.hpp"

namespace baleen {
namespace {

using Json = nlohmann::ordered_json;

bool IsIn(const std::vector<Field>& fields, absl::string_view key) {
  return std::any_of(fields.begin(), fields.end(), [&](const Field& f) { return f.key == key; });
}

Json BoundJson(const Field& field, double value) {
  const bool whole = field.type == Field::Type::kInteger || field.type == Field::Type::kIntegerList;
  return whole ? Json(static_cast<int64_t>(value)) : Json(value);
}

void AddBounds(const Field& field, Json& json) {
  if (field.low)
    json[field.low->open ? "exclusiveMinimum" : "minimum"] = BoundJson(field, field.low->value);
  if (field.high)
    json[field.high->open ? "exclusiveMaximum" : "maximum"] = BoundJson(field, field.high->value);
}

// The type of a leaf's value. An optional one may also be null.
Json LeafJson(const Field& field) {
  Json json;
  Json item;
  switch (field.type) {
    case Field::Type::kBool:
      json["type"] = "boolean";
      break;
    case Field::Type::kInteger:  // a number, or one with a suffix: 32Ki
      json["type"] = {"integer", "string"};
      json["pattern"] = kIntegerPattern;
      AddBounds(field, json);
      break;
    case Field::Type::kNumber:
      json["type"] = "number";
      AddBounds(field, json);
      break;
    case Field::Type::kString:
      json["type"] = "string";
      json["minLength"] = 1;
      if (field.identifier) json["pattern"] = kIdentifierPattern;
      break;
    case Field::Type::kChoice:
      json["enum"] = field.choices;
      break;
    case Field::Type::kIntegerList:
      item["type"] = "integer";
      AddBounds(field, item);
      json["type"] = "array";
      json["items"] = std::move(item);
      break;
    case Field::Type::kNumberPair:
      item["type"] = "number";
      AddBounds(field, item);
      json["type"] = "array";
      json["items"] = std::move(item);
      json["minItems"] = json["maxItems"] = 2;
      break;
    case Field::Type::kSection:
    case Field::Type::kSectionList:
      CHECK(false) << field.key << " is no leaf";
  }
  if (field.presence == Field::Presence::kOptional) {
    json["type"] =
        json["type"].is_array() ? Json{"integer", "string", "null"} : Json{json["type"], "null"};
  }
  return json;
}

Json SectionJson(const std::vector<Field>& fields, const std::vector<Field>& top);

Json FieldJson(const Field& field, const std::vector<Field>& top) {
  Json json;
  if (field.type == Field::Type::kSection) {
    json = SectionJson(field.children, {});
    if (field.exactly_one) {
      for (const Field& child : field.children)
        json["oneOf"].push_back({{"required", {child.key}}});
    }
    if (field.presence == Field::Presence::kOptional) json["type"] = {"object", "null"};
  } else if (field.type == Field::Type::kSectionList) {
    json["type"] = "array";
    json["items"] = SectionJson(field.children, top);
    json["minItems"] = field.min_items;
    json["maxItems"] = field.max_items;
  } else {
    json = LeafJson(field);
  }
  json["description"] =
      field.unit.empty() ? field.doc : absl::StrCat(field.doc, " [", field.unit, "]");
  if (field.presence == Field::Presence::kDefault && !field.default_text.empty()) {
    // A default is YAML of which JSON knows all but the plain words.
    const bool word = field.type == Field::Type::kChoice || field.type == Field::Type::kString;
    json["default"] = word ? Json(field.default_text) : Json::parse(field.default_text);
  }
  return json;
}

// What `top` has too (a stage's sections) is said there once and referred to.
Json SectionJson(const std::vector<Field>& fields, const std::vector<Field>& top) {
  Json json;
  json["type"] = "object";
  json["additionalProperties"] = false;
  json["properties"] = Json::object();
  for (const Field& field : fields) {
    const bool shared = IsIn(top, field.key);
    json["properties"][field.key] = shared
                                        ? Json{{"$ref", absl::StrCat("#/properties/", field.key)}}
                                        : FieldJson(field, fields);
    const bool section_needed =
        field.type == Field::Type::kSection &&
        std::any_of(field.children.begin(), field.children.end(),
                    [&](const Field& f) { return f.presence == Field::Presence::kRequired; });
    if (!shared && (field.presence == Field::Presence::kRequired || field.exactly_one ||
                    (section_needed && field.presence == Field::Presence::kDefault))) {
      json["required"].push_back(field.key);
    }
  }
  return json;
}

std::string DefaultText(const Field& field) {
  switch (field.presence) {
    case Field::Presence::kRequired:
      return "required";
    case Field::Presence::kRequiredInStage:
      return "required, here or in every stage";
    case Field::Presence::kOptional:
      return "absent";
    case Field::Presence::kDefault:
      break;
  }
  return field.default_text.empty() ? "" : absl::StrCat("`", field.default_text, "`");
}

std::string Cell(absl::string_view text) { return absl::StrReplaceAll(text, {{"|", "\\|"}}); }

void AppendTable(const std::vector<Field>& fields, std::string& text) {
  absl::StrAppend(&text, "| key | value | default | meaning |\n|---|---|---|---|\n");
  for (const Field& field : fields) {
    const std::string unit = field.unit.empty() ? "" : absl::StrCat(", in ", field.unit);
    absl::StrAppend(&text, "| `", field.key, "` | ", Cell(field.Expected()), unit, " | ",
                    Cell(DefaultText(field)), " | ", Cell(field.doc), " |\n");
  }
  absl::StrAppend(&text, "\n");
}

// What the elements of a list share with the level around it (a stage's sections) is described
// there.
void AppendSections(const std::vector<Field>& fields, const std::string& path, int level,
                    std::string& text) {
  for (const Field& field : fields) {
    if (field.is_leaf()) continue;
    const bool is_list = field.type == Field::Type::kSectionList;
    const std::string here = absl::StrCat(JoinKey(path, field.key), is_list ? "[]" : "");
    const std::vector<Field> around = is_list ? fields : std::vector<Field>{};
    std::vector<Field> own;
    std::copy_if(field.children.begin(), field.children.end(), std::back_inserter(own),
                 [&](const Field& child) { return !IsIn(around, child.key); });
    absl::StrAppend(&text, std::string(level, '#'), " ", here, "\n\n", field.doc,
                    field.exactly_one ? " Exactly one of the keys is given." : "", "\n\n");
    AppendTable(own, text);
    AppendSections(own, here, level, text);
  }
}

}  // namespace

std::string FieldsJsonSchema(absl::string_view title, const std::vector<Field>& fields) {
  Json json;
  json["$schema"] = "https://json-schema.org/draft/2020-12/schema";
  json["title"] = std::string(title);
  json.update(SectionJson(fields, {}));
  return json.dump(2) + "\n";
}

std::string FieldsReference(const std::vector<Field>& fields, int level) {
  std::string text;
  std::vector<Field> leaves;
  std::copy_if(fields.begin(), fields.end(), std::back_inserter(leaves),
               [](const Field& field) { return field.is_leaf(); });
  if (!leaves.empty()) {
    absl::StrAppend(&text, std::string(level, '#'), " At the top level\n\n");
    AppendTable(leaves, text);
  }
  AppendSections(fields, "", level, text);
  return text;
}

}  // namespace baleen
