// What fields say about themselves: JSON Schema for editors, and the reference page.
#pragma once

#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "configs/schema/field.h"

namespace baleen {

// JSON Schema, draft 2020-12.
std::string FieldsJsonSchema(absl::string_view title, const std::vector<Field>& fields);

// Markdown: a table for each section, under headings of level `level`.
std::string FieldsReference(const std::vector<Field>& fields, int level);

}  // namespace baleen
